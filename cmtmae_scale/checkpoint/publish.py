"""From the ranks' parts to one published checkpoint; the ranks talk through files only.

In a draft folder, ``rank-00001.safetensors.done`` says that a part lies on storage and holds its
size and SHA-256; ``.failed`` says that it never will and why.
"""

import json
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

from cmtmae_scale.checkpoint.chunks import INDEX, ChunkReader, build_index
from cmtmae_scale.checkpoint.layout import (
    ENCODER,
    MANIFEST,
    STATE,
    manifest_text,
    put_in_place,
    rank_file,
)
from cmtmae_scale.checkpoint.tensor_file import Entry, write_tensors
from cmtmae_scale.errors import CheckpointError
from cmtmae_scale.runtime.storage import sync, write_atomic

DONE, FAILED = ".done", ".failed"
ENCODERS = {"student": "model.encoder.", "momentum": "momentum."}
"""Prefix of an encoder's states."""


def publish(draft: Path, target: Path, parts: dict[str, Any], state: dict[str, Any]) -> None:
    """Add index, state, encoder and manifest to the ranks' parts, and rename.

    Args:
        draft: folder with every rank's part.
        target: the checkpoint's folder.
        parts: size and SHA-256 of every part, as ``await_parts`` gives them.
        state: what is saved beside tensors.

    Raises:
        CheckpointError: if the parts leave a gap.
        OSError: if the store refuses; the older checkpoints stand.
    """
    files = dict(parts)
    files[INDEX] = write_atomic(draft / INDEX, json.dumps(build_index(draft, parts)))
    files[STATE] = write_atomic(draft / STATE, json.dumps(state, indent=1))
    files[ENCODER] = write_encoder(draft, draft / ENCODER, "student")
    write_atomic(draft / MANIFEST, manifest_text(files))
    sync(draft)
    put_in_place(draft, target)


def write_encoder(folder: Path, file: Path, weights: str) -> dict[str, Any]:
    """Write an encoder under timm's names, one tensor at a time in memory.

    Args:
        folder: a checkpoint, or a draft that has its index and parts.
        file: the safetensors file to write.
        weights: ``student`` or ``momentum``.

    Returns:
        Its size and SHA-256.
    """
    prefix = ENCODERS[weights]
    with ChunkReader(folder) as reader:
        entries = [
            Entry(key.removeprefix(prefix), reader.shape(key), partial(reader.read_whole, key))
            for key in reader.index
            if key.startswith(prefix)
        ]
        return write_tensors(file, entries, {"format": "pt"})


def seal_part(draft: Path, rank: int, facts: dict[str, Any]) -> None:
    """Tell rank 0 that a rank's chunks lie on storage."""
    write_atomic(draft / (rank_file(rank) + DONE), json.dumps(facts))


def give_up_part(draft: Path, rank: int, reason: str) -> None:
    """Free a part's space and tell rank 0 that it will not come."""
    part = draft / rank_file(rank)
    part.unlink(missing_ok=True)
    write_atomic(part.with_name(part.name + FAILED), reason)


def await_parts(
    draft: Path, world_size: int, abandoned: threading.Event, timeout_s: float
) -> dict[str, Any]:
    """Wait for every rank's part; runs on rank 0, in the background.

    Args:
        draft: the folder that the ranks write to.
        world_size: number of ranks.
        abandoned: set when it has become known that a part will not come.
        timeout_s: seconds after which a part is given up.

    Returns:
        Size and SHA-256 of every part by its name.

    Raises:
        CheckpointError: if a part does not arrive.
        OSError: if the store refuses.
    """
    parts: dict[str, Any] = {}
    missing = [rank_file(rank) for rank in range(world_size)]
    limit, pause_s = time.monotonic() + timeout_s, 0.01
    given_up = False
    while True:
        present = {path.name for path in draft.iterdir()}
        for name in [name for name in missing if name + DONE in present]:
            mark = draft / (name + DONE)
            parts[name] = json.loads(mark.read_text())
            mark.unlink()
            missing.remove(name)
        if not missing:
            return parts
        for name in missing:
            if name + FAILED in present:
                raise CheckpointError(f"{name}: {(draft / (name + FAILED)).read_text()}")
        if time.monotonic() > limit:
            raise CheckpointError(f"{missing[0]} did not arrive within {timeout_s:.0f} s")
        if given_up:
            raise CheckpointError(f"{missing[0]} did not arrive: its rank failed")
        # Then one more look: a rank that failed may have said why meanwhile.
        given_up = abandoned.wait(pause_s)
        pause_s = min(1.5 * pause_s, 0.5)
