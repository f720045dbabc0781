"""Ranks that are slower than the others.

A whole step takes every rank equally long, because it ends with a reduction. Each rank's own time
is its wait for data and the teacher's forward, which wait for no other rank.
"""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from cmtmae_scale.runtime.collectives import ranks

FACTOR = 1.5
"""Multiple of the median above which a rank counts as slow."""
LEAST_FRACTION = 0.1
"""Smallest excess that matters, as a fraction of the interval."""
LONG = 3
"""Consecutive intervals after which a slow rank is named."""


class Stragglers:
    """Collects this rank's own time, and compares the ranks once per interval.

    Args:
        device: where the work is done; a GPU is timed by its own events.
        every: steps of an interval.
        rank: this rank.
    """

    def __init__(self, device: torch.device, every: int, rank: int = 0) -> None:
        self.device = device
        self.on_gpu = device.type == "cuda"
        self.every = every
        self.rank = rank
        self.own_s = 0.0
        self.laps: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.since = time.monotonic()
        self.slow: dict[int, int] = {}

    @contextmanager
    def own_time(self) -> Iterator[None]:
        """Count the time of the block, including idle time of the device; does not synchronise."""
        if ranks() == 1:
            yield  # there is no other rank to compare with
            return
        if not self.on_gpu:
            began = time.monotonic()
            yield
            self.own_s += time.monotonic() - began
            return
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began.record()
        yield
        ended.record()
        self.laps.append((began, ended))

    def own_seconds(self, step: int) -> Tensor:
        """Return what the ranks compare at the end of an interval, for the step's report.

        Call it once per step, after the last block of ``own_time`` of the step.

        Args:
            step: number of the step.

        Returns:
            float32 ``[W + 1]`` on the device, to be summed over W ranks: this rank's own seconds at
            its index, and last the seconds of the interval divided by W. Empty within an interval
            and with one rank. No host synchronisation.
        """
        if step % self.every or ranks() == 1:
            return torch.zeros(0, device=self.device)
        # The device has passed the events before the last host read.
        passed = [lap for lap in self.laps if lap[1].query()]
        self.own_s += sum(one.elapsed_time(other) for one, other in passed) / 1000
        entries = torch.zeros(ranks() + 1, device=self.device)
        entries[self.rank] = self.own_s
        entries[-1] = (time.monotonic() - self.since) / ranks()
        self.own_s, self.laps, self.since = 0.0, self.laps[len(passed) :], time.monotonic()
        return entries

    def compare_ranks(self, own_s: list[float]) -> str | None:
        """Compare the ranks at the end of an interval.

        Args:
            own_s: ``own_seconds``, summed over ranks.

        Returns:
            Which rank has been slow for ``LONG`` intervals, the same on every rank, or ``None``.
        """
        return self.name_slowest(own_s[:-1], own_s[-1]) if own_s else None

    def name_slowest(self, own_s: list[float], whole_s: float) -> str | None:
        """Name the slowest rank if it has been slow for ``LONG`` intervals, once until it recovers.

        Args:
            own_s: each rank's own seconds in this interval.
            whole_s: seconds of the interval.
        """
        median = statistics.median_low(own_s)
        bound = max(FACTOR * median, median + LEAST_FRACTION * whole_s)
        self.slow = {
            rank: self.slow.get(rank, 0) + 1 for rank, own in enumerate(own_s) if own > bound
        }
        named = [rank for rank, times in self.slow.items() if times == LONG]
        if not named:
            return None
        slowest = max(named, key=own_s.__getitem__)
        return (
            f"rank {slowest} takes {own_s[slowest] / self.every:.3g} s per step for its data and "
            f"preparation, the median rank {median / self.every:.3g} s, of "
            f"{whole_s / self.every:.3g} s in all"
        )
