"""Tiny checkpoints, and saves of which every file operation can be the last or can fail."""

import logging
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cmtmae_scale.backends.base import Fragment
from cmtmae_scale.checkpoint import layout
from cmtmae_scale.checkpoint import writer as writer_module
from cmtmae_scale.checkpoint.chunks import load_fragments
from cmtmae_scale.checkpoint.find import find_checkpoint
from cmtmae_scale.checkpoint.writer import Writer
from cmtmae_scale.errors import ReplicaError

SHAPES = {"model.encoder.w": (5, 3), "model.decoder.b": (7,), "momentum.w": (5, 3)}
COUNTS = ("step", "position", "step0", "position0", "applied", "end_step", "horizon")
STATE = {
    "task": "pre-training",
    "progress": dict.fromkeys(COUNTS, 3),
    "skips": {"losses": [], "scheduled": [], "in_succession": 0},
    "log_interval": {"sums": {"a": 1.5}, "counts": {"a": 2}},
    "config": {},
    "index_digest": "",
    "world_size": 1,
    "versions": {},
}


def state_of(step: int) -> dict[str, Any]:
    """Content of a checkpoint of a step beside tensors."""
    return STATE | {"progress": dict.fromkeys(COUNTS, step)}


def values(key: str, version: int = 0) -> torch.Tensor:
    return torch.arange(float(np.prod(SHAPES[key]))) + len(key) + 100 * version


