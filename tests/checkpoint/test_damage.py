"""Damage is found and reported, and nothing planted in a checkpoint ever runs."""

import errno
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cmtmae_scale.checkpoint import layout, tensor_file
from cmtmae_scale.checkpoint.chunks import load_fragments
from cmtmae_scale.checkpoint.find import find_checkpoint
from cmtmae_scale.checkpoint.index import INDEX
from cmtmae_scale.errors import EXIT_CONFIG, EXIT_STOPPED, CheckpointError, StorageError
from cmtmae_scale.export.encoder import export_encoder
from cmtmae_scale.runtime.storage import digest
from tests.checkpoint.save_case import fragments, save

FLIPS = 1000
PART = layout.rank_file(0)


def test_each_of_a_thousand_flipped_bits_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_file, "BLOCK_BYTES", 150)
    folder = save(tmp_path / "c", ranks=2)
    assert len(layout.load_manifest(folder)[PART]["sha256"]) > 2  # the JSON files have one
    assert layout.find_damage(folder) is None
    files = sorted(folder.iterdir())
    generator = np.random.default_rng(0)
    missed = []
    for number in range(FLIPS):
        path = files[number % len(files)]  # small files as often as large ones
        original = path.read_bytes()
        changed = bytearray(original)
        place, bit = int(generator.integers(len(changed))), int(generator.integers(8))
        changed[place] ^= 1 << bit
        path.write_bytes(changed)
        if layout.find_damage(folder) is None:
            missed.append((path.name, place, bit))
        path.write_bytes(original)
    print(f"{FLIPS - len(missed)} of {FLIPS} flipped bits found in {len(files)} files")
    assert not missed
    assert layout.find_damage(folder) is None


def other_manifest(folder: Path) -> None:
    """A manifest that is right in itself, of a checkpoint of another world size."""
    other = save(folder.parent / "other", ranks=2)
    (other / layout.MANIFEST).rename(folder / layout.MANIFEST)
    shutil.rmtree(other.parent)


def half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def space(folder: Path) -> None:
    """A byte less, and JSON that means the same."""
    text = (folder / layout.MANIFEST).read_text()
    (folder / layout.MANIFEST).write_text(text.replace(": ", ":", 1))


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def unnamed(folder: Path) -> None:
    """A manifest with a right digest that lacks the state."""
    files = layout.load_manifest(folder)
    del files[layout.STATE]
    (folder / layout.MANIFEST).write_text(layout.format_manifest(files))


