"""One checkpoint from the shards of all ranks; the ranks exchange messages through files only.

A shard is the safetensors file that one rank writes. In the draft folder,
``rank-00001.safetensors.done`` marks a shard that is on storage and holds its size and SHA-256;
``.failed`` marks a shard that will never be written and holds the reason.
"""

import json
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from cmtmae_scale.checkpoint.chunks import INDEX, ChunkReader, index_chunks
from cmtmae_scale.checkpoint.layout import (
    ENCODER,
    FORMAT,
    MANIFEST,
    STATE,
    format_manifest,
    rank_file,
    replace_checkpoint,
)
from cmtmae_scale.checkpoint.tensor_file import Entry, write_tensors
from cmtmae_scale.config.derive import SIZES
from cmtmae_scale.errors import CheckpointError
from cmtmae_scale.runtime.storage import read_inside, read_json, sync, write_atomic

DONE, FAILED = ".done", ".failed"
ENCODERS = {"student": "model.encoder.", "momentum": "momentum."}
"""Prefix of the names of an encoder's tensors."""


def publish_checkpoint(
    draft: Path,
    target: Path,
    shards: dict[str, Any],
    state: dict[str, Any],
    require_lock: Callable[[], None],
) -> None:
    """Add index, state, encoder and manifest to the shards, and rename ``draft`` to ``target``.

    Args:
        draft: folder with all shards.
        target: the checkpoint's folder.
        shards: from ``await_shards``.
        state: what is saved beside tensors; ``format`` is added.
        require_lock: called right before the draft is renamed; raises if another launch owns the
            run's folder.

    Raises:
        CheckpointError: if the chunks leave a gap.
        LockLostError: from ``require_lock``.
        OSError: if the store refuses; the older checkpoints are unchanged.
    """
    files = dict(shards)
    files[INDEX] = write_atomic(draft / INDEX, json.dumps(index_chunks(draft, shards)))
    files[STATE] = write_atomic(draft / STATE, json.dumps({"format": FORMAT} | state, indent=1))
    files[ENCODER] = write_encoder(draft, draft / ENCODER, "student")
    write_atomic(draft / MANIFEST, format_manifest(files))
    sync(draft)
    require_lock()
    replace_checkpoint(draft, target)


def write_encoder(folder: Path, file: Path, weights: str) -> dict[str, Any]:
    """Write an encoder under timm's names, one tensor at a time in memory.

    Where a run replaces sizes of its architecture, the file's metadata holds them under
    ``student``: no tensor shows the number of heads. ``image_size`` is there where no positional
    embedding shows the grid.

    Args:
        folder: a checkpoint, or a draft that has its index, state and shards.
        file: the safetensors file to write.
        weights: ``student`` or ``momentum``.

    Returns:
        The file's size and SHA-256.
    """
    prefix = ENCODERS[weights]
    with ChunkReader(folder) as reader:
        entries = [
            Entry(key.removeprefix(prefix), reader.shape(key), partial(reader.read_tensor, key))
            for key in reader.index
            if key.startswith(prefix)
        ]
        has_positions = f"{prefix}pos_embed" in reader.index
        metadata = {"format": "pt"} | student_metadata(folder, has_positions)
        return write_tensors(file, entries, metadata)


def student_metadata(folder: Path, has_positions: bool) -> dict[str, str]:
    """Return what the tensors of a checkpoint's student do not show; see ``write_encoder``."""
    config = read_json(read_inside(folder, folder / STATE)).get("config", {})
    student, size = config.get("student", {}), config.get("views", {}).get("image_size")
    found = {} if has_positions or size is None else {"image_size": str(size)}
    if any(student.get(name) for name in SIZES):
        found["student"] = json.dumps({name: student.get(name) for name in ("arch", *SIZES)})
    return found


def mark_shard_done(draft: Path, rank: int, facts: dict[str, Any]) -> None:
    """Publish that a rank's shard is on storage."""
    write_atomic(draft / (rank_file(rank) + DONE), json.dumps(facts))


def mark_shard_failed(draft: Path, rank: int, reason: str) -> None:
    """Delete a rank's shard and publish that the shard will not be written."""
    shard = draft / rank_file(rank)
    shard.unlink(missing_ok=True)
    write_atomic(shard.with_name(shard.name + FAILED), reason)


def await_shards(
    draft: Path, writers: Iterable[int], abandoned: threading.Event, timeout_s: float
) -> dict[str, Any]:
    """Wait for the shard of every rank that writes; runs on rank 0, in the background.

    Args:
        draft: the folder that the ranks write to.
        writers: the ranks that write a shard.
        abandoned: set when a rank is known to have failed.
        timeout_s: seconds after which a missing shard fails the save.

    Returns:
        Size and SHA-256 of every shard by its name.

    Raises:
        CheckpointError: if a shard does not arrive.
        OSError: if the store refuses.
    """
    shards: dict[str, Any] = {}
    missing = [rank_file(rank) for rank in writers]
    limit, pause_s = time.monotonic() + timeout_s, 0.01
    given_up = False
    while True:
        present = {path.name for path in draft.iterdir()}
        for name in [name for name in missing if name + DONE in present]:
            mark = draft / (name + DONE)
            shards[name] = json.loads(mark.read_text())
            mark.unlink()
            missing.remove(name)
        if not missing:
            return shards
        for name in missing:
            if name + FAILED in present:
                raise CheckpointError(f"{name}: {(draft / (name + FAILED)).read_text()}")
        if time.monotonic() > limit:
            raise CheckpointError(f"{missing[0]} did not arrive within {timeout_s:.0f} s")
        if given_up:
            raise CheckpointError(f"{missing[0]} did not arrive: its rank failed")
        # Check the folder once more: a failed rank may have published the reason meanwhile.
        given_up = abandoned.wait(pause_s)
        pause_s = min(1.5 * pause_s, 0.5)
