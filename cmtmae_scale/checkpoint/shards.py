"""One checkpoint from the shards of all ranks; the ranks exchange messages through files only.

A shard is the safetensors file that one rank writes. In the draft folder,
``rank-00001.safetensors.done`` marks a shard that is on storage: it holds size and SHA-256, and the
shard's chunks, from which rank 0 builds the index. ``.failed`` marks a shard that will never be
written and holds the reason.
"""

import hashlib
import json
import logging
import math
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cmtmae_scale.checkpoint.chunks import ChunkReader, HostChunk
from cmtmae_scale.checkpoint.encoder_copy import ProcessError, copy_encoder_apart
from cmtmae_scale.checkpoint.index import INDEX
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

logger = logging.getLogger(__name__)

DONE, FAILED = ".done", ".failed"
ENCODERS = {"student": "model.encoder.", "momentum": "momentum."}
"""Prefix of the names of an encoder's tensors."""

Shapes = Mapping[str, tuple[int, ...]]
"""Shape of every tensor of a run, in the same order on every rank."""


class Shard(NamedTuple):
    """What a rank publishes about its shard."""

    facts: dict[str, Any]
    """Size and SHA-256."""
    tensors: str
    """From ``hash_shapes``."""
    chunks: np.ndarray
    """Number of the tensor, offset and length of every chunk, int64 ``[chunks, 3]``."""


def describe_shard(facts: dict[str, Any], chunks: Sequence[HostChunk], shapes: Shapes) -> Shard:
    """Return what rank 0 needs to know about a shard that was written."""
    numbers = {key: number for number, key in enumerate(shapes)}
    rows = [(numbers[chunk.key], chunk.offset, chunk.values.numel()) for chunk in chunks]
    return Shard(facts, hash_shapes(shapes), np.array(rows, np.int64).reshape(-1, 3))


def hash_shapes(shapes: Shapes) -> str:
    """Return the SHA-256 of names, shapes and their order, which number the tensors."""
    return hashlib.sha256(json.dumps(list(shapes.items())).encode()).hexdigest()


def build_index(shards: Mapping[int, Shard], shapes: Shapes) -> dict[str, Any]:
    """Return the index of the shards of all ranks; opens no shard.

    Raises:
        CheckpointError: if a value of a tensor is in no chunk or in several, or if ranks hold
            different tensors.
    """
    expected = hash_shapes(shapes)
    others = [rank for rank, shard in shards.items() if shard.tensors != expected]
    if others:
        raise CheckpointError(f"rank {others[0]} holds other tensors than rank 0")
    tables = [shard.chunks for shard in shards.values()]
    tensor, offset, length = np.concatenate([np.empty((0, 3), np.int64), *tables]).T
    rank = np.repeat(list(shards), [len(table) for table in tables])
    order = np.lexsort((offset, tensor))
    tensor, offset, length, rank = (column[order] for column in (tensor, offset, length, rank))
    continues = np.append(False, tensor[1:] == tensor[:-1])[: len(tensor)]
    refuse_uncovered(tensor, offset, length, continues, shapes)
    joins = continues & (length == np.roll(length, 1)) & (rank == np.roll(rank, 1) + 1)
    first = np.flatnonzero(~joins)
    counts = np.diff(np.append(first, len(tensor)))
    spans = np.stack([*(column[first] for column in (tensor, offset, length, rank)), counts])
    index: dict[str, Any] = {key: {"shape": shape, "chunks": []} for key, shape in shapes.items()}
    entries = list(index.values())
    for number, low, size, writer, ranks in spans.T.tolist():
        span = [low, size, rank_file(writer)]
        entries[number]["chunks"].append([*span, ranks] if ranks > 1 else span)
    return index


def refuse_uncovered(
    tensor: np.ndarray,
    offset: np.ndarray,
    length: np.ndarray,
    continues: np.ndarray,
    shapes: Shapes,
) -> None:
    """Refuse chunks that omit a value, or hold it twice.

    Args:
        tensor: number of the tensor of each chunk, ascending, ``[chunks]``.
        offset: first value of each chunk, ascending within a tensor.
        length: values of each chunk.
        continues: whether the chunk before is of the same tensor.
        shapes: of all tensors.

    Raises:
        CheckpointError: names the first affected tensor.
    """
    end = offset + length
    reached = np.zeros(len(shapes), np.int64)
    np.maximum.at(reached, tensor, end)
    is_wrong = reached != [math.prod(shape) for shape in shapes.values()]
    is_wrong[tensor[offset != np.where(continues, np.roll(end, 1), 0)]] = True
    if is_wrong.any():
        raise CheckpointError(
            f"the shards do not hold every value of {list(shapes)[is_wrong.argmax()]} exactly "
            "once; the save is incomplete"
        )


