"""Run a command in a process of its own, and end it with its descendants at a time limit."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from cmtmae_scale.runtime.processes import descendants, start_ticks

TAIL = 6000
"""Characters of output that are kept."""


class Ended(NamedTuple):
    """How a command ended."""

    code: int | None
    """Exit code; ``None``: ended at its limit."""
    seconds: float
    tail: str
    """End of its output, both streams."""


def run_limited(command: Sequence[str], log: Path, limit_s: float) -> Ended:
    """Run a command with its output in ``log``; ``python`` means this interpreter."""
    words = [sys.executable if word == "python" else word for word in command]
    began = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a keyboard interrupt reaches this process alone
        )
        code = None
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if code is None:
                end_all(process)
    text = log.read_text(errors="replace")
    return Ended(code, time.monotonic() - began, text[-TAIL:])


def end_all(process: "subprocess.Popen[bytes]") -> None:
    """End a process and its descendants, including those in sessions of their own."""
    below = [(pid, start_ticks(pid)) for pid in descendants(process.pid)]
    process.kill()
    process.wait()
    for pid, started in below:
        if started is not None and start_ticks(pid) == started:
            os.kill(pid, signal.SIGKILL)