def fragments(
    parts: int = 1, part: int = 0, version: int = 0, fill: bool = True
) -> dict[str, Fragment]:
    found = {}
    for key, shape in SHAPES.items():
        whole = values(key, version)
        size = -(-len(whole) // parts)
        low = min(part * size, len(whole))
        local = whole[low : low + size].clone()
        found[key] = Fragment(low, shape, local if fill else torch.zeros_like(local), True)
    return found


def save(
    root: Path,
    step: int = 3,
    keep: int = 9,
    version: int = 0,
    ranks: int = 1,
    state: dict[str, Any] | None = None,
) -> Path:
    """All ranks' parts, written one after the other by one process."""
    root.mkdir(exist_ok=True)
    for rank in reversed(range(ranks)):
        writer = Writer(root, rank, ranks, keep, True, token=7)
        writer.timeout_s = 0.0
        assert writer.save(step, fragments(ranks, rank, version), state or state_of(step))
        writer.settle()
    return layout.folder_of(root, step)


def version_of(folder: Path) -> int:
    """Which version a checkpoint holds; all of it."""
    assert layout.find_damage(folder) is None
    blank = fragments(fill=False)
    load_fragments(folder, blank)
    for version in (0, 1):
        if all(torch.equal(part.local, values(key, version)) for key, part in blank.items()):
            return version
    raise AssertionError(f"{folder} mixes versions")


class Operations:
    """Counts the file operations of this process and acts at one of them.

    Counted: opening for writing, fsync, mkdir, rename, unlink, rmdir. fsync is only noted, so that
    a power cut can take away what was not forced to storage.
    """

    def __init__(self) -> None:
        self.act: Callable[[int, str], None] | None = None
        self.count = 0
        self.synced: set[int] = set()
        sys.addaudithook(self.hook)
        os.fsync = self.fsync

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & 3
        if self.act and (writes or event in {"os.mkdir", "os.rename", "os.remove", "os.rmdir"}):
            self.note(event)

    def fsync(self, handle: int) -> None:
        if self.act:
            self.note("fsync")
            self.synced.add(os.fstat(handle).st_ino)

    def note(self, event: str) -> None:
        self.count += 1
        if self.act:
            self.act(self.count, event)

    def during(self, act: Callable[[int, str], None], work: Callable[[], Any]) -> int:
        """Call ``work`` with an action at every operation; returns their number."""
        self.act, self.count = act, 0
        try:
            work()
        finally:
            self.act = None
        return self.count


# The state before a save, and the save.
SCENARIOS: dict[str, tuple[Callable[[Path], Any], Callable[[Path], Any]]] = {
    "over an older one": (lambda root: save(root, 1), lambda root: save(root, 2, version=1)),
    "with deletions": (
        lambda root: (save(root, 1), save(root, 2)),
        lambda root: save(root, 3, keep=1, version=1),
    ),
    "the same step again": (
        lambda root: save(root, 2),
        lambda root: save(root, 2, keep=1, version=1),
    ),
    "over a broken one": (
        lambda root: (save(root, 1), (save(root, 2) / layout.MANIFEST).unlink()),
        lambda root: save(root, 2, version=1),
    ),
    "of two ranks": (
        lambda root: save(root, 1, ranks=2),
        lambda root: save(root, 2, version=1, ranks=2),
    ),
}


def crash_everywhere(folder: Path, scenario: str) -> int:
    """End a process at each operation of a save; check what stays, and what a power cut leaves.

    Args:
        folder: an empty folder.
        scenario: key of ``SCENARIOS``.

    Returns:
        Number of operations, each of which was the last one, killed and without power.
    """
    operations = Operations()
    before, act = SCENARIOS[scenario]
    before(folder / "before")
    shutil.copytree(folder / "before", folder / "counted")
    total = operations.during(lambda number, event: None, lambda: act(folder / "counted"))
    for last in range(1, total + 1):
        left = (0.5, 0.0)[last % 2]  # of files that were not forced to storage
        killed, dark = folder / f"{last} killed", folder / f"{last} without power"
        shutil.copytree(folder / "before", killed)
        if os.fork() == 0:
            crash_at(last, left, killed, dark, operations, act)
        _, status = os.wait()
        assert os.waitstatus_to_exitcode(status) == 9
        for root in (killed, dark):
            check_after_crash(root, f"{scenario}, operation {last} of {total}, {root.name}, {left}")
            shutil.rmtree(root)
    return total


def crash_at(
    last: int,
    left: float,
    root: Path,
    dark: Path,
    operations: Operations,
    act: Callable[[Path], Any],
) -> None:
    """Save until an operation, and end this process there; ``dark`` is what a power cut leaves."""
    old = {path.stat().st_ino for path in root.rglob("*")}

    def crash(number: int, event: str) -> None:
        if number == last:
            operations.act = None
            cut_power(root, dark, old | operations.synced, left)
            os._exit(9)

    try:
        operations.during(crash, lambda: act(root))
    finally:
        os._exit(1)


def cut_power(root: Path, dark: Path, kept: set[int], left: float) -> None:
    """Copy a folder, with the files cut that were not forced to storage."""
    shutil.copytree(root, dark)
    for path in root.rglob("*"):
        if path.is_file() and path.stat().st_ino not in kept:
            os.truncate(dark / path.relative_to(root), int(path.stat().st_size * left))


def check_after_crash(root: Path, place: str) -> None:
    """The next launch finds a whole checkpoint, and saves as if nothing had happened."""
    layout.sweep(root)
    folder = find_checkpoint(root, 0, 1)
    assert folder is not None, place
    assert version_of(folder) in (0, 1), place
    following = save(root, 4, keep=1, version=1)
    assert find_checkpoint(root, 0, 1) == following, place
    assert version_of(following) == 1, place
    names = {path.name for path in root.iterdir()}
    assert names == {following.name, layout.LATEST}, f"{place}: {names}"


class Lines(logging.Handler):
    """Log lines of the packages, kept."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []
        logging.getLogger("cmtmae_scale").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def refuse_everywhere(folder: Path, scenario: str, code: int, stays: bool) -> int:
    """Let each operation of a save fail once, with an errno, and check how the run handles it.

    Args:
        folder: an empty folder.
        scenario: key of ``SCENARIOS``.
        code: errno.
        stays: everything after it that needs space fails too.

    Returns:
        Number of operations.
    """
    operations, log = Operations(), Lines()
    before, act = SCENARIOS[scenario]
    before(folder / "before")
    shutil.copytree(folder / "before", folder / "counted")
    total = operations.during(lambda number, event: None, lambda: act(folder / "counted"))
    assert log.lines == []
    for first in range(1, total + 1):
        root = folder / f"{first}"
        shutil.copytree(folder / "before", root)

        def refuse(number: int, event: str, first: int = first) -> None:
            frees = event in {"os.remove", "os.rmdir"}
            if number == first or (stays and number > first and not frees):
                raise OSError(code, os.strerror(code))

        operations.during(refuse, lambda root=root: act(root))
        place = f"{scenario}, operation {first} of {total}"
        litter = [path.name for path in root.glob(".draft-*")]
        assert not litter or not stays, f"{place}: {litter}"
        layout.sweep(root)
        newest = find_checkpoint(root, 0, 1)
        assert newest is not None, place
        told = [line for line in log.lines if "training continues" in line]
        assert len(told) <= 1, f"{place}: {told}"
        if version_of(newest) == 0:
            assert told and str(root) in told[0] and "check space" in told[0], place
            assert any(os.strerror(code) in line for line in log.lines), f"{place}: {log.lines}"
        log.lines.clear()
        following = save(root, 4, keep=1, version=1)
        assert log.lines == [], place
        assert find_checkpoint(root, 0, 1) == following, place
        assert not [path.name for path in root.glob(".*")], place
        shutil.rmtree(root)
    return total


def save_with_a_failing_rank(
    root: Path, background: bool, marked: bool
) -> tuple[list[bool], list[str]]:
    """Three saves of two ranks; at the first, rank 1's store refuses, perhaps even a mark."""
    import torch.distributed as dist

    rank, log = dist.get_rank(), Lines()
    writer = Writer(root, rank, 2, 9, background, token=7)
    write, give_up = writer_module.write_chunks, writer_module.mark_shard_failed

    def refuse(*_: Any) -> Any:
        raise OSError("no space")

    if rank == 1:
        writer_module.write_chunks = refuse
        if not marked:
            writer_module.mark_shard_failed = refuse
    started = [writer.save(1, fragments(2, rank), state_of(1))]
    writer.shard_done.wait()
    dist.barrier()
    writer_module.write_chunks, writer_module.mark_shard_failed = write, give_up
    started.append(writer.save(2, fragments(2, rank), state_of(2)))
    writer.wait()
    started.append(writer.save(3, fragments(2, rank), state_of(3)))
    writer.finish(3, fragments(2, rank), state_of(3))
    return started, log.lines


def save_replicas(root: Path, cases: list[dict[int, str]]) -> list[str]:
    """Save what all ranks hold alike, but for one flipped bit; by case the error.

    Args:
        root: for the checkpoints.
        cases: by rank the tensor in which the lowest bit of a value is flipped.
    """
    import torch.distributed as dist

    rank, size, told = dist.get_rank(), dist.get_world_size(), []
    for number, case in enumerate(cases, 1):
        held = {key: one._replace(owner=rank == 0) for key, one in fragments().items()}
        if rank in case:
            bits = held[case[rank]].local.view(torch.int32)
            bits[number] ^= 1
        writer = Writer(root, rank, size, 9, False, token=number)
        try:
            writer.save(number, held, state_of(number))
            told.append("")
        except ReplicaError as error:
            told.append(str(error))
    return told
