"""Another user's checkpoint is exported as it is, or refused with one sentence."""

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cmtmae_scale.checkpoint import layout
from cmtmae_scale.checkpoint.index import INDEX
from cmtmae_scale.commands.export import export_weights
from cmtmae_scale.errors import EXIT_CONFIG, CheckpointError
from cmtmae_scale.evaluation.subject import subject_from_checkpoint
from cmtmae_scale.export.full import load_full
from cmtmae_scale.export.results import find_results
from tests.checkpoint.test_foreign import make_pipe, sign
from tests.engine.run_case import STEPS
from tests.evaluation.evaluation_case import world

pytestmark = pytest.mark.gloo


@pytest.fixture
def folder(run_dir: Path, tmp_path: Path) -> Path:
    """A copy of a checkpoint, outside of its run."""
    return Path(shutil.copytree(layout.folder_of(run_dir / "checkpoints", STEPS), tmp_path / "c"))


def set_config(group: str, key: str, value: object) -> Callable[[dict[str, Any]], None]:
    return lambda tree: tree["config"][group].update({key: value})


ENCODER_KEY = "model.encoder.norm.weight"
CASES: dict[str, tuple[str, Callable[[dict[str, Any]], Any], str]] = {
    "hub": (layout.STATE, set_config("student", "arch", "hf-hub:a/b"), "not a model of timm"),
    "folder": (layout.STATE, set_config("student", "arch", "local-dir:/"), "not a model of timm"),
    "another arch": (
        layout.STATE,
        set_config("student", "arch", "vit_tiny_patch16_224"),
        "does not fit its own config",
    ),
    "huge images": (
        layout.STATE,
        set_config("views", "image_size", 8 * 10**6),
        "does not fit its own config",
    ),
    "secret": (layout.STATE, set_config("run", "name", "${oc.env:SECRET}"), "interpolation"),
    "unknown key": (layout.STATE, set_config("run", "x", 1), "not a key"),
    "group": (layout.STATE, lambda tree: tree["config"].update(run=3), "is a group"),
    "deep": (
        layout.STATE,
        set_config("run", "name", json.loads("[" * 300 + "]" * 300)),
        "nested too deeply|run.name",
    ),
    "of fine-tuning": (layout.STATE, lambda tree: tree.update(task="fine-tuning"), "fine-tuning"),
    "no tensor": (INDEX, lambda tree: tree.pop(ENCODER_KEY), "norm.weight has shape none"),
    "one more": (
        INDEX,
        lambda tree: tree.update({"model.encoder.x": tree[ENCODER_KEY]}),
        "more values than|x has shape",
    ),
    "another shape": (
        INDEX,
        lambda tree: tree[ENCODER_KEY].update(shape=[1, *tree[ENCODER_KEY]["shape"]]),
        "norm.weight has shape",
    ),
    "gap": (INDEX, lambda tree: tree[ENCODER_KEY]["chunks"].pop(), "values|gap"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_foreign_checkpoint_is_refused_in_a_sentence(
    folder: Path,
    tmp_path: Path,
    case: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def no_network(*_: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setenv("SECRET", "hunter2")
    name, edit, message = CASES[case]
    tree = json.loads((folder / name).read_text())
    edit(tree)
    (folder / name).write_text(json.dumps(tree))
    sign(folder)
    with pytest.raises(CheckpointError, match=message):
        subject_from_checkpoint(folder, "student", world(), torch.device("cpu"))
    for kind in ("encoder", "timm", "full"):
        output = tmp_path / kind
        arguments = [kind, "--checkpoint", str(folder), "--output", str(output)]
        assert export_weights(arguments) == EXIT_CONFIG
        shown = capsys.readouterr().err
        assert len(shown.splitlines()) == 1 and "hunter2" not in shown
        assert not output.exists()


def test_a_folder_of_the_full_model_is_read_from_regular_files(tmp_path: Path) -> None:
    for name in ("config.yaml", "model.safetensors"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_full(tmp_path)
    make_pipe(tmp_path / "config.yaml")
    with pytest.raises(CheckpointError, match="Not a regular file"):
        load_full(tmp_path)


def test_results_of_any_content_are_named(tmp_path: Path) -> None:
    place = tmp_path / "evaluation"
    place.mkdir()
    make_pipe(place / "a.json")
    (place / "b.json").symlink_to("/dev/zero")
    for name, text in {
        "c": '{"subject": {"sha256": "x"}, "results": 3}',
        "d": '{"subject": {"sha256": "x"}, "results": [{"accuracy": 1e999}, 4]}',
        "e": "[" * 100_000,
        "f": '{"subject": {"sha256": "x"}, "accuracy": 0.5, "count": {"a": 1}}',
    }.items():
        (place / f"{name}.json").write_text(text)
    found = find_results(tmp_path, "x")
    assert [text.split(":")[0] for text in found.others] == [f"{n}.json" for n in "abcde"]
    assert len(found.rows) == 1
