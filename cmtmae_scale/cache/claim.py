"""One of many processes computes a result; the others wait until it is published."""

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

logger = logging.getLogger(__name__)

STALE_S = 120.0
"""Age of a heartbeat after which another process takes the work over."""

BEAT_S = STALE_S / 8
"""Seconds between two heartbeats of ``heartbeat``."""

Result = TypeVar("Result")


def compute_once(
    claim: Path,
    find: Callable[[], Result | None],
    compute: Callable[[Callable[[], None]], Result],
    stale_s: float = STALE_S,
    pause_s: float = 0.2,
) -> Result:
    """Find a published result, or compute it, or wait for the process that computes it.

    Two processes may compute the result if the first one stalls. Publishing must therefore be
    atomic, and the result must not depend on who computes it.

    Args:
        claim: file that exists while a process computes; its modification time is the heartbeat.
        find: returns the published result, or ``None``.
        compute: computes, publishes and returns the result; calls its argument as a heartbeat.
        stale_s: see ``STALE_S``.
        pause_s: seconds between polls.
    """
    heartbeat, changed_at = 0, time.monotonic()
    while True:
        result = find()
        if result is not None:
            return result
        if create_claim(claim):
            break
        latest = heartbeat_of(claim)
        if latest != heartbeat:
            if not heartbeat:
                logger.info("waiting for %s", owner_of(claim))
            heartbeat, changed_at = latest, time.monotonic()
        elif time.monotonic() - changed_at > stale_s:
            logger.warning("%s has had no heartbeat for %.0f s: taken over", claim, stale_s)
            break
        time.sleep(pause_s)

    def keep_alive() -> None:
        try:
            os.utime(claim)
        except OSError:
            logger.debug("%s is gone", claim)

    try:
        return compute(keep_alive)
    finally:
        claim.unlink(missing_ok=True)


@contextmanager
def heartbeat(keep_alive: Callable[[], None]) -> Iterator[None]:
    """Call ``keep_alive`` on a thread during the block, for work that cannot call it itself."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(BEAT_S):
            keep_alive()

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def create_claim(claim: Path) -> bool:
    """Create the claim; return whether it did not exist.

    Raises:
        OSError: if it cannot be written; no empty claim remains, for which others would wait.
    """
    try:
        with claim.open("x") as opened:
            opened.write(f"{socket.gethostname()}, process {os.getpid()}")
    except FileExistsError:
        return False
    except OSError:
        claim.unlink(missing_ok=True)
        raise
    return True


def heartbeat_of(claim: Path) -> int:
    """Return the time of the last heartbeat by the file system's clock; 0: there is no claim."""
    try:
        return claim.stat().st_mtime_ns
    except OSError:
        return 0


def owner_of(claim: Path) -> str:
    """Return host and process that hold the claim."""
    try:
        return claim.read_text()
    except (OSError, ValueError):
        return "another process"
