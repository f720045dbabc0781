"""How a start ends: the code that a rank leaves with, and what is written about it."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from cmtmae_scale.engine.attempts import forget_attempts
from cmtmae_scale.engine.progress import Progress
from cmtmae_scale.engine.stop import StartInterrupted, interrupt_start
from cmtmae_scale.errors import (
    EXIT_CRASH,
    EXIT_DONE,
    EXIT_NO_PROGRESS,
    EXIT_STOPPED,
    CmtMaeError,
)
from cmtmae_scale.runtime.exit_code import forget_exit, reported, write_exit
from dataloading.errors import DataError

logger = logging.getLogger(__name__)


def as_rank(start: Callable[[], int]) -> int:
    """Run one start of a training as a rank, and turn every outcome into an exit code.

    Args:
        start: from the command line to the end; returns the code of this start.

    Returns:
        The process's exit code: that of the start, but 0 for a requested stop under torchrun,
        which calls every other code a crash.
    """
    interrupt_start()
    with reported() as report:
        try:
            code = start()
        except StartInterrupted as stopped:
            logger.info("stopped (%s) with nothing to save; the same command starts again", stopped)
            code = EXIT_STOPPED
        except (CmtMaeError, DataError) as error:
            logger.error("%s", error)
            code = error.exit_code
        report.leave(code)
    return EXIT_DONE if code == EXIT_STOPPED and "TORCHELASTIC_RUN_ID" in os.environ else code


class Ending:
    """Writes how a start ended; rank 0 does, and forgets there what the one before left.

    Args:
        run_dir: the run's folder.
        rank: this rank.
    """

    def __init__(self, run_dir: Path, rank: int) -> None:
        self.run_dir = run_dir
        self.rank = rank
        self.progress: Progress | None = None
        self.stopped: str | None = None

    def __enter__(self) -> Self:
        if self.rank == 0:
            forget_exit(self.run_dir)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, CmtMaeError | DataError):
            self.write(error.exit_code, str(error))
        elif isinstance(error, StartInterrupted):
            self.write(EXIT_STOPPED, f"{error} before the first step")
        elif error is not None:
            self.write(EXIT_CRASH, f"{type(error).__name__}: {error}")
        else:
            self.write(self.code, self.stopped or "done")

    @property
    def code(self) -> int:
        """Exit code of a start that did not fail."""
        return EXIT_DONE if self.stopped is None else EXIT_STOPPED

    @property
    def step(self) -> int:
        """The step that it came to."""
        return 0 if self.progress is None else self.progress.step

    def write(self, code: int, reason: str) -> None:
        """Leave code, step and reason; only crashes count as starts without progress."""
        if code == EXIT_STOPPED:
            logger.info("stopped at step %d (%s); the same command continues", self.step, reason)
        if self.rank == 0:
            try:
                write_exit(self.run_dir, code, self.step, reason)
            except OSError as refused:
                logger.warning("%s: the outcome could not be written (%s)", self.run_dir, refused)
            if code not in {EXIT_CRASH, EXIT_NO_PROGRESS}:
                forget_attempts(self.run_dir)
