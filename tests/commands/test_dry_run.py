"""``--dry-run`` names what a launch would refuse, with its figures and exit code 78."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import timm
from safetensors.torch import save_file

from cmtmae_scale.commands import dry_run
from cmtmae_scale.commands.pretrain import launch_pretraining, parse_options
from cmtmae_scale.config.load import config_to_dict, load_config
from cmtmae_scale.errors import EXIT_CONFIG, EXIT_DONE
from cmtmae_scale.export.origin import Origin
from cmtmae_scale.export.views import open_run_index
from cmtmae_scale.runtime.launch import World
from cmtmae_scale.runtime.lock import hold_run
from cmtmae_scale.tools.estimate import build_meta_networks
from dataloading.index import build_index
from dataloading.kept_index import load_or_build
from tests.checkpoint.save_case import STATE, save
from tests.engine.run_case import make_photographs, write_recipe

BAD = "would not start: "


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("dry"))


@pytest.fixture
def place(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder without files, from which relative paths are read; FLOPs are not counted."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dry_run, "count_networks", lambda *_: ["memory per GPU"])
    return tmp_path


def dry(recipe: Path, capsys: pytest.CaptureFixture[str], *overrides: str) -> tuple[int, list[str]]:
    """Exit code of a dry run, and its reasons; the figures are always printed."""
    options = parse_options(["--config", str(recipe), "--dry-run", *overrides])
    code = launch_pretraining(options)
    lines = capsys.readouterr().out.splitlines()
    for part in ("run:", "images ", "batch ", "learning rate ", "would resume "):
        assert any(line.startswith(part) for line in lines), part
    return code, [line.removeprefix(BAD) for line in lines if line.startswith(BAD)]


def test_a_recipe_that_would_start(recipe: Path, place: Path, capsys) -> None:
    assert dry(recipe, capsys) == (EXIT_DONE, [])
    assert list(place.iterdir()) == []  # nothing is written
    assert not (recipe.parent / "run").exists()


def test_the_memory_is_that_of_the_nodes_of_the_launch(recipe: Path) -> None:
    """A copy of the weights is shared by the ranks of one node, of whatever size."""
    line = ["backend.name=fsdp", "backend.sharding=hybrid"]
    config = load_config(recipe, line)
    networks = build_meta_networks(config)
    for node_size in (2, 4, 8):
        world = World(0, 8, 0, node_size, "none")
        *_, memory = dry_run.count_networks(config, world, networks)
        assert f"(modelled, {node_size} shards; " in memory


REFUSED = {
    "images": (["data.path=absent"], "absent"),
    "no image": (["data.path=empty"], "empty"),
    "number of images": (["data.expected_images=21"], "20 usable images, data.expected_images=21"),
    "teacher's file": (["teacher.weights=t.safetensors"], "t.safetensors: there is no such file"),
    "teacher's depth": (["teacher.weights=shallow.safetensors"], "does not fit teacher.model=test"),
    "blocks kept": (["teacher.depth=40"], "teacher.depth=40"),
    "teacher's model": (["teacher.model=vit_nano"], "vit_nano is not a model of timm"),
    "initial weights": (["student.init_weights=s.safetensors"], "s.safetensors: there is no such"),
    "another run": (["student.init_from_run=gone"], "student.init_from_run=gone is neither"),
    "another encoder": (["student.init_weights=shallow.safetensors"], "does not fit: "),
    "evaluation": (["eval.every=2", "eval.train_path=photos", "eval.test_path=nowhere"], "nowhere"),
    "cache": (["teacher.mode=cached", "cache.dir=c", "views.views_per_image=1"], "c"),
    "student": (["student.arch=resnet50"], "student.arch=resnet50"),
    "folder": (["run.output_dir=file/run"], "file is not a folder"),
    "folder of others": (["run.output_dir=empty"], "empty holds log.jsonl of another program"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_launch_refuses_is_named(name: str, recipe: Path, place: Path, capsys) -> None:
    (place / "empty").mkdir()
    (place / "empty" / "log.jsonl").write_text("3\n")
    (place / "file").touch()
    (place / "photos").symlink_to(recipe.parent / "photos")
    shallow = timm.create_model("test_vit", num_classes=0).state_dict()
    del shallow["blocks.5.norm1.weight"]
    save_file(shallow, place / "shallow.safetensors")
    overrides, text = REFUSED[name]
    code, reasons = dry(recipe, capsys, *overrides)
    assert code == EXIT_CONFIG
    assert len(reasons) == 1 and text in reasons[0], reasons


def test_every_reason_is_named_at_once(recipe: Path, place: Path, capsys) -> None:
    code, reasons = dry(
        recipe, capsys, "data.path=absent", "teacher.weights=t.pt", "student.init_weights=s.pt"
    )
    assert code == EXIT_CONFIG
    assert ["absent" in reasons[0], "t.pt" in reasons[1], "s.pt" in reasons[2]] == [True] * 3


def test_a_folder_that_is_no_utf8_is_escaped(
    recipe: Path, place: Path, tmp_path: Path, capsys
) -> None:
    images = make_photographs(tmp_path / os.fsdecode(b"caf\xe9"))
    options = parse_options(["--config", str(recipe), "--dry-run", f"data.path={images}"])
    assert launch_pretraining(options) == 0
    printed = capsys.readouterr().out
    assert r"caf\udce9" in printed and printed.encode()  # a terminal takes UTF-8 alone


@pytest.mark.parametrize(
    "path", ["a/t-{0..3}.tar", "a/t-*.tar", "{a,b}/t-0.tar", "*/t-[01].tar", "a/t-0.tar"]
)
def test_a_number_of_images_stands_for_absent_images_only(
    recipe: Path, place: Path, capsys, path: str
) -> None:
    absent = ["data.expected_images=7", f"data.path={path}"]
    assert dry(recipe, capsys, *absent) == (EXIT_DONE, [])
    (place / "a").mkdir()
    (place / "a" / "t-0.tar").touch()
    assert dry(recipe, capsys, *absent)[0] == EXIT_CONFIG


def test_the_index_of_a_run_is_only_looked_at(recipe: Path, place: Path, capsys) -> None:
    """The ranks of a run in progress have it mapped; on this machine the files have other times."""
    photographs, kept = make_photographs(place / "photographs", 9), place / "kept"
    digest = load_or_build(photographs, kept).digest
    os.utime(next(photographs.rglob("*.jpg")), (1, 1))
    before = {file: (file.stat().st_ino, file.read_bytes()) for file in kept.iterdir()}
    settings = [f"data.path={photographs}", f"data.index={kept}"]
    assert dry(recipe, capsys, *settings) == (EXIT_DONE, [])
    config = load_config(recipe, settings)
    assert (
        open_run_index(cast(Origin, SimpleNamespace(config=config, run_dir=None))).digest == digest
    )
    assert before == {file: (file.stat().st_ino, file.read_bytes()) for file in kept.iterdir()}


def test_the_ranks_of_a_launcher_count(
    recipe: Path, place: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in {"WORLD_SIZE": 3, "RANK": 0, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(key, str(value))
    code, reasons = dry(recipe, capsys)
    assert code == EXIT_CONFIG
    batch, nodes = sorted(reasons, key=lambda reason: "hybrid" in reason)
    assert "8 cannot be shared by 3 ranks" in batch and "nodes of 2" in nodes


def test_a_folder_in_use_and_a_stop_request_are_named(recipe: Path, place: Path, capsys) -> None:
    where = f"run.output_dir={place / 'run'}"
    with hold_run(place / "run", 0):
        (reason,) = dry(recipe, capsys, where)[1]
        assert f"is in use by pid {os.getpid()} on" in reason
    assert dry(recipe, capsys, where) == (EXIT_DONE, [])
    (place / "run" / "STOP").touch()
    text, code = dry_run.dry_run(load_config(recipe, [where]), World(0, 1, 0, 1, "none"))
    assert f"would stop      after one step: {place / 'run' / 'STOP'} exists; delete it" in text
    assert code == EXIT_DONE


def test_a_checkpoint_that_would_be_refused(
    recipe: Path, place: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = f"run.output_dir={place / 'run'}"
    config = load_config(recipe, [where])
    monkeypatch.setitem(STATE, "config", config_to_dict(config))
    monkeypatch.setitem(STATE, "index_digest", build_index(config.data.path).digest)
    (place / "run").mkdir()
    folder = save(place / "run" / "checkpoints")
    assert dry(recipe, capsys, where, "train.steps=9")[1][0].endswith(
        "run.allow_change=[train.steps]"
    )
    assert dry(recipe, capsys, where) == (EXIT_DONE, [])
    # 8 epochs of 20 images are 160 views. The checkpoint has 3 of them, the others are 20 batches.
    longer = ["train.epochs=8", "run.allow_change=[train.steps,train.epochs]"]
    text, _ = dry_run.dry_run(load_config(recipe, [where, *longer]), World(0, 1, 0, 1, "none"))
    assert "steps           23\n" in text
    shutil.copytree(recipe.parent / "photos" / "class0", place / "photos" / "class0")
    (reason,) = dry(recipe, capsys, where, f"data.path={place / 'photos'}")[1]
    assert "images differ" in reason and "student.init_from_run=" in reason
    (folder / "manifest.json").unlink()
    assert "none of 1 checkpoints is intact" in dry(recipe, capsys, where)[1][0]
    shutil.rmtree(folder)
    assert "latest names a checkpoint, but there is none" in dry(recipe, capsys, where)[1][0]


def test_flops_of_small_networks_keep_their_digits() -> None:
    counts = (0.0, 3.984e8, 2.41e9, 9.995e9, 51.7e9, 1.2345e12)
    formatted = [dry_run.format_giga(one) for one in counts]
    assert formatted == ["0", "0.398", "2.41", "9.99", "51.7", "1234.5"]
