"""One of many processes does a piece of work, the others wait for what it publishes."""

import logging
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

logger = logging.getLogger(__name__)

STALE_S = 120.0
"""How long a claim may stand without a sign of life before another process takes the work over."""

Result = TypeVar("Result")


def once(
    claim: Path,
    find: Callable[[], Result | None],
    work: Callable[[Callable[[], None]], Result],
    stale_s: float = STALE_S,
    pause_s: float = 0.2,
) -> Result:
    """Find a result, or make it, or wait for the process that is making it.

    Two processes may end up doing the work, when one stood still for long: publishing must be
    atomic, and the same whoever comes first.

    Args:
        claim: a file that exists while somebody works; its time is the sign of life.
        find: gives the published result, or ``None`` while there is none.
        work: makes, publishes and returns it; calls its argument now and then as a sign of life.
        stale_s: how long to trust a claim without a sign of life, seconds.
        pause_s: between looks, seconds.
    """
    seen, since = -1, time.monotonic()
    while True:
        result = find()
        if result is not None:
            return result
        if take(claim):
            return work_and_release(claim, work)
        sign = time_of(claim)
        if sign != seen:
            if seen < 0:
                logger.info("waiting for %s", holder(claim))
            seen, since = sign, time.monotonic()
        elif time.monotonic() - since > stale_s:
            logger.warning("%s shows no sign of life for %.0f s: taken over", claim, stale_s)
            return work_and_release(claim, work)
        time.sleep(pause_s)


def take(claim: Path) -> bool:
    """Try to be the one who works."""
    try:
        handle = os.open(claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    os.write(handle, f"{socket.gethostname()}, process {os.getpid()}".encode())
    os.close(handle)
    return True


def work_and_release(claim: Path, work: Callable[[Callable[[], None]], Result]) -> Result:
    """Do the work, and let go of the claim however it ends."""

    def live() -> None:
        try:
            os.utime(claim)
        except OSError:
            logger.debug("%s is gone", claim)

    try:
        return work(live)
    finally:
        claim.unlink(missing_ok=True)


def time_of(claim: Path) -> int:
    """When a claim last showed a sign of life, by its file system's clock; 0 if it is gone."""
    try:
        return claim.stat().st_mtime_ns
    except OSError:
        return 0


def holder(claim: Path) -> str:
    """Who works."""
    try:
        return claim.read_text()
    except OSError:
        return "another process"
