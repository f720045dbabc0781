import errno
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from cmtmae_scale.config.check import find_problems
from cmtmae_scale.config.load import (
    config_from_dict,
    config_to_dict,
    load_config,
    read_recipe,
    save_config,
)
from cmtmae_scale.config.schema import Config, Schedule
from cmtmae_scale.errors import EXIT_STOPPED, ConfigError, exit_code_of

DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"
BASE = {
    "run": {"output_dir": "runs/x"},
    "data": {"path": "photos"},
    "train": {"steps": 10},
    "teacher": {"library": "timm", "model": "vit_small_patch14_dinov2", "weights": "random"},
}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(BASE))
    return path


def message(recipe: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(recipe, overrides)
    assert caught.value.exit_code == 78
    return str(caught.value)


def test_overrides_win_over_the_file_and_the_file_over_defaults(recipe: Path) -> None:
    config = load_config(recipe, ["mask.ratio=0.6", "train.steps=4"])
    assert (config.mask.ratio, config.train.steps, config.train.micro_batch_size) == (0.6, 4, 64)


def test_an_integer_is_taken_for_a_float(recipe: Path) -> None:
    assert load_config(recipe, ["optimizer.grad_clip=3"]).optimizer.grad_clip == 3.0


@pytest.mark.parametrize(
    "text", ["1.10", "0700", "2024_01_15", "2024-01-15", "12:30", "no", "1e3", "12", "0x1F"]
)
def test_text_is_taken_as_it_is_written(recipe: Path, text: str) -> None:
    """YAML reads 1.10 as 1.1: a run named so would resume that of 1.1."""
    given = load_config(recipe, [f"run.output_dir={text}", f"teacher.weights={text}"])
    recipe.write_text(recipe.read_text().replace("runs/x", text).replace("random", text))
    for config in (given, load_config(recipe)):
        assert (config.run.output_dir, config.teacher.weights) == (text, text)
    entries = f"[{{name: one, model: {text}}}, {{name: two, weights: {text}}}]"
    draft = read_recipe(Config, find_problems, recipe)
    one, two = draft.override([f"teachers={entries}", f"teachers.one.weights={text}"]).values[
        "teachers"
    ]
    assert [one["model"], one["weights"], two["weights"]] == [text] * 3


@pytest.mark.parametrize("text", ["photos/my #1", "#1", "a\nb", "it's #1", "a 'b'"])
def test_text_of_an_override_has_no_comments_and_folds_no_lines(recipe: Path, text: str) -> None:
    config = load_config(recipe, [f"data.path={text}", f"run.output_dir={text}"])
    assert (config.data.path, config.run.output_dir) == (text, text)
    quoted = load_config(recipe, [f"data.path={json.dumps(text)}", "run.name='a #1' # b"])
    assert (quoted.data.path, quoted.run.name) == (text, "a #1")


def test_epochs_and_steps_clear_each_other(recipe: Path) -> None:
    config = load_config(recipe, ["train.epochs=2"])
    assert (config.train.epochs, config.train.steps) == (2.0, None)
    config = load_config(recipe, ["train.epochs=2", "train.steps=7"])
    assert (config.train.epochs, config.train.steps) == (None, 7)


def test_schedules_are_numbers_or_groups(recipe: Path) -> None:
    config = load_config(
        recipe, ["collaboration.alpha_attention=1", "collaboration.alpha_target.end=0.25"]
    )
    assert config.collaboration.alpha_attention == 1.0
    assert config.collaboration.alpha_target == Schedule("linear", 1.0, 0.25, None, 0.0, 0.25)
    switched = "collaboration.alpha_target={kind: constant, start: 0.4}"
    assert load_config(recipe, [switched]).collaboration.alpha_target == Schedule("constant", 0.4)


@pytest.mark.parametrize("number", ["5e-1", "5E-1", "5.0e-1", ".5e0", "+0.5e+0"])
def test_an_exponent_is_a_number_without_a_point_too(recipe: Path, number: str) -> None:
    """YAML reads 5e8 as text, which DeepSpeed's documentation writes for the size of a bucket."""
    overrides = [
        *(f"collaboration.alpha_target={number}", f"optimizer.base_lr={number}"),
        *("backend.name=deepspeed", f"backend.deepspeed={{a: {{b: [{number}, x1e2]}}}}"),
    ]
    config = load_config(recipe, overrides)
    assert (config.collaboration.alpha_target, config.optimizer.base_lr) == (0.5, 0.5)
    assert config.backend.deepspeed == {"a": {"b": [0.5, "x1e2"]}}


def test_the_saved_config_reads_back_equal(recipe: Path, tmp_path: Path) -> None:
    config = load_config(recipe, ["views.crop_scale=[0.3, 0.9]"])
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config
    assert config_from_dict(config_to_dict(config), "checkpoint") == config


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("mask.samplr=random", "mask.samplr is not a key of mask; did you mean sampler?"),
        ("maks.ratio=0.5", "maks is not a key of the config; did you mean mask?"),
        ("mask.sampler=hide_salent", "did you mean hide_salient?"),
        ("train.steps=abc", "train.steps: Value 'abc'"),
        ("train.micro_batch_size=1.5", "train.micro_batch_size"),
        ("mask=3", "expected group.key=value"),
        ("mask.ratio", "expected group.key=value, without spaces"),
        ("sampler=random", "did you mean mask.sampler?"),
        ("mask.ratio={a: 1}", "mask.ratio"),
        ("run.name=${oc.env:HOME}", "interpolation"),
        ("train.steps=null", "give epochs or steps"),
        ("collaboration.alpha_target={kind: lin, start: 1}", "did you mean linear?"),
        ("collaboration.alpha_target={kind: linear}", "start must be given"),
        ("collaboration.alpha_target={kind: linear, start: 1}", "end must be given"),
        ("collaboration.alpha_target=soon", "neither a number nor a schedule"),
        ("collaboration.alpha_target={kind: linear, start: 1, end: 0, u0: 1}", "must be below"),
        ("mask.throw_ratio=0.3", "leaves nothing visible"),
        ("mask.hint_fraction=0.2", "must not exceed mask.hint_pool=0.1"),
        ("views.crop_scale=[0.9]", "views.crop_scale"),
        ("decoder.heads=7", "not a multiple of decoder.heads=7"),
        ("decoder.type=none", "set loss.tokens=visible"),
        ("decoder.predict_ratio=0.5", "needs decoder.type=cross"),
        ("decoder.prompt_norm_context=maybe", "prompt_norm_context"),
        ("target.teacher.layers=[-2]", "needs teacher.feature=block"),
        ("target.student.layers=[]", "is empty"),
        ("teacher.mode=none", "the mask or the loss uses the teacher"),
        ("teacher.weights=null", "teacher.model and teacher.weights must be given"),
        ("teacher.library=open_clip", "teacher.quick_gelu must be given"),
        ("run.output_dir=null", "run.output_dir"),
        ("run.output_dir=s3://b/runs", "run.output_dir=s3://b/runs is an address; only tars"),
        ("data.store_cache=/x", "data.store_cache=/x is for tars of a store, and data.path="),
        ("data.store_cache=s3://b/x", "data.store_cache=s3://b/x is an address; only tars"),
        ("cache.dir=gs://b/cache", "cache.dir=gs://b/cache is an address; only tars"),
        ("data.path=s3://ID:KEY@b/a.tar", "data.path: s3://b/a.tar: an address must not hold a"),
        ("eval.test_path=https://h/a.tar?sig=KEY", "eval.test_path: https://h/a.tar: an address"),
        ("data.path=s3://ID:K/EY@b/a.tar", "data.path: s3://b/a.tar: an address must not hold a"),
        ("data.pth=s3://ID:KEY@b/a.tar", "data.pth=...: data.pth is not a key of data; did you"),
        ("s3.secret_access_key=KEY", "s3.secret_access_key=...: s3 is not a key of the config"),
        ("AWS_SECRET=KEY", "AWS_SECRET=...: is not an override"),
        ("s3://ID:KEY@b/a.tar", "s3://b/a.tar: is not an override"),
        ("data.source=s3://ID:KEY@b", "data.source=s3://b: data.source='s3://b' is not one of"),
        ("train.steps=s3://ID:KEY@b", "train.steps=s3://b: train.steps: Value 's3://b' of type"),
        ("log.trackers=s3://ID:KEY@b", "log.trackers=s3://b is not a list"),
        ("mask.ratio=s3://ID:KEY@b", "mask.ratio=s3://b: mask.ratio: Value 's3://b'"),
        ("momentum.start=[s3://ID:KEY@b", "the value is not YAML"),
    ],
)
def test_a_wrong_override_says_what_to_do(recipe: Path, override: str, expected: str) -> None:
    found = message(recipe, override)
    assert expected in found and "KEY" not in found