def publish_checkpoint(
    draft: Path,
    target: Path,
    shards: Mapping[int, Shard],
    shapes: Shapes,
    state: dict[str, Any],
    require_lock: Callable[[], None],
) -> None:
    """Add index, state, encoder and manifest to the shards, and rename ``draft`` to ``target``.

    Args:
        draft: folder with all shards.
        target: the checkpoint's folder.
        shards: of every rank that wrote one, from ``await_shards``.
        shapes: of all tensors.
        state: what is saved besides tensors; ``format`` is added.
        require_lock: called right before the draft is renamed; raises if another launch owns the
            run's folder.

    Raises:
        CheckpointError: see ``build_index``.
        LockLostError: from ``require_lock``.
        OSError: if the store refuses; the older checkpoints are unchanged.
    """
    files = {rank_file(rank): shard.facts for rank, shard in shards.items()}
    files[INDEX] = write_atomic(draft / INDEX, json.dumps(build_index(shards, shapes)))
    files[STATE] = write_atomic(draft / STATE, json.dumps({"format": FORMAT} | state, indent=1))
    files[ENCODER] = add_encoder(draft, len(shards), shapes)
    write_atomic(draft / MANIFEST, format_manifest(files))
    sync(draft)
    require_lock()
    replace_checkpoint(draft, target)


def add_encoder(draft: Path, num_shards: int, names: Collection[str]) -> dict[str, Any]:
    """Write the student's encoder beside the shards; return the file's size and SHA-256.

    One shard has one chunk per tensor, and this thread copies them; the many chunks of several
    shards are copied by another process (``encoder_copy.py``).
    """
    if num_shards > 1:
        prefix, metadata = ENCODERS["student"], encoder_metadata(draft, names)
        try:
            return copy_encoder_apart(draft, draft / ENCODER, prefix, metadata)
        except ProcessError as error:
            logger.warning(
                "the process that copies the encoder of a checkpoint failed (%s); a thread of "
                "rank 0 copies it, which may delay steps; check that this node has memory and "
                "processes left",
                error,
            )
    return write_encoder(draft, draft / ENCODER, "student")


def write_encoder(folder: Path, file: Path, weights: str) -> dict[str, Any]:
    """Write an encoder under timm's names, one tensor at a time in memory.

    If a run replaces sizes of its architecture, the file's metadata holds them under ``student``,
    since no tensor shows the number of heads. The metadata holds ``image_size`` if no positional
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
        return write_tensors(file, entries, encoder_metadata(folder, reader.index))


def encoder_metadata(folder: Path, names: Collection[str]) -> dict[str, str]:
    """Return the metadata of an encoder's file: what its tensors do not show.

    Args:
        folder: a checkpoint, or a draft that has its state.
        names: of the checkpoint's tensors.
    """
    config = read_json(read_inside(folder, folder / STATE)).get("config", {})
    student, size = config.get("student", {}), config.get("views", {}).get("image_size")
    found = {"format": "pt"}
    if f"{ENCODERS['student']}pos_embed" not in names and size is not None:
        found["image_size"] = str(size)
    if any(student.get(name) for name in SIZES):
        found["student"] = json.dumps({name: student.get(name) for name in ("arch", *SIZES)})
    return found


def mark_shard_done(draft: Path, rank: int, shard: Shard) -> None:
    """Publish that a rank's shard is on storage."""
    mark = json.dumps([shard.facts, shard.tensors, shard.chunks.ravel().tolist()])
    write_atomic(draft / (rank_file(rank) + DONE), mark)


def read_mark(path: Path) -> Shard:
    """Read what ``mark_shard_done`` wrote."""
    facts, tensors, chunks = json.loads(path.read_text())
    return Shard(facts, tensors, np.array(chunks, np.int64).reshape(-1, 3))


def mark_shard_failed(draft: Path, rank: int, reason: str) -> None:
    """Delete a rank's shard and publish that the shard will not be written."""
    shard = draft / rank_file(rank)
    shard.unlink(missing_ok=True)
    write_atomic(shard.with_name(shard.name + FAILED), reason)


def await_shards(
    draft: Path, writers: Iterable[int], abandoned: threading.Event, timeout_s: float
) -> dict[int, Shard]:
    """Wait for the shard of every rank that writes; runs on rank 0, in the background.

    Args:
        draft: the folder that the ranks write to.
        writers: the ranks that write a shard.
        abandoned: set when a rank is known to have failed.
        timeout_s: seconds after which a missing shard fails the save.

    Returns:
        The shards by rank.

    Raises:
        CheckpointError: if a shard does not arrive.
        OSError: if the store refuses.
    """
    shards: dict[int, Shard] = {}
    missing = {rank_file(rank): rank for rank in writers}
    limit, pause_s = time.monotonic() + timeout_s, 0.01
    given_up = False
    while True:
        present = {path.name for path in draft.iterdir()}
        for name in [name for name in missing if name + DONE in present]:
            mark = draft / (name + DONE)
            shards[missing.pop(name)] = read_mark(mark)
            mark.unlink()
        if not missing:
            return shards
        for name in missing:
            if name + FAILED in present:
                raise CheckpointError(f"{name}: {(draft / (name + FAILED)).read_text()}")
        if time.monotonic() > limit:
            raise CheckpointError(f"{next(iter(missing))} did not arrive within {timeout_s:.0f} s")
        if given_up:
            raise CheckpointError(f"{next(iter(missing))} did not arrive: its rank failed")
        # Check the folder once more: a failed rank may have published the reason since.
        given_up = abandoned.wait(pause_s)
        pause_s = min(1.5 * pause_s, 0.5)
