"""CPU time and peak memory of commands that end before they train.

The system counts the memory of the measuring process in a child's peak, so the measuring process
must be small: this module imports no torch.
"""

import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple

from cmtmae_scale.errors import EXIT_CONFIG, EXIT_DONE, ConfigError

MIB = 2**20


class Usage(NamedTuple):
    """Medians over some rounds of one command."""

    name: str
    cpu_s: float
    peak_bytes: float


def measure_commands(recipe: str, rounds: int) -> list[Usage]:
    """Measure import, ``--help``, a wrong key and ``--dry-run``.

    The recipe's dry run works on this machine. The results are medians over the rounds.

    Raises:
        ConfigError: if a command does not end with the expected exit code.
    """
    cmtmae = ["-m", "cmtmae_scale"]
    pretrain = [*cmtmae, "pretrain", "--config", recipe]
    commands = {
        "import cmtmae_scale": (["-c", "import cmtmae_scale"], EXIT_DONE),
        "cmtmae --help": ([*cmtmae, "--help"], EXIT_DONE),
        "cmtmae pretrain --help": ([*cmtmae, "pretrain", "--help"], EXIT_DONE),
        "cmtmae pretrain, wrong key": ([*pretrain, "mask.rato=0.5"], EXIT_CONFIG),
        "cmtmae pretrain --dry-run": ([*pretrain, "--dry-run"], EXIT_DONE),
    }
    found: list[Usage] = []
    for name, (arguments, expected) in commands.items():
        samples = [measure_process([sys.executable, *arguments], expected) for _ in range(rounds)]
        cpu_s, peak_bytes = (statistics.median(column) for column in zip(*samples, strict=True))
        found.append(Usage(name, cpu_s, peak_bytes))
    return found


def measure_process(command: Sequence[str], expected: int) -> tuple[float, int]:
    """Run a command; returns its CPU seconds, user and system, and its peak resident bytes."""
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL
    ) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != expected:
        raise ConfigError(
            f"{' '.join(command)}: exit code {process.returncode}, expected {expected}; run it to "
            "see its message"
        )
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def startup_table(found: Sequence[Usage]) -> str:
    """Return the measurements as text."""
    lines = [f"{'command':<28}{'CPU s':>8}{'peak MiB':>10}"]
    lines += [f"{one.name:<28}{one.cpu_s:>8.2f}{one.peak_bytes / MIB:>10.0f}" for one in found]
    return "\n".join(lines)
