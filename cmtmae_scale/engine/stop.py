"""Wishes to stop: before the first step they end the start, later they are one flag."""

import logging
import math
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

from cmtmae_scale.errors import CacheError
from cmtmae_scale.runtime.processes import broken_link, launcher_chain
from dataloading.errors import ReadError

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
STOP_FILE = "STOP"
SLURM_END = "SLURM_JOB_END_TIME"
END_MARGIN_S = 120.0
"""Seconds before the end of a SLURM job at which the run saves and stops."""


class StartInterrupted(BaseException):
    """A signal before the first step: there is nothing to save yet."""


def interrupt_start() -> None:
    """End the start at a signal, once; call from the main thread."""

    def handle(number: int, frame: FrameType | None) -> None:
        for one in SIGNALS:
            signal.signal(one, signal.SIG_IGN)
        raise StartInterrupted(signal.Signals(number).name)

    for number in SIGNALS:
        signal.signal(number, handle)


class StopRequest:
    """One wish to stop, from a signal, ``RUN_DIR/STOP``, the clock, the launcher's death, or want.

    Handlers only set a flag, and everything is looked at on this rank alone; the ranks agree
    through the vector that they reduce in every step.

    Args:
        run_dir: the run's folder.
        max_seconds: ``run.time_limit_s``.
        environment: where SLURM says when the job ends.
    """

    def __init__(
        self,
        run_dir: Path,
        max_seconds: float | None = None,
        environment: Mapping[str, str] = os.environ,
    ) -> None:
        self.file = run_dir / STOP_FILE
        self.reason: str | None = None
        self.failure: ReadError | CacheError | None = None
        self.launchers = launcher_chain()
        self.limits = time_limits(max_seconds, environment)

    def install(self) -> None:
        """Listen to SIGTERM, SIGUSR1 and SIGINT; call from the main thread."""
        for number in SIGNALS:
            signal.signal(number, self.handle)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Note a signal; a second one changes nothing."""
        self.reason = self.reason or signal.Signals(number).name

    def wanted(self) -> bool:
        """Whether this rank has seen a request."""
        self.reason = self.reason or self.look()
        return self.reason is not None

    def look(self) -> str | None:
        """Look for a request that comes without a signal."""
        if self.file.exists():
            return f"file {STOP_FILE}"
        gone = broken_link(self.launchers)
        if gone is not None:
            return f"the launcher, process {gone}, is gone"
        now = time.monotonic()
        return next((name for name, limit in self.limits.items() if now >= limit), None)

    def fail(self, failure: ReadError | CacheError) -> None:
        """Note why the present step must not be taken; the first reason counts."""
        if self.failure is None:
            logger.warning("%s", failure)
            self.failure = failure

    def urgency(self) -> float:
        """0: go on; 1: stop after this step; infinite: this step must not be taken."""
        return math.inf if self.failure is not None else float(self.wanted())


def time_limits(max_seconds: float | None, environment: Mapping[str, str]) -> dict[str, float]:
    """Limits by name, as values of ``time.monotonic()``.

    The clock of SLURM's controller is compared with this host's once, and a job that seems to be
    over already has no limit here: its signal will come.

    Args:
        max_seconds: from now, or ``None``.
        environment: may have ``SLURM_JOB_END_TIME``, seconds since 1970.
    """
    now = time.monotonic()
    limits = {} if max_seconds is None else {f"run.time_limit_s={max_seconds:g}": now + max_seconds}
    end = environment.get(SLURM_END, "")
    if end.isdigit():
        left_s = int(end) - time.time() - END_MARGIN_S
        if left_s > 0:
            limits[f"SLURM's time limit is {END_MARGIN_S:.0f} s away"] = now + left_s
        else:
            logger.warning(
                "%s=%s is past or less than %.0f s away; waiting for SLURM's signal",
                SLURM_END,
                end,
                END_MARGIN_S,
            )
    return limits
