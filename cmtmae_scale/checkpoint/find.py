"""Find the checkpoint that a run or a command continues from."""

import json
import logging
from pathlib import Path

from cmtmae_scale.checkpoint import layout
from cmtmae_scale.errors import CheckpointError
from cmtmae_scale.runtime.collectives import (
    all_ranks_agree,
    broadcast_int,
    broadcast_text,
    gather_texts,
    on_all_ranks,
)
from cmtmae_scale.runtime.launch import World
from cmtmae_scale.runtime.lock import RunLock

logger = logging.getLogger(__name__)


def find_checkpoint(root: Path, rank: int, world_size: int) -> Path | None:
    """Return the newest checkpoint that is intact; name and skip broken ones. A collective.

    ``root`` is ``RUN_DIR/checkpoints``.

    Returns:
        The checkpoint's folder, or ``None`` if the run has never written one.

    Raises:
        CheckpointError: if every checkpoint is broken, or all of them are gone.
    """
    steps = [layout.step_of(folder) or 0 for folder in layout.list_checkpoints(root)]
    count = broadcast_int(len(steps))
    for number in range(count):
        folder = layout.folder_of(root, broadcast_int(steps[number] if rank == 0 else 0))
        damage = verify_together(folder, rank, world_size)
        if not damage:
            return folder
        if rank == 0:
            logger.error("BROKEN CHECKPOINT %s: %s; trying the one before", folder, damage)
    if count:
        raise CheckpointError(
            f"{root}: none of {count} checkpoints is intact; restore one, or use another "
            "run.output_dir"
        )
    if not all_ranks_agree(not (root / layout.LATEST).exists()):
        raise CheckpointError(
            f"{root}: the file {layout.LATEST} names a checkpoint, but there is none; restore one, "
            f"or delete {root} to start anew"
        )
    return None


def verify_together(folder: Path, rank: int, world_size: int) -> str:
    """Verify a checkpoint on all ranks; a collective.

    Rank 0 compares names, sizes and index, and broadcasts the digests; each rank reads its share of
    the files, and no other file.

    Returns:
        What is damaged, the same on every rank; empty if the checkpoint is intact.
    """
    damage, digests = "", {}
    if rank == 0:
        damage = layout.find_damage(folder, (-1, 1)) or ""
        if not damage:
            files = layout.load_manifest(folder)
            digests = {name: facts["sha256"] for name, facts in sorted(files.items())}
    damage, digests = json.loads(broadcast_text(json.dumps([damage, digests])))
    mine = dict(list(digests.items())[rank::world_size])
    return damage or next(filter(None, gather_texts(layout.find_altered(folder, mine) or "")), "")


def find_resume_checkpoint(run_dir: Path, world: World, lock: RunLock | None = None) -> Path | None:
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
