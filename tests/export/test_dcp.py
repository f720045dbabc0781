"""Folders of torch.distributed.checkpoint: others load ours, and we read theirs."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from cmtmae_scale.checkpoint import layout
from cmtmae_scale.checkpoint.chunks import ChunkReader
from cmtmae_scale.checkpoint.init_weights import load_init_weights
from cmtmae_scale.commands.export import export_weights
from cmtmae_scale.errors import EXIT_CONFIG, EXIT_STOPPED, ConfigError, TeacherError, exit_code_of
from cmtmae_scale.export import dcp as dcp_module
from cmtmae_scale.export.dcp import export_dcp
from cmtmae_scale.teachers.dcp import METADATA, without_group
from cmtmae_scale.teachers.weights import digest_weights, read_weights
from tests.checkpoint.test_init_weights import make_model, timm_state
from tests.disk import mounted
from tests.engine.run_case import STEPS

DATA = "__0_0.distcp"


@pytest.mark.gloo
def test_a_programs_model_loads_the_folder_and_the_next_run_starts_from_it(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "dcp"
    words = ["--checkpoint", str(run_dir), "--weights", "momentum", "--output", str(folder)]
    assert export_weights(["dcp", *words]) == 0
    text, call = capsys.readouterr().out.splitlines()
    assert text.startswith(f"{folder}: momentum encoder at step {STEPS}, ")
    assert "read back equal to the bit" in text
    theirs = eval(call, {"timm": timm})
    state = {name: torch.zeros_like(value) for name, value in theirs.state_dict().items()}
    with without_group():
        load(state, checkpoint_id=folder, no_dist=True)
    theirs.load_state_dict(state, strict=True)
    with ChunkReader(layout.folder_of(run_dir / "checkpoints", STEPS)) as reader:
        for name, value in state.items():
            assert torch.equal(value, reader.read_tensor(f"momentum.{name}"))
    start = read_weights(folder, "student.init_weights")
    assert start.keys() == state.keys()
    assert all(torch.equal(start[name], value) for name, value in state.items())
    assert export_weights(["dcp", *words]) == EXIT_CONFIG  # there is one already


def test_a_full_store_is_named_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    origin = SimpleNamespace(tensors=lambda _: timm_state())
    monkeypatch.setattr(dcp_module, "open_origin", lambda *_: origin)
    with mounted(tmp_path / "disk", "64k") as disk:
        with pytest.raises(ConfigError, match=r"No space left on device.; make room") as raised:
            export_dcp(tmp_path, disk / "dcp", "student")
        assert exit_code_of(raised.value) == EXIT_STOPPED and not list(disk.iterdir())


def write(folder: Path, state: dict[str, Any]) -> Path:
    with without_group():
        save(state, storage_writer=FileSystemWriter(folder), no_dist=True)
    return folder


@pytest.mark.parametrize("nested", [False, True], ids=["as torchtitan", "under model"])
def test_a_training_state_of_another_program_gives_its_models_weights(
    tmp_path: Path, nested: bool
) -> None:
    state = timm_state()
    more = {
        "optimizer": {f"state.{name}.exp_avg": value + 1 for name, value in state.items()},
        "train_state": {"step": torch.tensor(7), "losses": [1.0]},
        "lr_scheduler": {"last_epoch": 3},
    }
    folder = write(tmp_path / "x", {**({"model": state} if nested else state), **more})
    found = read_weights(folder, "student.init_weights")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], value) for name, value in state.items())
    model = make_model()
    report = load_init_weights(model, found, str(folder))
    assert "encoder.blocks.5.mlp.fc2.weight" in model.state_dict()
    assert not set(state) - {*report.loaded, *report.resampled, *report.skipped}
    first = digest_weights(folder)
    flip(folder / DATA)
    assert digest_weights(folder) != first


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.marker),)


def edit(change: Callable[[Any], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tree = pickle.loads((folder / METADATA).read_bytes())
        (folder / METADATA).write_bytes(pickle.dumps(change(tree) or tree))

    return apply


def shrink(tree: Any) -> None:
    tree.state_dict_metadata["w"].chunks.clear()


def grow(tree: Any) -> None:
    for entry in (tree.state_dict_metadata["w"], *tree.state_dict_metadata["w"].chunks):
        setattr(entry, "size" if hasattr(entry, "size") else "sizes", torch.Size([2**40]))


def point_out(tree: Any) -> None:
    for place in tree.storage_data.values():
        place.relative_path = "../out"


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no metadata": (lambda f: (f / METADATA).unlink(), "has no .metadata"),
    "metadata cut": (lambda f: (f / METADATA).write_bytes(b"\x80\x04"), "cannot be read"),
    "another object": (edit(lambda _: {"w": 1}), "is no metadata of torch"),
    "data absent": (lambda f: (f / DATA).unlink(), "No such file"),
    "data cut": (lambda f: os.truncate(f / DATA, 40), "cannot be read"),
    "a chunk is missing": (edit(shrink), "the chunks of w are not its 6 values"),
    "more values than bytes": (edit(grow), "more values than the files"),
    "another folder's file": (edit(point_out), "Links to a file outside"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_folder_is_one_error(tmp_path: Path, fault: str) -> None:
    folder = write(tmp_path / "x", {"w": torch.arange(6.0)})
    (tmp_path / "out").write_bytes((folder / DATA).read_bytes())
    damage, message = FAULTS[fault]
    damage(folder)
    with pytest.raises(TeacherError, match=message) as raised:
        read_weights(folder, "student.init_weights")
    assert str(raised.value).startswith(f"student.init_weights={folder}: ")
    assert "\n" not in str(raised.value)


def test_a_folder_without_weights_or_with_nan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match="holds no weights"):
        read_weights(write(tmp_path / "x", {"optimizer": {"a": torch.ones(2)}, "step": 3}))
    with pytest.raises(TeacherError, match="w holds 1 values of 2 that are not finite"):
        read_weights(write(tmp_path / "y", {"w": torch.tensor([1.0, float("nan")])}))


@pytest.mark.parametrize("file", [METADATA, DATA])
def test_a_planted_pickle_never_runs(tmp_path: Path, file: str) -> None:
    folder, marker = write(tmp_path / "x", {"w": torch.ones(2)}), tmp_path / "it ran"
    bomb = pickle.dumps(Bomb(marker), 2)  # torch.save's protocol
    (folder / file).write_bytes(bomb.ljust((folder / file).stat().st_size, b"\0"))
    with pytest.raises(TeacherError, match="could run code" if file == METADATA else "cannot"):
        read_weights(folder)
    assert not marker.exists()
    pickle.loads(bomb)
    assert marker.exists(), "the bomb itself works"


def test_shards_of_several_ranks_are_joined(tmp_path: Path) -> None:
    """As FSDP2 writes them: rows of a tensor in the files of two ranks."""
    whole: Tensor = torch.arange(12.0).view(4, 3)
    folder = write(tmp_path / "x", {"w": whole})
    tree: Any = pickle.loads((folder / METADATA).read_bytes())
    other = write(tmp_path / "y", {"w": whole[2:]})
    (folder / DATA).unlink()
    write(tmp_path / "z", {"w": whole[:2]})
    (tmp_path / "z" / DATA).rename(folder / DATA)
    (other / DATA).rename(folder / "__1_0.distcp")
    parts = [pickle.loads((place / METADATA).read_bytes()) for place in (tmp_path / "z", other)]
    entry = tree.state_dict_metadata["w"]
    (first,) = parts[0].state_dict_metadata["w"].chunks
    (second,) = parts[1].state_dict_metadata["w"].chunks
    second.offsets = torch.Size([2, 0])
    entry.chunks[:] = [first, second]
    ((key, place),) = parts[0].storage_data.items()
    ((_, place2),) = parts[1].storage_data.items()
    place2.relative_path = "__1_0.distcp"
    index = type(key)("w", torch.Size([2, 0]), 1)
    tree.storage_data = {type(key)("w", torch.Size([0, 0]), 0): place, index: place2}
    (folder / METADATA).write_bytes(pickle.dumps(tree))
    assert torch.equal(read_weights(folder)["w"], whole)
