"""Which checkpoint a run continues from."""

import logging
from pathlib import Path

from cmtmae_scale.checkpoint import layout
from cmtmae_scale.errors import CheckpointError
from cmtmae_scale.runtime.collectives import agree_all, from_first

logger = logging.getLogger(__name__)


def find_checkpoint(root: Path, rank: int, world_size: int) -> Path | None:
    """Newest checkpoint that every rank finds intact; broken ones are named and passed over.

    The ranks go through rank 0's list, and each reads its share of the digests.

    Args:
        root: ``RUN_DIR/checkpoints``.
        rank: this rank.
        world_size: number of ranks.

    Returns:
        Its folder, or ``None`` if none was ever written.

    Raises:
        CheckpointError: if there are some, or were, but none is intact.
    """
    steps = [layout.step_of(folder) or 0 for folder in layout.candidates(root)]
    count = from_first(len(steps))
    for number in range(count):
        folder = layout.folder_of(root, from_first(steps[number] if rank == 0 else 0))
        problem = layout.fault(folder, (rank, world_size))
        if agree_all(problem is None):
            return folder
        if problem:
            logger.error("BROKEN CHECKPOINT %s: %s; trying the one before", folder, problem)
    if count:
        raise CheckpointError(
            f"{root}: none of {count} checkpoints is intact; restore one, or use another run.output_dir"
        )
    if not agree_all(not (root / layout.LATEST).exists()):
        raise CheckpointError(
            f"{root}: the file {layout.LATEST} says that there were checkpoints, but there is "
            f"none; restore one, or delete {root} to start anew"
        )
    return None


def newest_intact(root: Path) -> Path:
    """Newest intact checkpoint of a run that may be going on; for one process, changes nothing.

    Raises:
        CheckpointError: if there is none.
    """
    folder = find_checkpoint(root, 0, 1)
    if folder is None:
        raise CheckpointError(f"{root}: no checkpoint yet; train first")
    return folder
