"""Processes of this machine, read from ``/proc``."""

import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

LAUNCHERS = frozenset(
    {"torchrun", "torch.distributed.run", "torch.distributed.launch"}
    | {"deepspeed", "deepspeed.launcher.launch", "supervise.py", "study.py"}
)
"""Programs that launch ranks, by file or module."""
COMMAND = frozenset({"cmtmae", "cmtmae_scale"})
"""The command, and its module: ``cmtmae study`` is ``study.py``."""


class Status(NamedTuple):
    """Fields of ``/proc/PID/stat``."""

    state: str
    """``Z``: a zombie."""
    parent: int
    """Process id of the parent."""
    started: int
    """Start time in ticks since boot; differs between two processes with the same id."""


def process_status(pid: int) -> Status | None:
    """Return the status of a process of this pid namespace, or ``None`` if there is none."""
    try:
        # The system truncates names to 15 bytes, also within a character.
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    return Status(fields[0], int(fields[1]), int(fields[19]))


def start_ticks(pid: int) -> int | None:
    """Return the start time of a live process in ticks since boot, or ``None`` if it is dead."""
    found = process_status(pid)
    return None if found is None or found.state in "ZX" else found.started


def descendants(pid: int) -> Iterator[int]:
    """Yield all live descendants of a process, without zombies."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        found = process_status(int(entry.name)) if entry.name.isdigit() else None
        if found is not None and found.state not in "ZX":
            children.setdefault(found.parent, []).append(int(entry.name))
    waiting = [pid]
    while waiting:
        for child in children.get(waiting.pop(), ()):
            yield child
            waiting.append(child)


def find_launchers() -> list[tuple[int, int]]:
    """Return the launchers above this process, nearest first, as links (process, its parent)."""
    links: list[tuple[int, int]] = []
    child, parent = os.getpid(), os.getppid()
    while parent > 1 and is_launcher(parent):
        links.append((child, parent))
        found = process_status(parent)
        if found is None:
            break
        child, parent = parent, found.parent
    return links


def is_launcher(pid: int) -> bool:
    """Return whether a process runs a program of ``LAUNCHERS``; its shell does not count."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return False
    return names_launcher(words)


def names_launcher(words: list[str]) -> bool:
    """Return whether the words of a command line run a program of ``LAUNCHERS``."""
    names = [word.rpartition("/")[2] for word in words[:5]]
    names += [f"{after}.py" for name, after in pairwise(names) if name in COMMAND]
    return names[0] in LAUNCHERS or (
        names[0].startswith("python") and not LAUNCHERS.isdisjoint(names)
    )


def find_dead_launcher(links: list[tuple[int, int]]) -> int | None:
    """Return the first launcher that is no longer its child's parent, or ``None``."""
    for child, parent in links:
        found = process_status(child)
        if found is None or found.parent != parent:
            return parent
    return None
