"""Stop requests: before the first step they end the launch, later they set one flag."""

import logging
import math
import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from cmtmae_scale.errors import CacheError
from cmtmae_scale.runtime.processes import find_dead_launcher, find_launchers
from dataloading.errors import ReadError

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
STOP_FILE = "STOP"
STOP_FILE_REASON = f"file {STOP_FILE}"
POLL_S = 1.0
"""Seconds between two checks for the file, which may be on a slow store."""
SLURM_END = "SLURM_JOB_END_TIME"
END_MARGIN_S = 120.0
"""Seconds before the end of a SLURM job at which the run saves and stops."""


class LaunchInterrupted(BaseException):
    """A signal before the first step: there is nothing to save yet."""


def interrupt_launch() -> None:
    """Make the first signal end the launch; call from the main thread."""

    def handle(number: int, frame: FrameType | None) -> None:
        for one in SIGNALS:
            signal.signal(one, signal.SIG_IGN)
        raise LaunchInterrupted(signal.Signals(number).name)

    for number in SIGNALS:
        signal.signal(number, handle)


@contextmanager
def signals_ignored() -> Iterator[None]:
    """Ignore signals in the block, such as while the outcome of a launch is written."""
    # SIG_IGN would be inherited by programs that are started in the block.
    before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StopRequest:
    """A request to stop: a signal, ``RUN_DIR/STOP``, a time limit, the launcher's death, a failure.

    Handlers only set a flag, and each rank checks its own; the ranks agree through the vector that
    they reduce in every step.

    Args:
        run_dir: the run's folder.
        time_limit_s: ``run.time_limit_s``.
        watches_file: whether this rank polls for ``STOP``; one rank per node is enough.
    """

    def __init__(
        self, run_dir: Path, time_limit_s: float | None = None, watches_file: bool = True
    ) -> None:
        self.file = run_dir / STOP_FILE
        self.next_poll = 0.0 if watches_file else math.inf
        self.reason: str | None = None
        self.failure: ReadError | CacheError | None = None
        self.launchers = find_launchers()
        self.limits = find_time_limits(time_limit_s, os.environ)

    def install(self) -> None:
        """Handle SIGTERM, SIGUSR1 and SIGINT; call from the main thread."""
        for number in SIGNALS:
            signal.signal(number, self.handle)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Record a signal; a second one changes nothing."""
        self.reason = self.reason or signal.Signals(number).name

    def is_requested(self) -> bool:
        """Return whether this rank has received a request."""
        self.reason = self.reason or self.find_request()
        return self.reason is not None

    def find_request(self) -> str | None:
        """Return a request that arrives without a signal, or ``None``."""
        now = time.monotonic()
        if now >= self.next_poll:
            self.next_poll = now + POLL_S
            if os.path.exists(self.file):  # False where the store fails, unlike Path.exists
                return STOP_FILE_REASON
        gone = find_dead_launcher(self.launchers)
        if gone is not None:
            return f"the launcher, process {gone}, is gone"
        return next((name for name, limit in self.limits.items() if now >= limit), None)

    def record_failure(self, failure: ReadError | CacheError) -> None:
        """Record why the present step must not be applied; the first reason counts."""
        if self.failure is None:
            logger.warning("%s", failure)
            self.failure = failure

    def urgency(self) -> float:
        """Return 0 to continue, 1 to stop after this step, infinity to refuse this step."""
        return math.inf if self.failure is not None else float(self.is_requested())


def find_time_limits(
    time_limit_s: float | None, environment: Mapping[str, str]
) -> dict[str, float]:
    """Return limits by name, as values of ``time.monotonic()``.

    The clock of SLURM's controller is compared with this host's once. A job that seems to be over
    already has no limit here: SLURM sends its signal.

    Args:
        time_limit_s: from now, or ``None``.
        environment: may have ``SLURM_JOB_END_TIME``, seconds since 1970.
    """
    now = time.monotonic()
    limits: dict[str, float] = {}
    if time_limit_s is not None:
        limits[f"run.time_limit_s={time_limit_s:g}"] = now + time_limit_s
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
