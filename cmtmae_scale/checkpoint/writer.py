"""Saves in the background, one in flight, and never at the cost of the run."""

import logging
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cmtmae_scale.backends.base import Fragment
from cmtmae_scale.checkpoint import layout
from cmtmae_scale.checkpoint.chunks import HostChunk, copy_to_host, write_chunks
from cmtmae_scale.checkpoint.publish import await_parts, give_up_part, publish, seal_part
from cmtmae_scale.checkpoint.replicas import refuse_differences
from cmtmae_scale.errors import CheckpointError, SaveError
from cmtmae_scale.runtime.collectives import agree_all
from cmtmae_scale.runtime.storage import write_atomic

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
        self.attempts = 3
        self.pause_s = 5.0
        self.number = 0
        self.thread: threading.Thread | None = None
        self.part_over = threading.Event()
        self.part_over.set()
        self.abandoned = threading.Event()
        self.failed = False
        self.bug: Exception | None = None
        self.saved_step: int | None = None

    def save(self, step: int, fragments: Mapping[str, Fragment], state: dict[str, Any]) -> bool:
        """Start a save, unless one is still in flight somewhere.

        Returns:
            Whether it was started. All ranks get the same answer; synchronises them.

        Raises:
            ReplicaError: if ranks that hold the same tensors differ.
        """
        refuse_differences(step, fragments)
        if not agree_all(not self.failed):
            self.abandoned.set()
            if self.part_over.is_set():
                self.settle()
        if not agree_all(self.thread is None or not self.thread.is_alive()):
            if self.rank == 0:
                logger.warning(
                    "step %d: the save before is still being written; this one is left out", step
                )
            return False
        self.settle()
        self.number += 1
        self.failed = False
        self.abandoned.clear()
        self.part_over.clear()
        self.thread = threading.Thread(
            target=self.write,
            args=(step, copy_to_host(fragments), state),
            name="checkpoint",
            daemon=True,
        )
        self.thread.start()
        if not self.background:
            self.wait()
        return True

    def write(self, step: int, chunks: list[HostChunk], state: dict[str, Any]) -> None:
        """Write this rank's part; on rank 0 publish when all parts are there."""
        draft = self.root / f".draft-{step:08d}-{self.token:016x}-{self.number}"
        target = layout.folder_of(self.root, step)
        try:
            if self.rank == 0:
                layout.sweep(self.root, spare=draft)
            draft.mkdir(parents=True, exist_ok=True)
            facts = write_chunks(chunks, draft / layout.rank_file(self.rank))
            seal_part(draft, self.rank, facts)
            self.part_over.set()
            if self.rank == 0:
                parts = await_parts(draft, self.world_size, self.abandoned, self.timeout_s)
                publish(draft, target, parts, state)
                self.tidy(target)
            self.saved_step = step
        except (OSError, CheckpointError) as error:
            self.failed = True
            self.give_up(draft, target, error)
        except Exception as error:  # handed to the main thread
            self.failed = True
            self.bug = error
        finally:
            self.part_over.set()

    def give_up(self, draft: Path, target: Path, error: Exception) -> None:
        """Free the space of a save that failed, and say so once."""
        if self.rank == 0:
            layout.remove(draft)
            logger.warning(
                "checkpoint %s could not be written (%s); training goes on and the older "
                "checkpoints stand; check space, quota and permissions there; next try at the "
                "next interval",
                target,
                error,
            )
            return
        try:
            give_up_part(draft, self.rank, str(error))
        except OSError:
            if not isinstance(error, FileNotFoundError):  # else rank 0 gave up first and told why
                logger.warning("%s could not be written (%s)", draft, error)

    def tidy(self, target: Path) -> None:
        """Name the newest checkpoint in ``latest`` and keep only the newest ones."""
        try:
            write_atomic(self.root / layout.LATEST, target.name)
            layout.prune(self.root, self.keep, layout.step_of(target) or 0)
        except OSError as error:
            logger.warning(
                "%s: the checkpoint is whole, but %s or older ones were not updated (%s)",
                target,
                layout.LATEST,
                error,
            )

    def settle(self) -> None:
        """Wait until this rank's save in flight is over; an error of ours is raised here."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.bug is not None:
            bug, self.bug = self.bug, None
            raise bug

    def wait(self) -> None:
        """Wait until the save in flight is over on every rank; synchronises them."""
        self.part_over.wait()
        if not agree_all(not self.failed):
            self.abandoned.set()
        self.settle()

    def close(self, grace_s: float = 60.0) -> None:
        """Let a save in flight finish; parts of ranks that may have died are not waited for long.

        Args:
            grace_s: seconds for the other ranks' parts to arrive.
        """
        if self.thread is not None:
            self.thread.join(grace_s)
            self.abandoned.set()
        self.settle()

    def finish(self, step: int, fragments: Mapping[str, Fragment], state: dict[str, Any]) -> None:
        """Save the last step, wait until it is published, and try again if the store refuses.

        Raises:
            SaveError: if it could not be written.
            ReplicaError: see ``save``.
        """
        self.wait()
        for attempt in range(self.attempts):
            if agree_all(self.saved_step == step):
                return
            if attempt:
                time.sleep(self.pause_s)
            self.save(step, fragments, state)
            self.wait()
        if not agree_all(self.saved_step == step):
            raise SaveError(
                f"{self.root}: step {step} could not be saved in {self.attempts} attempts; free "
                "space there and start again: the run continues from the newest checkpoint"
            )