def test_attention_norms_are_allowed_after_a_warm_up(recipe: Path) -> None:
    default = "collaboration.alpha_attention={kind: two_stage, start: 1.0, end: 0.5, switch: 0.1}"
    assert load_config(recipe, ["attention.norm=rank", default]).attention.norm == "rank"
    early = message(recipe, "attention.norm=rank", "collaboration.alpha_attention=0.5")
    assert "amplifies the untrained momentum encoder" in early


@pytest.mark.parametrize("sampler", ["hide_salient", "reveal_salient_topk"])
def test_several_masks_a_view_need_a_sampler_with_noise(recipe: Path, sampler: str) -> None:
    text = message(recipe, f"mask.sampler={sampler}", "mask.masks_per_view=2")
    assert "the same mask every time" in text
    text = message(
        recipe, "mask.sampler=hide_salient_mix", "mask.salient_fraction=1", "mask.masks_per_view=2"
    )
    assert "the same mask every time" in text


def test_hints_may_be_all_that_stays_visible(recipe: Path) -> None:
    settings = ["mask.ratio=0.9", "mask.hint_pool=0.5"]
    assert load_config(recipe, [*settings, "mask.hint_fraction=0.1"]).mask.hint_fraction == 0.1
    text = message(recipe, *settings, "mask.hint_fraction=0.11")
    assert "nor the share of patches that stays visible" in text


