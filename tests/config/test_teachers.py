"""The list ``teachers``: entries, overrides by name, checks that name the entry, round trips."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from cmtmae_scale.api.pretrain import override_lines
from cmtmae_scale.config.changes import FREE_KEYS, compare_configs
from cmtmae_scale.config.load import config_from_dict, config_to_dict, load_config
from cmtmae_scale.config.needs import needs
from cmtmae_scale.config.teachers import (
    entry_errors,
    entry_text,
    pick_teacher,
    reads_cache,
    teacher_configs,
    used_teachers,
)
from cmtmae_scale.errors import EXIT_STOPPED, CmtMaeError, ConfigError, exit_code_of
from cmtmae_scale.pretraining.task import Pretraining

ROOT = Path(__file__).resolve().parents[2]
CLIP = {"name": "clip", "model": "ViT-B-16", "weights": "openai", "quick_gelu": True}
DINO = {
    "name": "dino",
    **{"library": "timm", "model": "vit_small_patch14_dinov2", "weights": "random"},
    **{"feature": "block", "layers": [-1, -2], "norm": "channel", "attention_source": "mean_query"},
}
TREE: dict[str, Any] = {
    "run": {"output_dir": "runs/x"},
    "data": {"path": "photos"},
    "train": {"steps": 10},
    "views": {"views_per_image": 2},
    "teachers": [CLIP, DINO],
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("teachers") / "recipe.yaml"
    path.write_text(yaml.safe_dump(TREE))
    return path


def test_each_entry_is_a_config_with_a_single_teacher(recipe: Path) -> None:
    config = load_config(recipe, ["cache.dir=rows", "teachers.dino.map=0", "teachers.dino.loss=2"])
    assert [one.loss for one in config.teachers] == [1.0, 2.0]
    clip, dino = teacher_configs(config).values()
    assert (clip.teacher.model, dino.teacher.model) == ("ViT-B-16", "vit_small_patch14_dinov2")
    assert (clip.attention.source, dino.attention.source) == ("cls", "mean_query")
    assert (clip.target.teacher.norm, dino.target.teacher.norm) == ("l2", "channel")
    assert (clip.target.teacher.layers, dino.target.teacher.layers) == ([-1], [-1, -2])
    assert (clip.cache.dir, dino.cache.dir) == ("rows/clip", "rows/dino")
    assert needs(clip).teacher_attention and needs(clip).teacher_features
    assert not needs(dino).teacher_attention and needs(dino).teacher_features
    assert clip.teachers == [] == dino.teachers and config.attention.source == "cls"


def test_entries_that_a_run_does_not_use_are_not_built(recipe: Path) -> None:
    config = load_config(recipe, ["mask.sampler=random", "teachers.clip.loss=0"])
    assert [one.name for one in used_teachers(config)] == ["dino"]
    assert used_teachers(load_config(recipe, ["mask.sampler=random", "loss.teacher=0"])) == []
    assert not needs(load_config(recipe, ["teachers.clip.loss=0", "teachers.dino.loss=0"]))[1]
    assert reads_cache(load_config(recipe, ["teachers.dino.mode=sidecar"]))


def test_a_recipe_is_written_back_as_it_was(recipe: Path) -> None:
    config = load_config(recipe, ["teachers.clip.mode=cached", "teachers.clip.cache_dir=a"])
    assert config_from_dict(config_to_dict(config), "checkpoint") == config
    assert load_config(recipe).teachers != config.teachers
    assert load_config(recipe, ["teachers=[]", "teacher.library=timm", *SINGLE]).teachers == []


SINGLE = ["teacher.model=test_vit", "teacher.weights=random"]
MISTAKES = {
    ("teachers.dino.los=1",): "teachers.dino.los is not a key of teachers.dino; did you mean loss?",
    ("teachers.dno.loss=1",): "teachers has no entry dno; did you mean dino?",
    ("teachers.dino=3",): "teachers.dino is an entry; give teachers.dino.KEY=value",
    ("teachers.dino.name=x",): "teachers.dino.name: entries are not renamed; change the recipe",
    ("teachers=3",): "teachers=3 is not a list of entries {name: ...}",
    ("teachers=[{model: x}]",): "teachers[0] needs a name of lower-case letters, digits and _",
    ("teachers=[{name: Clip}]",): "such as name: clip; found 'Clip'",
    ("teachers=[{name: a}, {name: a}]",): "teachers has two entries named a; rename one",
    ("teachers.dino.loss=-1",): "teachers.dino.loss=-1.0 must not be negative",
    ("teachers.dino.map=.nan",): "teachers.dino.map=nan must be finite",
    ("teachers.dino.mode=live",): "teachers.dino.mode='live' is not one of online, cached, "
    "sidecar, none; 'live' was renamed to 'online'",
    ("teachers.dino.norm=chanel",): "; did you mean channel?",
    ("teachers.dino.layers=[]",): "teachers.dino.layers is empty; give at least one block, or null",
    ("teachers.dino.layers=[a]",): "teachers.dino.layers[0]: Value 'a'",
    ("teachers.dino.feature=ln_post",): "teachers.dino.layers needs teachers.dino.feature=block",
    ("teachers.clip.quick_gelu=null",): "teachers.clip.quick_gelu must be given for open_clip",
    ("teachers.dino.loss=0", "teachers.dino.map=0"): "leave no use for it; remove the entry",
    ("teacher.mode=cached",): "teacher.mode=cached is for a single teacher, and the recipe has "
    "teachers; set teachers.NAME.mode, NAME one of clip, dino, or teachers=[]",
    ("teachers.dino.mode=cached",): "teachers.dino.cache_dir must be given for "
    "teachers.dino.mode=cached",
    ("teachers.clip.cache_dir=x", "teachers.dino.cache_dir=./x"): "is the cache of teachers.clip "
    "too; give each teacher its own folder",
    ("teachers.dino.cache_dir=s3://b/x",): "teachers.dino.cache_dir=s3://b/x is an address",
    (
        "teachers.clip.norm=ln",
        "teachers.dino.norm=none",
        "loss.type=mse",
    ): "teachers.dino.norm=none with loss.type=mse has no scale",
    (
        "teachers.clip.map=0",
        "teachers.dino.map=0",
    ): "leave no map that collaboration.alpha_attention could weigh; raise one",
    ("teachers.dino.precision=fp8", "backend.precision=fp32"): "teachers.dino.precision=fp8 needs",
    ("log.images_every=5", "cache.dir=x", "cache.on_miss=stop", "teachers.dino.mode=cached"): (
        "log.images_every=5 runs the teacher on images that no cache holds"
    ),
}


@pytest.mark.parametrize("overrides", MISTAKES, ids=" ".join)
def test_a_mistake_names_the_entry_and_the_override(
    recipe: Path, overrides: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError, match=re.escape(MISTAKES[overrides])) as caught:
        load_config(recipe, overrides)
    assert "\n" not in str(caught.value)
    keys = tuple(override.partition("=")[0] for override in overrides)
    assert str(caught.value).startswith(keys)  # not the recipe


def test_the_python_interface_takes_the_list_or_entries(recipe: Path) -> None:
    lines = override_lines({"teachers": {"dino": {"map": 2}}})
    assert load_config(recipe, lines).teachers[1].map == 2
    lines = override_lines({"teachers": [CLIP, DINO | {"name": "other"}]})
    assert [one.name for one in load_config(recipe, lines).teachers] == ["clip", "other"]


def test_messages_about_a_single_teacher_are_those_of_the_entry() -> None:
    text = "attention.source=cls: teacher.model=x has no class token; see /a/teacher.pt, cache.dir"
    expected = (
        "teachers.b.attention_source=cls: teachers.b.model=x has no class token; see "
        "/a/teacher.pt, teachers.b.cache_dir"
    )
    assert entry_text(text, "b") == expected and entry_text(text, "") == text
    assert entry_text("set loss.teacher=0", "b") == "teachers.b: set loss.teacher=0"


def test_a_command_asks_for_the_name(recipe: Path) -> None:
    config = load_config(recipe)
    assert pick_teacher(config, "dino").teacher.model == "vit_small_patch14_dinov2"
    for name in (None, "vit"):
        with pytest.raises(ConfigError, match="give --teacher NAME, NAME one of clip, dino"):
            pick_teacher(config, name)
    alone = load_config(recipe, ["teachers=[]", "teacher.library=timm", *SINGLE])
    assert pick_teacher(alone, None) == alone
    with pytest.raises(ConfigError, match="there is a single teacher; omit the name"):
        pick_teacher(alone, "clip")


def test_mode_and_cache_of_an_entry_may_change_at_a_resume(recipe: Path) -> None:
    free, same = FREE_KEYS + Pretraining.free_keys, ("digest", "digest")
    saved = config_to_dict(load_config(recipe))

    def changes(allowed: list[str], *overrides: str) -> list[str]:
        present = config_to_dict(load_config(recipe, overrides))
        return compare_configs(saved, present, allowed, same, free)

    assert not changes([], "teachers.clip.mode=cached", "teachers.clip.cache_dir=other")
    with pytest.raises(
        ConfigError, match=r"teachers\.dino\.map: the checkpoint has 1.0, the confi"
    ):
        changes([], "teachers.dino.map=2")
    (allowed,) = changes(["teachers.dino.map"], "teachers.dino.map=2")
    assert allowed.startswith("teachers.dino.map: the checkpoint has 1.0, the config 2.0; from")
    with pytest.raises(ConfigError, match="has clip, dino, the config clip; each has weights"):
        compare_configs(saved, saved | {"teachers": saved["teachers"][:1]}, [], same, free)
    older = {key: value for key, value in saved.items() if key != "teachers"}
    single = config_to_dict(load_config(recipe, ["teachers=[]", "teacher.library=timm", *SINGLE]))
    older["teacher"] = single["teacher"]
    assert compare_configs(older, single, [], same, free) == []


def test_the_example_of_the_page_is_a_recipe(tmp_path: Path) -> None:
    section = (ROOT / "docs" / "teachers.md").read_text().split("\n## Several teachers\n")[1]
    (example,) = re.findall(r"```yaml\n(.*?)```", section.split("\n## ")[0], re.DOTALL)
    path = tmp_path / "recipe.yaml"
    path.write_text(example)
    config = load_config(path)
    assert [(one.name, one.mode) for one in config.teachers] == [
        ("clip", "cached"),
        ("dino", "online"),
    ]
    assert teacher_configs(config)["clip"].cache.dir == "datasets/caches/clip"
    assert teacher_configs(config)["dino"].target.teacher.norm == "channel"


def test_an_error_that_names_an_entry_keeps_the_exit_code_of_another_rank() -> None:
    told = CmtMaeError("rank 1: teacher.weights=t.safetensors: Input/output error")
    told.exit_code = EXIT_STOPPED
    with pytest.raises(CmtMaeError, match=r"teachers\.clip\.") as raised, entry_errors("clip"):
        raise told
    assert exit_code_of(raised.value) == EXIT_STOPPED
