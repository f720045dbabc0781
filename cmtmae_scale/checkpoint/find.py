"""Find the checkpoint that a run or a command continues from."""

import logging
from pathlib import Path

from cmtmae_scale.checkpoint import layout
from cmtmae_scale.errors import CheckpointError, StorageError
from cmtmae_scale.runtime.collectives import all_ranks_agree, broadcast_int, on_all_ranks
from cmtmae_scale.runtime.launch import World
from cmtmae_scale.runtime.lock import RunLock

logger = logging.getLogger(__name__)


def find_checkpoint(root: Path, rank: int, world_size: int) -> Path | None:
    """Return the newest checkpoint that every rank verifies; name and skip broken ones.

    All ranks check rank 0's list; each rank reads its share of the files. ``root`` is
    ``RUN_DIR/checkpoints``.

    Returns:
        The checkpoint's folder, or ``None`` if the run has never written one.

    Raises:
        CheckpointError: if every checkpoint is broken, or all of them are gone.
        StorageError: if none can be used, and the store failed while one was read.
    """
    has_failed = False
    steps = [layout.step_of(folder) or 0 for folder in layout.list_checkpoints(root)]
    count = broadcast_int(len(steps))
    for number in range(count):
        folder = layout.folder_of(root, broadcast_int(steps[number] if rank == 0 else 0))
        try:
            damage = layout.find_damage(folder, (rank, world_size))
        except StorageError as error:
            damage, has_failed = str(error), True
        if all_ranks_agree(damage is None):
            return folder
        if damage:
            logger.error("BROKEN CHECKPOINT %s: %s; trying the one before", folder, damage)
    if count and not all_ranks_agree(not has_failed):
        raise StorageError(
            f"{root}: none of {count} checkpoints can be used, and the store failed while they "
            "were read; see that it works and try the same command again"
        )
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
