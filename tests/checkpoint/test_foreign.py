"""Checkpoints of others: no file outside of them is opened, and one error names the fault.

Every manifest here is right in itself: the files are what their sender meant to send.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cmtmae_scale.checkpoint import layout
from cmtmae_scale.checkpoint.chunks import ChunkReader, load_fragments
from cmtmae_scale.checkpoint.find import find_checkpoint
from cmtmae_scale.checkpoint.index import INDEX
from cmtmae_scale.errors import CheckpointError
from cmtmae_scale.runtime.storage import digest
from tests.checkpoint.save_case import fragments, save

PART = layout.rank_file(0)
KEY = "model.encoder.w"  # 15 values


def sign(folder: Path, *names: str) -> None:
    """Write a manifest that is right for the files as they are now, and names these too."""
    files = json.loads((folder / layout.MANIFEST).read_text())["files"]
    for name in (*files, *names):
        path = folder / name
        if path.is_file():
            files[name] = {"size": path.stat().st_size, "sha256": digest(path)}
        else:
            files[name] = {"size": 0, "sha256": ""}
    (folder / layout.MANIFEST).write_text(layout.format_manifest(files))


def change(folder: Path, name: str, edit: Callable[[Any], Any]) -> None:
    """Edit a JSON file of a checkpoint and sign it."""
    tree = json.loads((folder / name).read_text())
    found = edit(tree)
    (folder / name).write_text(json.dumps(tree if found is None else found))
    sign(folder)


def set_chunks(*chunks: object) -> Callable[[Any], None]:
    return lambda tree: tree[KEY].update(chunks=list(chunks))


def set_entry(entry: object) -> Callable[[Any], None]:
    return lambda tree: tree.update({KEY: entry})


INDEXES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "no chunk": (set_chunks(), "has 0 values"),
    "gap at the start": (set_chunks([5, 10, PART]), "a gap"),
    "gap at the end": (set_chunks([0, 14, PART]), "has 14 values"),
    "overlap": (set_chunks([0, 10, PART], [5, 10, PART]), "an overlap"),
    "twice": (set_chunks([0, 15, PART], [0, 15, PART]), "an overlap"),
    "beyond the shape": (set_chunks([0, 16, PART]), "has 16 values"),
    "outside": (set_chunks([0, 15, "../" + PART]), "does not name"),
    "absolute": (set_chunks([0, 15, "/etc/passwd"]), "does not name"),
    "no shard": (set_chunks([0, 15, layout.STATE]), "does not name"),
    "unnamed": (set_chunks([0, 15, layout.rank_file(7)]), "does not name"),
    "huge": (
        lambda tree: tree[KEY].update(shape=[2**45], chunks=[[0, 2**45, PART]]),
        "more values than",
    ),
    "negative": (set_chunks([-1, 16, PART]), "does not give"),
    "empty chunk": (set_chunks([0, 0, PART], [0, 15, PART]), "does not give"),
    "float": (set_chunks([0.0, 15, PART]), "does not give"),
    "truth value": (set_chunks([False, 15, PART]), "does not give"),
    "text": (set_chunks(["0", 15, PART]), "does not give"),
    "number as a file": (set_chunks([0, 15, 3]), "does not give"),
    "more shards than there are": (set_chunks([0, 5, PART, 3]), "does not name"),
    "no number of shards": (set_chunks([0, 15, PART, 0]), "does not give"),
    "a text as their number": (set_chunks([0, 15, PART, "1"]), "does not give"),
    "no shard follows": (set_chunks([0, 5, layout.ENCODER, 3]), "no shard follows"),
    "pair": (set_chunks([0, 15]), "does not give"),
    "entry is a list": (set_entry([1]), "does not give"),
    "entry is null": (set_entry(None), "does not give"),
    "no shape": (set_entry({"chunks": []}), "does not give"),
    "shape is a number": (set_entry({"shape": 3, "chunks": []}), "does not give"),
    "a list": (lambda tree: [tree], "not a JSON object"),
}


@pytest.mark.parametrize("case", INDEXES)
def test_an_index_covers_every_tensor_exactly_once_from_named_shards(
    tmp_path: Path, case: str
) -> None:
    edit, message = INDEXES[case]
    folder = save(tmp_path / "c")
    change(folder, INDEX, edit)
    assert message in (layout.find_damage(folder) or "")
    with pytest.raises(CheckpointError, match="none of 1 checkpoints is intact"):
        find_checkpoint(tmp_path / "c", 0, 1)
    if message != "does not name" or case == "outside":
        with pytest.raises(CheckpointError, match=message):
            ChunkReader(folder)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int32])
@pytest.mark.parametrize("length", [1, 15, 20])
def test_a_chunk_is_what_the_index_names(tmp_path: Path, dtype: torch.dtype, length: int) -> None:
    folder = save(tmp_path / "c")
    tensors = load_file(folder / PART)
    tensors[f"{KEY}@0"] = torch.zeros(length, dtype=dtype)
    tensors["more"] = torch.zeros(99)  # bytes enough for what the index names
    save_file(tensors, folder / PART)
    sign(folder)
    assert layout.find_damage(folder) is None
    with pytest.raises(CheckpointError, match=rf"{KEY}@0 is "):
        load_fragments(folder, fragments(fill=False))


def link_to(target: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.unlink(missing_ok=True)
        path.symlink_to(target)

    return make


def make_pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def make_folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


KINDS = {
    "device": link_to("/dev/zero"),
    "pipe": make_pipe,
    "link out": link_to("/etc/hosts"),
    "folder": make_folder,
}
NAMES = (layout.MANIFEST, layout.STATE, INDEX, layout.ENCODER, PART, "more.bin")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_only_regular_files_in_the_folder_are_opened(
    tmp_path: Path, name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(tmp_path / "c")
    KINDS[kind](folder / name)
    if name != layout.MANIFEST:
        sign(folder, name)
    opened: list[str] = []
    whole = os.open
    monkeypatch.setattr(
        os, "open", lambda path, *rest, **k: opened.append(str(path)) or whole(path, *rest, **k)
    )
    found = layout.find_damage(folder)
    assert found is not None and "cannot be read" in found and name in found
    assert str(folder / name) not in opened


def set_state(group: str, key: str | None, value: object) -> Callable[[Any], None]:
    def edit(tree: Any) -> None:
        (tree if key is None else tree[group])[key or group] = value

    return edit


WRONG: list[tuple[str, str | None, object]] = [
    *(("task", None, value) for value in (None, 3, ["pre-training"], "other", {})),
    *(("config", None, value) for value in (None, [], "x", 1.5)),
    *(("versions", None, value) for value in (None, [], "1.0")),
    ("versions", "torch", 2),
    *(("world_size", None, value) for value in (None, "2", -1, 0, True, 2**70)),
    *(("index_digest", None, value) for value in (None, 7, [])),
    *(("classes", None, value) for value in ("cat", [1], None)),
    ("labels_digest", None, 7),
    *(("teacher_weights", None, value) for value in (None, [], {"": None}, {"": 7})),
    *(("progress", None, value) for value in (None, [], 3)),
    *(("progress", "step", value) for value in (None, "3", 3.5, -1, [3], True, 10**30)),
    *(("progress", key, "x") for key in ("position", "horizon", "end_step", "applied")),
    *(("skips", None, value) for value in (None, [])),
    *(("skips", "losses", value) for value in (None, 3, ["a"], [float("nan")], [10**400])),
    ("skips", "scheduled", {}),
    ("skips", "in_succession", None),
    *(("log_interval", None, value) for value in (None, [], {}, {"sums": {}, "counts": {"a": 1}})),
    *(("log_interval", "sums", {"a": value}) for value in (None, "1", float("nan"), 10**400)),
    *(("log_interval", "counts", {"a": value}) for value in (None, 0, -1, 1.5, True)),
]


@pytest.mark.parametrize(("group", "key", "value"), WRONG)
def test_a_state_of_wrong_types_is_one_error(
    tmp_path: Path, group: str, key: str | None, value: object
) -> None:
    folder = save(tmp_path / "c")
    change(folder, layout.STATE, set_state(group, key, value))
    with pytest.raises(CheckpointError, match=f"state.json: {group}.* name another") as raised:
        layout.read_state(folder)
    assert len(str(raised.value)) < 500 + len(str(folder))


@pytest.mark.parametrize(
    "text", ["[]", "3", "null", "[" * 100_000, '{"format": 1, "versions": []}', "{", "\xff"]
)
def test_a_state_that_is_no_state_is_one_error(tmp_path: Path, text: str) -> None:
    folder = save(tmp_path / "c")
    (folder / layout.STATE).write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError):
        layout.read_state(folder)


@pytest.mark.parametrize("value", [None, [3], {}, "4", 1e400, float("nan")])
def test_a_step_of_a_wrong_type_is_damage(tmp_path: Path, value: object) -> None:
    folder = save(tmp_path / "c").rename(tmp_path / "step-00000004")
    change(folder, layout.STATE, set_state("progress", "step", value))
    assert "progress.step=" in (layout.find_damage(folder) or "")


def test_deep_json_is_damage(tmp_path: Path) -> None:
    for name in (layout.MANIFEST, INDEX, layout.STATE):
        folder = save(tmp_path / name)
        for depth in (2_000, 100_000):
            (folder / name).write_text('{"files": ' + "[" * depth + "]" * depth + "}")
            if name != layout.MANIFEST:
                sign(folder)
            if name != layout.STATE or depth > 10_000:
                assert layout.find_damage(folder)


@pytest.mark.parametrize(
    "files",
    [
        {"..": {"size": 1, "sha256": "x"}},
        {".": {"size": 1, "sha256": "x"}},
        {"a/b": {"size": 1, "sha256": "x"}},
        {"a\nb": {"size": 1, "sha256": "x"}},
        {PART: None},
        {PART: [1, "x"]},
        {PART: {"size": "1", "sha256": "x"}},
        {PART: {"size": 1}},
        {PART: {"size": True, "sha256": "x"}},
        {PART: {"size": 9, "sha256": ["x"]}},
        {PART: {"size": 9, "sha256": ["x"], "block_bytes": 8}},
        {PART: {"size": 9, "sha256": ["x", 3], "block_bytes": 8}},
        {PART: {"size": 9, "sha256": ["x"], "block_bytes": 0}},
        {PART: {"size": 9, "sha256": ["x"], "block_bytes": "9"}},
    ],
)
def test_a_manifest_of_wrong_types_is_damage(tmp_path: Path, files: dict[str, Any]) -> None:
    folder = save(tmp_path / "c")
    own = layout.load_manifest(folder)
    (folder / layout.MANIFEST).write_text(layout.format_manifest(own | files))
    assert "manifest.json does not" in (layout.find_damage(folder) or "")
