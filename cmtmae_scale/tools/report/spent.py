"""Use of a run's time, from its log."""

from typing import NamedTuple

from cmtmae_scale.tools.report.markup import escape, format_percent
from cmtmae_scale.tools.report.run import Run


class TimeFraction(NamedTuple):
    """A labelled fraction of the time."""

    label: str
    fraction: float


def time_fractions(run: Run) -> list[TimeFraction]:
    """Return fractions of the time, which sum to 1; empty where no time was logged.

    Evaluations and figures are logged as fractions of the time since the last launch. Waiting is a
    fraction of the remaining time, weighted with the length of each interval.
    """
    aside = [
        TimeFraction(label, min(max(run.last(name) or 0.0, 0.0), 1.0))
        for name, label in (
            ("eval/time_fraction", "evaluations"),
            ("figures/time_fraction", "figures"),
        )
    ]
    intervals = log_intervals(run)
    total = sum(seconds for seconds, _ in intervals)
    if not total:
        return []
    steps = max(1 - sum(part.fraction for part in aside), 0.0)
    waiting = steps * min(sum(seconds * wait for seconds, wait in intervals) / total, 1.0)
    found = [
        TimeFraction("computing", steps - waiting),
        TimeFraction("waiting for data", waiting),
        *aside,
    ]
    return [part for part in found if part.fraction > 0]


def log_intervals(run: Run) -> list[tuple[float, float]]:
    """Return the relative length of each interval of the log, and its fraction of waiting."""
    found: list[tuple[float, float]] = []
    before = 0.0
    for entry in run.entries:
        speed = entry.get("images_s", 0.0)
        if speed > 0:
            found.append(((entry["step"] - before) / speed, entry.get("data_wait_fraction", 0.0)))
            before = entry["step"]
    return found


def time_bar(run: Run) -> str:
    """Draw the fractions as one bar with a legend."""
    found = time_fractions(run)
    if not found:
        return ""
    bar = "".join(
        f'<i class="f{k}" style="flex-grow:{part.fraction:.4f}"></i>'
        for k, part in enumerate(found, 1)
    )
    keys = "".join(
        f'<li><i class="f{k}"></i>{escape(part.label)} <b>{format_percent(part.fraction)}</b></li>'
        for k, part in enumerate(found, 1)
    )
    summary = ", ".join(f"{part.label} {format_percent(part.fraction)}" for part in found)
    return (
        '<figure class="spent"><figcaption>Use of time</figcaption>'
        f'<div class="bar" role="img" aria-label="{escape(summary)}">{bar}</div>'
        f'<ul class="legend">{keys}</ul><p class="note">Since the last launch, on rank 0; '
        "saving counts as computing.</p></figure>"
    )
