"""Ranks that are slower than the others, by the part of a step in which nobody waits for anybody.

A whole step takes every rank equally long, for it ends with a reduction. What a rank does alone is
waiting for its data and looking at them with the teacher.
"""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from cmtmae_scale.runtime.collectives import ranks

FACTOR = 1.5
"""Times the median at which a rank counts as slow."""
LEAST_SHARE = 0.1
"""Smallest excess that matters, as a share of the whole time."""
LONG = 3
"""Intervals in a row after which a slow rank is named."""


class Stragglers:
    """Collects this rank's own time, and compares it with the others' once an interval.

    Args:
        device: where the work is done; on a GPU its own clock counts.
        every: steps of an interval.
    """

    def __init__(self, device: torch.device, every: int) -> None:
        self.on_gpu = device.type == "cuda"
        self.every = every
        self.own_s = 0.0
        self.laps: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.since = time.monotonic()
        self.slow: dict[int, int] = {}

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Count what is done here, idle moments of the device too; synchronises nothing."""
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

    def look(self, step: int) -> str | None:
        """At the end of an interval compare the ranks; a collective then.

        Call it after the step's host read, when the device has passed the laps.

        Args:
            step: number of the finished step.

        Returns:
            Which rank has long been slow, on every rank alike, or ``None``.
        """
        if step % self.every or ranks() == 1:
            return None
        self.own_s += sum(one.elapsed_time(other) for one, other in self.laps) / 1000
        mine = torch.tensor([self.own_s, time.monotonic() - self.since], dtype=torch.float64)
        everyone = [torch.empty_like(mine) for _ in range(ranks())]
        dist.all_gather(everyone, mine)
        self.own_s, self.laps, self.since = 0.0, [], time.monotonic()
        return self.judge([float(one[0]) for one in everyone], max(float(e[1]) for e in everyone))

    def judge(self, own_s: list[float], whole_s: float) -> str | None:
        """Name the slowest rank if it has been slow for ``LONG`` intervals, once until it recovers.

        Args:
            own_s: each rank's own seconds in this interval.
            whole_s: seconds of the interval.
        """
        median = statistics.median_low(own_s)
        bound = max(FACTOR * median, median + LEAST_SHARE * whole_s)
        self.slow = {
            rank: self.slow.get(rank, 0) + 1 for rank, own in enumerate(own_s) if own > bound
        }
        named = [rank for rank, times in self.slow.items() if times == LONG]
        if not named:
            return None
        slowest = max(named, key=own_s.__getitem__)
        return (
            f"rank {slowest} takes {own_s[slowest] / self.every:.3g} s a step for its data and the "
            f"teacher, the median rank {median / self.every:.3g} s, of {whole_s / self.every:.3g} "
            "s in all"
        )