def outside(folder: Path) -> None:
    """A manifest with a right digest that points out of the folder."""
    files = layout.load_manifest(folder)
    files["../x"] = files[PART]
    shutil.copy(folder / PART, folder.parent / "x")
    (folder / layout.MANIFEST).write_text(layout.format_manifest(files))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "part absent": (lambda f: (f / PART).unlink(), f"{PART} is absent"),
    "part cut": (lambda f: half(f / PART), f"{PART} has .* bytes, but .* in its manifest"),
    "part zeroed": (lambda f: zero(f / PART), f"{PART} differs from its SHA-256"),
    "part flipped": (lambda f: flip(f / PART), f"{PART} differs from its SHA-256"),
    "encoder flipped": (lambda f: flip(f / layout.ENCODER), "encoder.* differs"),
    "index absent": (lambda f: (f / INDEX).unlink(), "index.json is absent"),
    "state cut": (lambda f: half(f / layout.STATE), "state.json has"),
    "manifest absent": (lambda f: (f / layout.MANIFEST).unlink(), "manifest.json is absent"),
    "manifest empty": (lambda f: (f / layout.MANIFEST).write_text(""), "is not a manifest"),
    "manifest zeroed": (lambda f: zero(f / layout.MANIFEST), "is not a manifest"),
    "manifest a list": (lambda f: (f / layout.MANIFEST).write_text("[]"), "is not a manifest"),
    "manifest respelled": (space, "differs from its own SHA-256"),
    "another world's manifest": (other_manifest, "index.json has"),
    "state not in the manifest": (unnamed, "does not name the files of a checkpoint"),
    "manifest points outside": (outside, "does not name the files of a checkpoint"),
    "empty folder": (empty, "manifest.json is absent"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_broken_checkpoint_is_named_and_the_one_before_is_used(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "c"
    older, newer = save(root, 1), save(root, 2)
    break_it, message = DAMAGES[damage]
    break_it(newer)
    assert find_checkpoint(root, 0, 1) == older
    (line,) = caplog.messages
    assert line.startswith(f"BROKEN CHECKPOINT {newer}: ")
    assert line.endswith("; trying the previous checkpoint")
    assert re.search(message, line)
    break_it(older)
    with pytest.raises(CheckpointError, match="none of 2 checkpoints is intact") as raised:
        find_checkpoint(root, 0, 1)
    assert raised.value.exit_code == EXIT_CONFIG


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ESHUTDOWN])
def test_a_store_that_fails_while_checkpoints_are_read_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    older, newer = save(tmp_path, 1), save(tmp_path, 2)
    failing, real = [newer], layout.digest

    def digest(path: Path, *rest: Any) -> str:
        if path.parent in failing:
            raise OSError(number, os.strerror(number), str(path))
        return real(path, *rest)

    monkeypatch.setattr(layout, "digest", digest)
    assert find_checkpoint(tmp_path, 0, 1) == older
    assert f"BROKEN CHECKPOINT {newer}: " in caplog.text and os.strerror(number) in caplog.text
    failing.append(older)
    with pytest.raises(StorageError, match="none of 2 checkpoints can be used") as raised:
        find_checkpoint(tmp_path, 0, 1)
    assert raised.value.exit_code == EXIT_STOPPED


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOENT])
def test_a_manifest_that_goes_away_while_it_is_read_is_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    older, newer = save(tmp_path, 1), save(tmp_path, 2)
    real, reads = layout.load_manifest, []

    def load_manifest(folder: Path) -> dict[str, Any]:
        reads.append(folder)
        if folder == newer and reads.count(newer) == 2:  # a run in progress deletes it
            raise OSError(number, os.strerror(number), str(folder / layout.MANIFEST))
        return real(folder)

    monkeypatch.setattr(layout, "load_manifest", load_manifest)
    assert find_checkpoint(tmp_path, 0, 1) == older


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.marker),)


OURS = [INDEX, layout.STATE, layout.MANIFEST, PART, layout.ENCODER]
PLANTED = ["x.pt", "x.pkl", ".metadata", "data.pkl", "state.pkl", "rank-00001.safetensors"]


@pytest.mark.parametrize("rehashed", [False, True], ids=["", "with a right manifest"])
@pytest.mark.parametrize("name", [*PLANTED, *OURS])
def test_a_planted_pickle_never_runs(tmp_path: Path, name: str, rehashed: bool) -> None:
    root, marker = tmp_path / "c", tmp_path / "it ran"
    folder = save(root)
    (folder / name).write_bytes(pickle.dumps(Bomb(marker)))
    if rehashed and name != layout.MANIFEST:
        files = json.loads((folder / layout.MANIFEST).read_text())["files"]
        facts = {"size": (folder / name).stat().st_size, "sha256": digest(folder / name)}
        (folder / layout.MANIFEST).write_text(layout.format_manifest(files | {name: facts}))
    try:
        found = find_checkpoint(root, 0, 1)
        assert found == folder
        load_fragments(folder, fragments(fill=False))
        layout.read_state(folder)
        accepted = True
    except CheckpointError:
        accepted = False
    with pytest.raises(CheckpointError):
        export_encoder(folder, tmp_path / "out", "student")  # this tiny state has no config
    assert accepted == (name in PLANTED or (rehashed and name == layout.ENCODER))
    assert not marker.exists()
    pickle.loads(pickle.dumps(Bomb(marker)))
    assert marker.exists(), "the bomb itself works"
