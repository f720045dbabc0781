"""Processes of this machine, as ``/proc`` shows them."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

LAUNCHERS = frozenset(
    (
        *("torchrun", "torch.distributed.run", "torch.distributed.launch"),
        *("deepspeed", "deepspeed.launcher.launch", "supervise.py"),
    )
)
"""Programs that start ranks, by file or module."""


class Status(NamedTuple):
    """A line of ``/proc/PID/stat``, as far as it matters."""

    state: str
    """``Z``: ended, not yet reaped."""
    parent: int
    """Process id of the parent."""
    started: int
    """When it started, in ticks since boot: tells two processes of one id apart."""


def status(pid: int) -> Status | None:
    """State of a process of this pid namespace, or ``None`` if there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    return Status(fields[0], int(fields[1]), int(fields[19]))


def started(pid: int) -> int | None:
    """When a process started, in ticks since boot; ``None`` if it is dead."""
    found = status(pid)
    return None if found is None or found.state in "ZX" else found.started


def descendants(pid: int) -> Iterator[int]:
    """Children of a process and theirs, those that have ended but for the reaping left out."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        found = status(int(entry.name)) if entry.name.isdigit() else None
        if found is not None and found.state not in "ZX":
            children.setdefault(found.parent, []).append(int(entry.name))
    waiting = [pid]
    while waiting:
        for child in children.get(waiting.pop(), ()):
            yield child
            waiting.append(child)


def launcher_chain() -> list[tuple[int, int]]:
    """The launchers above this process, nearest first, as links (process, its parent)."""
    links: list[tuple[int, int]] = []
    child, parent = os.getpid(), os.getppid()
    while parent > 1 and is_launcher(parent):
        links.append((child, parent))
        found = status(parent)
        if found is None:
            break
        child, parent = parent, found.parent
    return links


def is_launcher(pid: int) -> bool:
    """Whether a process is a program of ``LAUNCHERS``; a shell that names one is not."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return False
    names = [word.rpartition("/")[2] for word in words[:5]]
    return names[0] in LAUNCHERS or (
        names[0].startswith("python") and not LAUNCHERS.isdisjoint(names)
    )


def broken_link(links: list[tuple[int, int]]) -> int | None:
    """The first launcher of a chain that is no longer its child's parent, or ``None``."""
    for child, parent in links:
        found = status(child)
        if found is None or found.parent != parent:
            return parent
    return None
