"""Time on the device's own clock, split by parts, and the statistics of windows.

On a GPU the clock is a CUDA event, read after a window. On a CPU it is the CPU time of this
process over all its threads: on a shared machine wall time says little.
"""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple, TypeVar, cast

import torch

T = TypeVar("T")
Mark = float | torch.cuda.Event


class Stopwatch:
    """Sums the time of named parts between two calls of ``collect``.

    Args:
        device: whose clock is used.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.spans: list[tuple[str, Mark, Mark]] = []

    def mark(self) -> Mark:
        """Point in time; does not synchronise."""
        if not self.on_gpu:
            return time.process_time()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add(self, name: str, start: Mark, end: Mark) -> None:
        """Count the time between two marks to a part."""
        self.spans.append((name, start, end))

    def timed(self, name: str, call: Callable[[], T]) -> T:
        """Call, and count its time to a part."""
        start = self.mark()
        result = call()
        self.add(name, start, self.mark())
        return result

    def collect(self) -> dict[str, float]:
        """Seconds by part since the last call, in order of first use; waits for the device."""
        if self.on_gpu:
            torch.cuda.synchronize()
        sums: dict[str, float] = {}
        for name, start, end in self.spans:
            sums[name] = sums.get(name, 0.0) + seconds(start, end)
        self.spans.clear()
        return sums


def seconds(start: Mark, end: Mark) -> float:
    """Seconds between two marks of one clock."""
    if isinstance(start, torch.cuda.Event):
        return start.elapsed_time(cast(torch.cuda.Event, end)) / 1e3
    return cast(float, end) - start


class Spread(NamedTuple):
    """What windows of one quantity gave."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        """Median with the range."""
        return f"{self.median:.4g} ({self.low:.4g} to {self.high:.4g})"


def spread(values: list[float]) -> Spread:
    """Median, smallest and largest."""
    return Spread(statistics.median(values), min(values), max(values))