def test_resident_images_are_not_dalis(recipe: Path) -> None:
    text = message(recipe, "data.resident=true", "data.decode=dali")
    assert "data.resident=true decodes each image once" in text and "set auto or torch" in text
    text = message(recipe, "data.resident=true", "data.worker_type=process")
    assert "data.resident=true decodes each image once" in text and "set auto or thread" in text


@pytest.mark.parametrize(
    "schedule",
    [
        "{kind: two_stage, start: 1, end: 0.5, switch: 0.1, u0: 0.3}",
        "{kind: constant, start: 0.5, u1: 0.5}",
    ],
)
def test_the_ends_of_a_ramp_are_for_ramps(recipe: Path, schedule: str) -> None:
    text = message(recipe, f"collaboration.alpha_attention={schedule}")
    assert "are the ends of linear and cosine schedules; found" in text


def test_unscaled_targets_need_the_cosine(recipe: Path) -> None:
    for norm in ("none", "center"):
        text = message(recipe, "loss.type=mse", f"target.teacher.norm={norm}")
        assert "has no scale; use ln, l2, instance or channel" in text


def test_a_run_without_a_target_is_refused(recipe: Path) -> None:
    assert "no target has a weight" in message(recipe, "loss.teacher=0", "loss.student=0")


def test_missing_keys_are_named(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("train: {steps: 1}\n")
    assert "data.path, run.output_dir must be given" in message(path)


def test_broken_files_are_named(tmp_path: Path) -> None:
    assert "absent.yaml: no such file" in message(tmp_path / "absent.yaml")
    assert "cannot be read" in message(Path("/proc/self/mem"))
    broken = tmp_path / "broken.yaml"
    broken.write_text("run: [")
    assert "is not YAML" in message(broken)
    broken.write_text("- 1\n")
    assert "has no groups" in message(broken)


@pytest.mark.parametrize("text", ["*.tar", "{a,b}/x-*.tar", "[ab]-0.tar", "{a.tar,b.tar}", "a,b"])
def test_a_pattern_of_tars_needs_no_quotes_for_yaml(
    recipe: Path, tmp_path: Path, text: str
) -> None:
    config = load_config(recipe, [f"data.path={text}"])
    assert config.data.path == text
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml").data.path == text


def test_a_list_of_paths_is_answered_with_a_pattern(recipe: Path) -> None:
    expected = "data.path: is a list, expected one path: a pattern such as train-*.tar or {a,b}.tar"
    assert expected in message(recipe, "data.path=[a.tar,b.tar]")
    recipe.write_text(yaml.safe_dump(BASE | {"data": {"path": ["a.tar", "b.tar"]}}))
    assert expected in message(recipe)


def test_hints_and_prob_need_a_map(recipe: Path) -> None:
    text = message(recipe, "mask.sampler=random", "mask.prob=0.5")
    assert "mask.sampler=random does not" in text


WRONG = {
    "run.allow_change=mask.ratio": "is not a list; write 'run.allow_change=[mask.ratio]'",
    "attention.layers=-1": "is not a list; write 'attention.layers=[-1]'",
    "views.crop_scale=[0.2]": "is not a list of 2 numbers, such as 'views.crop_scale=[0.2, 1.0]'",
    "optimizer.betas=0.9": "is not a list of 2 numbers, such as 'optimizer.betas=[0.9, 0.95]'",
    "run.seed=-1": "run.seed=-1 must not be negative",
    f"run.seed={2**63}": f"must be below {2**63}",
    f"train.steps={10**30}": f"must be below {2**63}",
    "train.epochs=1e30": f"must be below {2**63}",
    "train.epochs=inf": "train.epochs=inf must be finite",
    "guard.hang_seconds=.inf": "guard.hang_seconds=inf must be finite",
    "mask.ratio=1.5": "mask.ratio=1.5 must lie in (0, 1)",
    "mask.salient_fraction={kind: linear, start: 0.5, end: 2}": "mask.salient_fraction.end=2",
    "collaboration.alpha_target=yes": "is neither a number nor a schedule",
    "run.seed=1e400": "run.seed: Value '1e400' of type 'str' could not be converted to Integer; "
    "expected a whole number",
    "train.steps=1.5": "expected a whole number, or null",
    "run.seed=null": "run.seed: ",
    "views.hflip=perhaps": "expected true or false",
    "optimizer.betas=[a, 0.95]": "expected a number",
    "backend.deepspeed={a: 2024-01-01}": "backend.deepspeed",
    "optimizer.grad_clip=off": "expected a number, or null",
    "run.name=[2024-01-01]": "expected text",
    "views.hflip=2": "views.hflip=2 is neither true nor false",
    "teacher.quick_gelu=2": "teacher.quick_gelu=2 is neither true nor false",
    "optimizer.betas=[[0.9], 0.95]": "is not a list of 2 numbers",
    "run.allow_change=[[mask.ratio]]": "is a list of lists; write 'run.allow_change=[mask.ratio]'",
    "run.allow_change={mask.ratio: 1}": "is not a list; write 'run.allow_change=[mask.ratio]'",
}


@pytest.mark.parametrize("override", WRONG)
def test_a_wrong_override_is_named_with_its_key_and_a_remedy(override: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config(DEMO, ["log.every=5", override])
    text = str(raised.value)
    assert text.startswith((f"{override}: ", f"{override} "))
    assert not text.startswith(f"{override}: {override}")
    assert override.partition("=")[0] in str(raised.value).removeprefix(f"{override}: ")
    assert WRONG[override] in str(raised.value)


def test_an_override_is_not_repeated(tmp_path: Path) -> None:
    remedy = "~ is not expanded; write the full path"
    with pytest.raises(ConfigError) as by_override:
        load_config(DEMO, ["run.output_dir=~/runs"])
    assert str(by_override.value) == f"run.output_dir=~/runs: {remedy}"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(DEMO.read_text().replace("output_dir: runs/demo", "output_dir: ~/runs"))
    with pytest.raises(ConfigError) as in_file:
        load_config(recipe)
    assert str(in_file.value) == f"{recipe}: run.output_dir=~/runs: {remedy}"


def test_a_large_factor_is_no_length() -> None:
    assert load_config(DEMO, ["optimizer.base_lr=1e30"]).optimizer.base_lr == 1e30


def test_a_problem_of_the_recipe_is_not_blamed_on_an_override(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(DEMO.read_text().replace("  ratio: 0.75", "  ratio: 1.5"))
    with pytest.raises(ConfigError, match=r"recipe.yaml: mask.ratio=1.5 must lie"):
        load_config(recipe, ["mask.masks_per_view=1", "log.every=5"])
    assert load_config(recipe, ["mask.ratio=0.5"]).mask.ratio == 0.5


@pytest.mark.parametrize(
    "override", ["run.allow_change=mask.ratio", "attention.layers=-1", "views.crop_scale=1"]
)
def test_the_remedy_of_a_list_works(override: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config(DEMO, [override])
    load_config(DEMO, [str(raised.value).split("'")[1]])


ESCAPES = (
    "'${oc.env:SECRET}'",
    '"\\x24{oc.env:SECRET}"',
    '"\\u0024{oc.env:SECRET}"',
    '"a \\x24{oc.env:SECRET} b"',
    '"\\x24\\x7boc.env:SECRET\\x7d"',
    "!!str '${oc.env:SECRET}'",
)


@pytest.mark.parametrize("value", ESCAPES)
def test_no_text_of_any_tree_is_resolved(
    recipe: Path, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    keys = ("run.name", "run.allow_change", "student.init_weights", "optimizer.base_lr")
    texts = [message(recipe, f"{key}={value}") for key in keys]
    texts.append(message(recipe, f"run.allow_change=[a, {value}]"))
    texts.append(message(recipe, f"mask.salient_fraction={{kind: {value}}}"))
    texts.append(message(recipe, f"backend.deepspeed={{a: {{b: [{value}]}}}}"))
    tree = config_to_dict(load_config(recipe))
    tree["run"]["name"] = yaml.safe_load(value)
    with pytest.raises(ConfigError) as raised:
        config_from_dict(tree, "state.json")
    texts.append(str(raised.value))
    recipe.write_text(recipe.read_text() + f"log: {{every: {value}}}\n")
    texts.append(message(recipe))
    assert all("interpolation" in text and "hunter2" not in text for text in texts)


def test_a_deepspeed_file_is_not_resolved(recipe: Path, tmp_path: Path) -> None:
    file = tmp_path / "deepspeed.json"
    override = f"backend.deepspeed={file}"
    file.write_text('{"zero_optimization": {"a": ["\\u0024{oc.env:HOME}"]}}')
    assert "interpolation" in message(recipe, "backend.name=deepspeed", override)
    for depth in (900, 100_000):
        file.write_text("[" * depth + "]" * depth)
        assert "backend.deepspeed=" in message(recipe, "backend.name=deepspeed", override)
    file.write_text('{"zero_optimization": {"offload_optimizer": true}}')
    assert "offload_optimizer=True is a group" in message(
        recipe, "backend.name=deepspeed", override
    )
    file.unlink()
    os.mkfifo(file)
    assert "Not a regular file" in message(recipe, "backend.name=deepspeed", override)


def test_a_key_of_a_deepspeed_file_is_given_once(recipe: Path, tmp_path: Path) -> None:
    file = tmp_path / "deepspeed.json"
    file.write_text('{"zero_optimization": {"overlap_comm": true, "overlap_comm": false}}')
    found = message(recipe, "backend.name=deepspeed", f"backend.deepspeed={file}")
    assert found.endswith("deepspeed.json: is not JSON: overlap_comm is given twice; keep one")


@pytest.mark.parametrize(
    ("owner", "call", "name"),
    [(Path, "stat", "recipe.yaml"), (Path, "open", "recipe.yaml"), (os, "open", "deepspeed.json")],
)
def test_a_file_whose_store_fails_may_be_read_later(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, call: str, name: str
) -> None:
    usual = getattr(owner, call)
    file = recipe.with_name("deepspeed.json")
    file.write_text("{}")

    def fail(path: str | Path, *given: Any, **options: Any) -> Any:
        if Path(path).name == name:
            raise OSError(errno.ESTALE, "Stale file handle", str(path))
        return usual(path, *given, **options)

    monkeypatch.setattr(owner, call, fail)
    with pytest.raises(ConfigError, match="see that the storage works and try") as raised:
        load_config(recipe, ["backend.name=deepspeed", f"backend.deepspeed={file}"])
    assert exit_code_of(raised.value) == EXIT_STOPPED


def test_saved_settings_are_read_without_the_deepspeed_file(recipe: Path, tmp_path: Path) -> None:
    """They are evaluated, exported and reported where that file may be absent, or another's."""
    file = tmp_path / "deepspeed.json"
    file.write_text('{"zero_optimization": {"overlap_comm": true}}')
    overrides = ["backend.name=deepspeed", f"backend.deepspeed={file}"]
    saved = config_to_dict(load_config(recipe, overrides))
    file.unlink()
    assert config_from_dict(saved, "state.json").backend.deepspeed == str(file)
    assert "cannot be read" in message(recipe, *overrides)


def test_a_dollar_in_a_comment_or_alone_is_no_interpolation(recipe: Path) -> None:
    recipe.write_text(recipe.read_text() + "# $PRICE, ${HOME}\n")
    assert load_config(recipe, ["run.name='5$ {a}'"]).run.name == "5$ {a}"


def alias_bomb(start: str, link: str) -> str:
    """Nine levels that name the level before ten times."""
    lines = [f"a0: &a0 {start}"]
    for level in range(1, 10):
        lines.append(f"a{level}: &a{level} " + link.format(", ".join([f"*a{level - 1}"] * 10)))
    return "\n".join(lines)


@pytest.mark.parametrize(
    "text",
    [
        alias_bomb("[x]", "[{}]"),
        alias_bomb("{b: c}", "{{<<: [{}]}}"),
        "run: &a {name: *a}",
        "run: &a [*a]",
        "run: " + "[" * 1000,
        "run: 2024-13-45",
        "run: !!bool x",
        "run: !!int ''",
        "run: " + "1" * 5000,
        "run: \udcff",
        "log: {every: 1}\nlog: {images_every: 2}",
        "log: {every: 1, every: 1}",
        "x" * 2**21,
    ],
)
def test_hostile_yaml_is_refused_before_work_begins(recipe: Path, text: str) -> None:
    recipe.write_bytes(text.encode(errors="surrogateescape"))
    began = time.process_time()
    assert str(recipe) in message(recipe)
    assert time.process_time() - began < 5


def test_aliases_may_repeat_values(recipe: Path) -> None:
    recipe.write_text(recipe.read_text() + "eval: {train_path: &p photos, test_path: *p}\n")
    assert load_config(recipe).eval.test_path == "photos"
