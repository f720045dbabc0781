"""Time on the device's own clock, split by stage, and statistics over windows.

On a GPU the clock is a CUDA event, read after a window. On a CPU it is the CPU time of all threads
of this process, because wall time on a shared machine depends on other processes.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar, cast

import torch

T = TypeVar("T")
Mark = float | torch.cuda.Event


class Stopwatch:
    """Sums the time of named stages between two calls of ``collect``, by the device's clock."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.spans: list[tuple[str, Mark, Mark]] = []

    def mark(self) -> Mark:
        """Return a point in time without host synchronisation."""
        if not self.on_gpu:
            return time.process_time()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add(self, name: str, start: Mark, end: Mark) -> None:
        """Add the time between two marks to a stage."""
        self.spans.append((name, start, end))

    def timed(self, name: str, call: Callable[[], T]) -> T:
        """Call a function and add its time to a stage."""
        start = self.mark()
        result = call()
        self.add(name, start, self.mark())
        return result

    def collect(self) -> dict[str, float]:
        """Return seconds by stage since the last call, by first use; waits for the device."""
        if self.on_gpu:
            torch.cuda.synchronize()
        sums: dict[str, float] = {}
        for name, start, end in self.spans:
            sums[name] = sums.get(name, 0.0) + elapsed_s(start, end)
        self.spans.clear()
        return sums


def elapsed_s(start: Mark, end: Mark) -> float:
    """Return the seconds between two marks of one clock."""
    if isinstance(start, torch.cuda.Event):
        return start.elapsed_time(cast(torch.cuda.Event, end)) / 1e3
    return cast(float, end) - start


@dataclass(frozen=True)
class Spread:
    """Median and range of a quantity over windows."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        """Return median, minimum and maximum of values."""
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:.4g} ({self.low:.4g} to {self.high:.4g})"
