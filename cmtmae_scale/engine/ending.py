"""The end of a launch: its exit code, and the record of it in ``RUN_DIR/exit.json``."""

import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cmtmae_scale.engine.launches import newest_step, reset_launch_count, take_back_launch
from cmtmae_scale.engine.progress import Progress
from cmtmae_scale.engine.stop import STOP_FILE, STOP_FILE_REASON, LaunchInterrupted, signals_ignored
from cmtmae_scale.errors import (
    EXIT_CRASH,
    EXIT_DONE,
    EXIT_NO_PROGRESS,
    EXIT_STOPPED,
    CmtMaeError,
    LockLostError,
    RankLostError,
    exit_code_of,
)
from cmtmae_scale.runtime.collectives import ranks
from cmtmae_scale.runtime.exit_code import (
    EXIT_FILE,
    STOP_AFTER,
    delete_exit,
    read_finished,
    write_exit,
)
from cmtmae_scale.runtime.lock import RunLock
from cmtmae_scale.runtime.storage import optional_write
from dataloading.errors import DataError

logger = logging.getLogger(__name__)

INTERRUPTED = ".interrupted-"
"""Prefix of the name of an empty file: a rank of a launch was interrupted before the first step."""
OTHER_RANK = "a signal on another rank"
INTERRUPTED_WAIT_S = 2.0
"""Seconds in which that file must become visible to the other ranks."""


class Ending:
    """Writes the outcome of a launch on rank 0, which first deletes that of the previous launch.

    Args:
        run_dir: the run's folder.
        rank: this rank.
        lock: the run's lock; rank 0 has it. Once the lock is lost, the folder belongs to another
            launch, and nothing is written there.
    """

    def __init__(self, run_dir: Path, rank: int, lock: RunLock | None = None) -> None:
        self.run_dir = run_dir
        self.rank = rank
        self.lock = lock
        self.launch: str | None = None
        """Random name of this launch; set when all ranks are known to share the folder."""
        self.is_counted = False
        self.find_dead: Callable[[], list[int]] = list
        """Returns the ranks of this machine whose process has ended; set from the watchdog."""
        self.first_step = 0
        """Step that this launch continued from."""
        self.progress: Progress | None = None
        self.stopped: str | None = None
        self.finished: dict[str, Any] | None = None
        self.done = "done"

    def __enter__(self) -> Self:
        if self.rank == 0:
            self.finished = read_finished(self.run_dir)
            with optional_write(self.run_dir / EXIT_FILE):
                delete_exit(self.run_dir)
            with suppress(OSError):  # the other ranks continue
                for left in self.run_dir.glob(f"{INTERRUPTED}*"):
                    left.unlink(missing_ok=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with signals_ignored():
            self.record(error)

    def record(self, error: BaseException | None) -> None:
        """Write how the launch ended.

        Args:
            error: what ended it; ``None``: nothing failed.

        Raises:
            LockLostError, RankLostError, LaunchInterrupted: the cause, if ``error`` is only its
                consequence.
        """
        if isinstance(error, CmtMaeError | DataError):
            self.write(exit_code_of(error), str(error))
        elif isinstance(error, LaunchInterrupted):
            if self.lock is not None and not self.owns_folder():
                raise LockLostError(self.lock.loss()) from error
            dead = self.find_dead()
            # A rank that a signal interrupts writes the mark before it exits.
            if dead and not self.is_marked():
                why = f"rank {', '.join(map(str, dead))} died on this machine"
                self.write(EXIT_CRASH, f"{why} before the first step")
                raise RankLostError(f"stopped ({error}): {why}") from error
            self.mark_interrupted()
            self.write_interrupted(str(error))
        elif error is not None:
            if self.write_crash(f"{type(error).__name__}: {error}") == EXIT_STOPPED:
                raise LaunchInterrupted(OTHER_RANK) from error
        else:
            self.write(self.code, self.stopped or self.done)

    @property
    def code(self) -> int:
        """Return the exit code of a launch that did not fail."""
        return EXIT_DONE if self.stopped is None else EXIT_STOPPED

    @property
    def step(self) -> int:
        """Return the last step; before the run is built, the step of the newest checkpoint."""
        if self.progress is not None:
            return self.progress.step
        with suppress(OSError):
            return newest_step(self.run_dir / "checkpoints")
        return 0

    @property
    def had_nothing_to_train(self) -> bool:
        """Return whether the launch failed before it was built, or found all steps done."""
        return self.progress is None or self.first_step >= self.progress.end_step

    def advice(self, reason: str) -> str:
        """Return how to continue a run that stopped for a reason."""
        if reason.startswith(STOP_AFTER):
            return "raise or remove train.stop_after to continue"
        if reason == STOP_FILE_REASON:
            return f"delete {self.run_dir / STOP_FILE}, then the same command continues"
        return "the same command continues"

    def mark_interrupted(self) -> None:
        """Publish that this rank was interrupted; the other ranks cannot continue without it."""
        if self.launch is not None:
            with suppress(OSError):
                (self.run_dir / f"{INTERRUPTED}{self.launch}").touch()

    def is_interrupted(self) -> bool:
        """Return whether a rank of this launch was interrupted before the first step."""
        if self.launch is None or ranks() == 1:
            return False
        if self.progress is not None and self.progress.step > self.first_step:
            return False
        limit = time.monotonic() + INTERRUPTED_WAIT_S
        while time.monotonic() < limit:
            if self.is_marked():
                return True
            time.sleep(0.1)
        return False

    def is_marked(self) -> bool:
        """Return whether a rank of this launch has written the mark of ``mark_interrupted``."""
        with suppress(OSError):
            return f"{INTERRUPTED}{self.launch}" in os.listdir(self.run_dir)
        return False

    def write_interrupted(self, reason: str) -> None:
        """Write that the launch was interrupted, and remove it from the count."""
        self.write(EXIT_STOPPED, f"{reason} before the first step", self.take_back)

    def take_back(self, run_dir: Path) -> None:
        """Reduce the count of launches, if this launch was counted."""
        if self.is_counted:
            self.is_counted = False  # the watchdog and the main thread may both call this method
            take_back_launch(run_dir)

    def write_crash(self, why: str) -> int:
        """Write that the launch crashed, or was interrupted on another rank; return the code."""
        if self.is_interrupted():
            self.write_interrupted(OTHER_RANK)
            return EXIT_STOPPED
        self.write(EXIT_CRASH, why)
        return EXIT_CRASH

    def owns_folder(self) -> bool:
        """Return whether no other launch has taken the folder over, as far as is known."""
        try:
            return self.lock is None or self.lock.is_held()
        except OSError:
            return True

    def write(
        self, code: int, reason: str, correct_count: Callable[[Path], None] = reset_launch_count
    ) -> None:
        """Write code, step and reason; only crashes count as launches without progress."""
        if not self.owns_folder():
            logger.warning("%s now belongs to another launch; nothing is written", self.run_dir)
            return
        if code == EXIT_STOPPED:
            logger.info("stopped at step %d (%s); %s", self.step, reason, self.advice(reason))
        if self.rank == 0:
            record = {"code": code, "step": self.step, "reason": reason}
            if code != EXIT_DONE and self.finished and self.had_nothing_to_train:
                logger.info("this launch trained nothing; %s keeps the finished run", EXIT_FILE)
                record = self.finished
            try:
                write_exit(self.run_dir, **record)
            except OSError as refused:
                logger.warning("%s: the outcome could not be written (%s)", self.run_dir, refused)
            if code not in {EXIT_CRASH, EXIT_NO_PROGRESS}:
                correct_count(self.run_dir)
