"""The end of a launch: its exit code, and the record of it in ``RUN_DIR/exit.json``."""

import logging
from pathlib import Path
from types import TracebackType
from typing import Self

from cmtmae_scale.engine.launches import reset_launch_count
from cmtmae_scale.engine.progress import Progress
from cmtmae_scale.engine.stop import STOP_FILE, STOP_FILE_REASON, LaunchInterrupted
from cmtmae_scale.errors import (
    EXIT_CRASH,
    EXIT_DONE,
    EXIT_NO_PROGRESS,
    EXIT_STOPPED,
    CmtMaeError,
    exit_code_of,
)
from cmtmae_scale.runtime.exit_code import EXIT_FILE, delete_exit, write_exit
from cmtmae_scale.runtime.storage import optional_write
from dataloading.errors import DataError

logger = logging.getLogger(__name__)


class Ending:
    """Writes the outcome of a launch; rank 0 does, after it removed that of the launch before.

    Args:
        run_dir: the run's folder.
        rank: this rank.
    """

    def __init__(self, run_dir: Path, rank: int) -> None:
        self.run_dir = run_dir
        self.rank = rank
        self.progress: Progress | None = None
        self.stopped: str | None = None
        self.done = "done"

    def __enter__(self) -> Self:
        if self.rank == 0:
            with optional_write(self.run_dir / EXIT_FILE):
                delete_exit(self.run_dir)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, CmtMaeError | DataError):
            self.write(exit_code_of(error), str(error))
        elif isinstance(error, LaunchInterrupted):
            self.write(EXIT_STOPPED, f"{error} before the first step")
        elif error is not None:
            self.write(EXIT_CRASH, f"{type(error).__name__}: {error}")
        else:
            self.write(self.code, self.stopped or self.done)

    @property
    def code(self) -> int:
        """Return the exit code of a launch that did not fail."""
        return EXIT_DONE if self.stopped is None else EXIT_STOPPED

    @property
    def step(self) -> int:
        """Return the last step."""
        return 0 if self.progress is None else self.progress.step

    def advice(self, reason: str) -> str:
        """Return what continues a run that stopped for a reason."""
        if reason.startswith("train.stop_after="):
            return "raise or remove train.stop_after to continue"
        if reason == STOP_FILE_REASON:
            return f"delete {self.run_dir / STOP_FILE}, then the same command continues"
        return "the same command continues"

    def write(self, code: int, reason: str) -> None:
        """Write code, step and reason; only crashes count as launches without progress."""
        if code == EXIT_STOPPED:
            logger.info("stopped at step %d (%s); %s", self.step, reason, self.advice(reason))
        if self.rank == 0:
            try:
                write_exit(self.run_dir, code, self.step, reason)
            except OSError as refused:
                logger.warning("%s: the outcome could not be written (%s)", self.run_dir, refused)
            if code not in {EXIT_CRASH, EXIT_NO_PROGRESS}:
                reset_launch_count(self.run_dir)
