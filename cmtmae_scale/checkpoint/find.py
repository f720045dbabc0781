"""Find the checkpoint that a run or a command continues from."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cmtmae_scale.checkpoint import layout
from cmtmae_scale.errors import CheckpointError, StorageError
from cmtmae_scale.runtime.collectives import (
    all_ranks_agree,
    broadcast_text,
    gather_texts,
    on_all_ranks,
)
from cmtmae_scale.runtime.launch import World
from cmtmae_scale.runtime.lock import RunLock
from cmtmae_scale.runtime.storage import list_names

logger = logging.getLogger(__name__)


def find_checkpoint(
    root: Path, rank: int, world_size: int, otherwise: str | None = None, hashes: bool = True
) -> Path | None:
    """Return the newest intact checkpoint; log and skip broken checkpoints. A collective.

    Args:
        root: ``RUN_DIR/checkpoints``.
        rank: this rank.
        world_size: number of ranks.
        otherwise: remedy if no checkpoint can be restored; ``None``: that of a run that resumes.
        hashes: read all bytes; otherwise only compare sizes and read small files.

    Returns:
        The checkpoint's folder, or ``None`` if the run has never written one.

    Raises:
        CheckpointError: if every checkpoint is broken, or all of them are gone.
        StorageError: if they cannot be listed, or none can be used and the store failed while one
            was read.
    """
    has_failed = False
    steps = list_on_first_rank(root, rank)
    count = len(steps)
    for step in steps:
        folder = layout.folder_of(root, step)
        damage, is_unknown = verify_together(folder, rank, world_size, hashes)
        if not damage:
            return folder
        has_failed = has_failed or is_unknown
        if rank == 0:
            logger.error("BROKEN CHECKPOINT %s: %s; trying the previous checkpoint", folder, damage)
    if has_failed:
        raise StorageError(
            f"{root}: none of {count} checkpoints can be used, and the store failed while they "
            "were read; see that it works and try the same command again"
        )
    if count:
        raise CheckpointError(
            f"{root}: none of {count} checkpoints is intact; restore one, or "
            f"{otherwise or 'use another run.output_dir'}"
        )
    if not all_ranks_agree(not on_all_ranks(lambda: layout.LATEST in list_names(root))):
        raise describe_loss(root, otherwise)
    return None


def describe_loss(root: Path, otherwise: str | None = None) -> CheckpointError:
    """Return the error for a folder whose ``latest`` names a checkpoint, but which has none."""
    return CheckpointError(
        f"{root}: the file {layout.LATEST} names a checkpoint, but there is none; restore one, "
        f"or {otherwise or f'delete {root} to start anew'}"
    )


def list_on_first_rank(root: Path, rank: int) -> list[int]:
    """Return the steps of the checkpoints that rank 0 finds, highest first; a collective.

    Caches of a network file system may differ between machines, so no other rank lists them.

    Raises:
        StorageError: on every rank, if the store fails.
    """

    def find_steps() -> list[int]:
        return [layout.step_of(folder) or 0 for folder in layout.list_checkpoints(root)]

    steps = on_all_ranks(lambda: find_steps() if rank == 0 else [])
    return json.loads(broadcast_text(json.dumps(steps)))


def verify_together(folder: Path, rank: int, world_size: int, hashes: bool) -> tuple[str, bool]:
    """Verify a checkpoint on all ranks; a collective.

    Rank 0 compares names, sizes and index, and broadcasts the manifest; with ``hashes`` each rank
    reads its share of the bytes, and no other file, so that all ranks together read each byte once.

    Returns:
        What is damaged, empty if the checkpoint is intact, and whether the store failed, so that it
        is unknown whether the checkpoint is damaged; the same on every rank.
    """
    files: dict[str, Any] = {}

    def compare() -> str | None:
        damage = layout.find_damage(folder, hashes=False)
        if damage is None:
            try:
                files.update(layout.load_manifest(folder))
            except (OSError, ValueError) as error:  # it was deleted in the meantime
                return layout.describe_unreadable(error)
        return damage

    first = attempt(compare) if rank == 0 else ("", False)
    (damage, is_unknown), files = json.loads(broadcast_text(json.dumps([first, files])))
    if damage or not hashes:
        return damage, is_unknown
    mine = layout.share_blocks(files, rank, world_size)
    found = attempt(lambda: layout.find_altered(folder, mine))
    everyone = [json.loads(text) for text in gather_texts(json.dumps(found))]
    return next(((text, unknown) for text, unknown in everyone if text), ("", False))


def attempt(check: Callable[[], str | None]) -> tuple[str, bool]:
    """Return the damage that a check finds, empty for none, and whether the store failed."""
    try:
        return check() or "", False
    except StorageError as error:
        return str(error), True


def find_resume_checkpoint(run_dir: Path, world: World, lock: RunLock | None) -> Path | None:
    """Remove what killed launches left behind, and find the newest checkpoint; a collective.

    Args:
        run_dir: the run's folder.
        world: place of this process.
        lock: the run's lock, verified before anything is removed; rank 0 has it.

    Raises:
        LockLostError: on every rank, if another launch took the run's folder over.
        CheckpointError: see ``find_checkpoint``.
    """
    root = run_dir / "checkpoints"
    root.mkdir(exist_ok=True)

    def sweep() -> None:
        if lock is not None:
            lock.require()
        if world.rank == 0:
            layout.sweep(root)

    on_all_ranks(sweep)
    return find_checkpoint(root, world.rank, world.world_size)
