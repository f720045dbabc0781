"""Saves in the background, one in flight, and never at the cost of the run."""

import logging
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cmtmae_scale.backends.base import Fragment
from cmtmae_scale.checkpoint import layout
from cmtmae_scale.checkpoint.chunks import HostChunk, copy_to_host, write_chunks
from cmtmae_scale.errors import CheckpointError
from cmtmae_scale.runtime.collectives import agree_all

logger = logging.getLogger(__name__)


class Writer:
    """Writes this rank's part of each checkpoint; rank 0 publishes the whole.

    Args:
        root: ``RUN_DIR/checkpoints``.
        rank: this rank.
        world_size: number of ranks.
        keep: newest checkpoints kept.
        background: write while training goes on; the cost is one host copy of this rank's part.
        token: a number shared by all ranks of this start; names the drafts.
    """

    def __init__(
        self, root: Path, rank: int, world_size: int, keep: int, background: bool, token: int
    ) -> None:
        self.root = root
        self.rank = rank
        self.world_size = world_size
        self.keep = keep
        self.background = background
        self.token = token
        self.timeout_s = 1800.0
        self.thread: threading.Thread | None = None
        self.error: Exception | None = None
        self.saved_step: int | None = None

    def save(self, step: int, fragments: Mapping[str, Fragment], state: dict[str, Any]) -> bool:
        """Start a save, unless one is still in flight somewhere.

        Returns:
            Whether it was started. All ranks get the same answer; synchronises them.
        """
        idle = self.thread is None or not self.thread.is_alive()
        if not agree_all(idle):
            logger.warning(
                "step %d: the save before is still being written; this one is left out", step
            )
            return False
        self.settle()
        chunks = copy_to_host(fragments)
        if not self.background:
            self.write(step, chunks, state)
            self.settle()
            return True
        self.thread = threading.Thread(
            target=self.write, args=(step, chunks, state), name="checkpoint", daemon=True
        )
        self.thread.start()
        return True

    def write(self, step: int, chunks: list[HostChunk], state: dict[str, Any]) -> None:
        """Write this rank's part; on rank 0 publish when all parts are there."""
        draft = self.root / f".draft-{step:08d}-{self.token:016x}"
        target = layout.folder_of(self.root, step)
        try:
            draft.mkdir(parents=True, exist_ok=True)
            write_chunks(chunks, draft / layout.rank_file(self.rank))
            layout.seal_part(draft, self.rank)
            if self.rank == 0:
                layout.publish(draft, target, self.world_size, state, self.timeout_s)
                layout.prune(self.root, self.keep)
            self.saved_step = step
        except (OSError, CheckpointError) as error:
            self.error = error
        except Exception as error:  # safetensors raises its own type for a full disk
            if type(error).__name__ != "SafetensorError":
                raise
            self.error = error

    def settle(self) -> None:
        """Wait for the save in flight and report what went wrong; the run goes on."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.error is not None:
            logger.warning(
                "a checkpoint could not be written (%s); the older ones stand, next try at the "
                "next interval",
                self.error,
            )
            self.error = None

    def finish(self, step: int, fragments: Mapping[str, Fragment], state: dict[str, Any]) -> None:
        """Save the last step and wait until it is published.

        Raises:
            CheckpointError: if it could not be written.
        """
        self.settle()
        if not agree_all(self.saved_step == step):
            self.save(step, fragments, state)
            self.settle()
        if not agree_all(self.saved_step == step):
            raise CheckpointError(
                f"{self.root}: step {step} could not be saved; free space there and start again"
            )


def find_checkpoint(root: Path, rank: int, world_size: int) -> Path | None:
    """Newest checkpoint that every rank finds intact; broken ones are named and passed over.

    Returns:
        Its folder, or ``None`` if there is none at all.

    Raises:
        CheckpointError: if there are some, but none is intact.
    """
    found = layout.candidates(root)
    for folder in found:
        problem = layout.fault(folder, (rank, world_size))
        if agree_all(problem is None):
            return folder
        if problem:
            logger.error("BROKEN CHECKPOINT %s: %s; trying the one before", folder, problem)
    if found:
        raise CheckpointError(
            f"{root}: none of {len(found)} checkpoints is intact; restore one or name another "
            "run.dir"
        )
    return None
