"""When a GPU is busy within a profiled step, and when it is idle."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

SHOWN = 15
"""Kernels, and gaps, that are reported."""
NAME = 80
"""Characters of a kernel's name that are reported."""


class Span(NamedTuple):
    """One kernel or copy on the device, in seconds of the profiler's clock."""

    start: float
    end: float
    name: str


@dataclass
class KernelTime:
    """All launches of a kernel within a step."""

    name: str
    seconds: float
    count: int


@dataclass
class Gap:
    """A time without a kernel or copy."""

    seconds: float
    before: str
    """Kernel or copy before the gap."""
    after: str
    """Kernel or copy after the gap."""


def device_spans(events: Iterable[Any]) -> list[Span]:
    """Return the kernels and copies among a profiler's events, without annotations, by start."""
    spans = [
        Span(event.time_range.start / 1e6, event.time_range.end / 1e6, event.name[:NAME])
        for event in events
        if event.device_type.name == "CUDA" and not getattr(event, "is_user_annotation", False)
    ]
    return sorted(spans)


def busy_and_gaps(spans: Sequence[Span]) -> tuple[float, list[Gap]]:
    """Return the seconds with at least one kernel, and the longest gaps; streams may overlap."""
    busy_s, gaps = 0.0, list[Gap]()
    last: Span | None = None
    for span in spans:
        if last is None or span.start >= last.end:
            if last is not None:
                gaps.append(Gap(span.start - last.end, last.name, span.name))
            busy_s += span.end - span.start
            last = span
        elif span.end > last.end:
            busy_s += span.end - last.end
            last = span
    return busy_s, sorted(gaps, key=lambda gap: -gap.seconds)[:SHOWN]


def longest_kernels(spans: Sequence[Span]) -> list[KernelTime]:
    """Return the kernels that take longest in all."""
    found: dict[str, KernelTime] = {}
    for span in spans:
        one = found.setdefault(span.name, KernelTime(span.name, 0.0, 0))
        one.seconds += span.end - span.start
        one.count += 1
    return sorted(found.values(), key=lambda one: -one.seconds)[:SHOWN]
