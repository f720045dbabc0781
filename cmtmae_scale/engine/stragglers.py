"""Ranks that are slower than the others.

A whole step takes every rank equally long, because it ends with a reduction. Each rank's own time
is its wait for data and the preparation of its micro-batches.
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
LEAST_FRACTION = 0.1
"""Smallest excess that matters, as a fraction of the interval."""
LONG = 3
"""Consecutive intervals after which a slow rank is named."""


class Stragglers:
    """Collects this rank's own time, and compares the ranks once per interval.

    Args:
        device: where the work is done; a GPU is timed by its own events.
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
    def own_time(self) -> Iterator[None]:
        """Count the time of the block, idle time of the device included; synchronises nothing."""
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

    def compare_ranks(self, step: int) -> str | None:
        """Compare the ranks at the end of an interval; a collective then.

        Call it after the host read of the step, when the device has passed the recorded events.

        Args:
            step: number of the finished step.

        Returns:
            Which rank has been slow for ``LONG`` intervals, the same on every rank, or ``None``.
        """
        if step % self.every or ranks() == 1:
            return None
        self.own_s += sum(one.elapsed_time(other) for one, other in self.laps) / 1000
        mine = torch.tensor([self.own_s, time.monotonic() - self.since], dtype=torch.float64)
        everyone = [torch.empty_like(mine) for _ in range(ranks())]
        dist.all_gather(everyone, mine)
        self.own_s, self.laps, self.since = 0.0, [], time.monotonic()
        return self.name_slowest(
            [float(one[0]) for one in everyone], max(float(e[1]) for e in everyone)
        )

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
