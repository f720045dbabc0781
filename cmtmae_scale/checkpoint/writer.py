"""Save checkpoints in the background, one at a time; a save that fails does not end the run."""

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from cmtmae_scale.backends.base import Fragment
from cmtmae_scale.checkpoint import layout
from cmtmae_scale.checkpoint.chunks import HostChunk, copy_to_host, write_chunks
from cmtmae_scale.checkpoint.replicas import verify_replicas
from cmtmae_scale.checkpoint.shards import (
    Shapes,
    await_shards,
    describe_shard,
    mark_shard_done,
    mark_shard_failed,
    publish_checkpoint,
)
from cmtmae_scale.config.schema import Checkpoint
from cmtmae_scale.errors import CheckpointError, LockLostError, SaveError
from cmtmae_scale.runtime.collectives import (
    all_ranks_agree,
    broadcast_int,
    broadcast_text,
    gather_texts,
)
from cmtmae_scale.runtime.launch import World
from cmtmae_scale.runtime.lock import RunLock
from cmtmae_scale.runtime.storage import write_atomic

logger = logging.getLogger(__name__)


class Writer:
    """Writes this rank's shard of each checkpoint; rank 0 publishes the checkpoint.

    A rank without fragments of its own, such as one of the replicas, writes nothing.

    Args:
        root: ``RUN_DIR/checkpoints``.
        rank: this rank.
        world_size: number of ranks.
        keep: number of newest checkpoints that are kept.
        background: write while training continues, from one host copy of this rank's fragments.
        token: a random number shared by all ranks of this launch; names the drafts.
        lock: the run's lock, which rank 0 verifies before it changes files that another launch may
            own; ``None``: no other launch writes to ``root``.
        writers: the ranks that hold fragments to write; the others touch no file. ``None``: all.
    """

    def __init__(
        self,
        root: Path,
        rank: int,
        world_size: int,
        keep: int,
        background: bool,
        token: int,
        lock: RunLock | None = None,
        writers: Sequence[int] | None = None,
    ) -> None:
        self.root = root
        self.rank = rank
        self.world_size = world_size
        self.keep = keep
        self.background = background
        self.token = token
        self.lock = lock
        self.writers = range(world_size) if writers is None else writers
        self.timeout_s = 1800.0
        self.attempts = 3
        self.pause_s = 5.0
        self.number = 0
        self.thread: threading.Thread | None = None
        self.shard_done = threading.Event()
        self.shard_done.set()
        self.abandoned = threading.Event()
        self.failed = False
        self.bug: Exception | None = None
        self.reason = ""
        self.saved_step: int | None = None

    def save(self, step: int, fragments: Mapping[str, Fragment], state: dict[str, Any]) -> bool:
        """Start a save, unless an earlier save is still in progress on some rank; a collective.

        Returns:
            Whether the save was started, the same on all ranks.

        Raises:
            ReplicaError: if ranks that hold the same tensors differ.
        """
        verify_replicas(step, fragments)
        if not all_ranks_agree(not self.failed):
            self.abandoned.set()
            if self.shard_done.is_set():
                self.settle()
        if not all_ranks_agree(self.thread is None or not self.thread.is_alive()):
            if self.rank == 0:
                logger.warning(
                    "step %d: the previous save is still being written; this save is skipped", step
                )
            return False
        self.settle()
        self.number += 1
        self.failed = False
        self.abandoned.clear()
        if self.rank and self.rank not in self.writers:
            self.saved_step = step  # as for a shard that is written
            if not self.background:
                self.wait()
            return True
        self.shard_done.clear()
        shapes = {key: own.shape for key, own in fragments.items()}
        work = (step, copy_to_host(fragments), shapes, state)
        self.thread = threading.Thread(target=self.write, args=work, name="checkpoint", daemon=True)
        self.thread.start()
        if not self.background:
            self.wait()
        return True

    def write(
        self, step: int, chunks: list[HostChunk], shapes: Shapes, state: dict[str, Any]
    ) -> None:
        """Write this rank's shard; on rank 0 publish the checkpoint once it has all shards."""
        draft = self.root / f".draft-{step:08d}-{self.token:016x}-{self.number}"
        target = layout.folder_of(self.root, step)
        try:
            if self.rank == 0:
                self.require_lock()
                layout.sweep(self.root, spare=draft)
            draft.mkdir(parents=True, exist_ok=True)
            if self.rank in self.writers:
                facts = write_chunks(chunks, draft / layout.rank_file(self.rank))
                mark_shard_done(draft, self.rank, describe_shard(facts, chunks, shapes))
            self.shard_done.set()
            if self.rank == 0:
                shards = await_shards(draft, self.writers, self.abandoned, self.timeout_s)
                publish_checkpoint(draft, target, shards, shapes, state, self.require_lock)
                self.update_latest(target)
            self.saved_step = step
        except LockLostError as error:
            self.failed = True
            logger.error("checkpoint %s is not written: %s", target, error)
            layout.remove(draft)
        except (OSError, CheckpointError) as error:
            self.failed = True
            self.abandon(draft, target, error)
        except Exception as error:  # handed to the main thread
            self.failed = True
            self.bug = error
        finally:
            self.shard_done.set()

    def require_lock(self) -> None:
        """Verify that no other launch took the run's folder over.

        Raises:
            LockLostError: if another launch did.
            OSError: if the store does not answer.
        """
        if self.lock is not None:
            self.lock.require()

    def require_lock_on_all_ranks(self) -> None:
        """Verify rank 0's lock; a collective.

        Raises:
            LockLostError: on every rank, if another launch took the run's folder over.
        """
        problem = ""
        try:
            self.require_lock()
        except LockLostError as error:
            problem = str(error)
        except OSError:
            pass  # the save that follows reports the failure
        problem = broadcast_text(problem)
        if problem:
            raise LockLostError(problem)

    def abandon(self, draft: Path, target: Path, error: Exception) -> None:
        """Free the space of a failed save, and warn once."""
        self.reason = str(error)
        if self.rank == 0:
            layout.remove(draft)
            text = (
                "checkpoint %s could not be written (%s); training continues and the older "
                "checkpoints are unchanged; check space, quota and permissions there; the next "
                "save is at the next interval"
            )
            logger.warning(text, target, error)
            return
        try:
            mark_shard_failed(draft, self.rank, str(error))
        except OSError:
            if not isinstance(error, FileNotFoundError):  # else rank 0 failed first and warned
                logger.warning("%s could not be written (%s)", draft, error)

    def update_latest(self, target: Path) -> None:
        """Name the newest checkpoint in ``latest`` and delete old checkpoints."""
        try:
            self.require_lock()
            write_atomic(self.root / layout.LATEST, target.name)
            layout.prune(self.root, self.keep, layout.step_of(target) or 0)
        except OSError as error:
            logger.warning(
                "%s: the checkpoint is complete, but %s or older checkpoints were not updated (%s)",
                target,
                layout.LATEST,
                error,
            )

    def settle(self) -> None:
        """Wait until this rank's save has ended; raise the background thread's internal error."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.bug is not None:
            bug, self.bug = self.bug, None
            raise bug

    def wait(self) -> None:
        """Wait until the save has ended on every rank; a collective."""
        self.shard_done.wait()
        if not all_ranks_agree(not self.failed):
            self.abandoned.set()
        self.settle()

    def close(self, grace_s: float = 60.0) -> None:
        """Finish a save in progress, but wait at most ``grace_s`` for ranks that may have died."""
        if self.thread is not None:
            self.thread.join(grace_s)
            self.abandoned.set()
        self.settle()

    def finish(self, step: int, fragments: Mapping[str, Fragment], state: dict[str, Any]) -> None:
        """Save the last step, wait until the checkpoint is published, and retry if the save fails.

        Raises:
            LockLostError: if another launch took the run's folder over; nothing is saved.
            SaveError: if every attempt failed.
            ReplicaError: see ``save``.
        """
        self.wait()
        for attempt in range(self.attempts):
            self.require_lock_on_all_ranks()
            if all_ranks_agree(self.saved_step == step):
                return
            if attempt:
                time.sleep(self.pause_s)
            self.save(step, fragments, state)
            self.wait()
        self.require_lock_on_all_ranks()
        if not all_ranks_agree(self.saved_step == step):
            raise SaveError(
                f"{self.root}: step {step} could not be saved in {self.attempts} attempts "
                f"({self.reason or 'another rank failed'}); free space there if it is full, and "
                "launch again: the run continues from the newest checkpoint"
            )


def open_writer(
    run_dir: Path,
    world: World,
    settings: Checkpoint,
    fragments: Mapping[str, Fragment],
    saved_step: int | None,
    stack: ExitStack,
    lock: RunLock | None = None,
) -> Writer:
    """Open the writer of this rank's shards; a collective.

    Args:
        run_dir: the run's folder.
        world: this process's rank and world size.
        settings: the config's group.
        fragments: from ``Backend.fragments``; the ranks that own fragments stay the same.
        saved_step: step whose checkpoint exists already, if it need not be saved again.
        stack: closes the writer.
        lock: the run's lock; rank 0 has it.
    """
    token = broadcast_int(int(torch.randint(2**62, (), dtype=torch.int64).item()))
    owns = any(own.owner and own.local.numel() for own in fragments.values())
    writers = [rank for rank, text in enumerate(gather_texts("1" if owns else "")) if text]
    root, keep, background = run_dir / "checkpoints", settings.keep, settings.background
    writer = Writer(root, world.rank, world.world_size, keep, background, token, lock, writers)
    writer.saved_step = saved_step
    stack.callback(writer.close)
    return writer
