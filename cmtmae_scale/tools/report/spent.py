"""Use of a run's time, from its log."""

from bisect import bisect_right
from itertools import pairwise
from operator import itemgetter

from cmtmae_scale.tools.report.chart import Point
from cmtmae_scale.tools.report.markup import escape, format_percent
from cmtmae_scale.tools.report.run import Run, is_drawable

LOGGED = {"evaluations": "eval/time_fraction", "figures": "figures/time_fraction"}


def time_fractions(run: Run) -> dict[str, float]:
    """Return fractions of the time by use, which sum to 1; empty where no time was logged.

    Evaluations and figures are logged as fractions of the time since a launch, whose steps took the
    rest. Waiting is a fraction of the time of the steps. Launches are added up.
    """
    spent = dict.fromkeys(("computing", "waiting for data", *LOGGED), 0.0)
    for start, end in split_launches(run):
        intervals = log_intervals(run, start, end)
        steps = sum(length for length, _ in intervals)
        if not steps:
            continue
        aside = {use: last_fraction(run, name, start, end) for use, name in LOGGED.items()}
        whole = steps / max(1 - sum(aside.values()), 1e-3)
        waiting = min(sum(length * wait for length, wait in intervals), steps)
        spent["computing"] += steps - waiting
        spent["waiting for data"] += waiting
        for use, fraction in aside.items():
            spent[use] += whole * fraction
    total = sum(spent.values())
    return {use: length / total for use, length in spent.items() if length > 0}


def split_launches(run: Run) -> list[tuple[float, float]]:
    """Return the steps of each launch: above the first number, up to the second."""
    steps = [launch.get("step") for launch in run.launches[1:]]
    starts = sorted({0.0, *(float(step) for step in steps if is_drawable(step))})
    return list(pairwise([*starts, float("inf")]))


def logged_between(run: Run, name: str, start: float, end: float) -> list[Point]:
    """Return steps and values of one logged name in a launch; a later launch cuts the log."""
    points, step = run.series(name), itemgetter(0)
    return points[bisect_right(points, start, key=step) : bisect_right(points, end, key=step)]


def last_fraction(run: Run, name: str, start: float, end: float) -> float:
    """Return the last fraction of a launch; 0 where it was not logged."""
    points = logged_between(run, name, start, end)
    return min(max(points[-1][1], 0.0), 1.0) if points else 0.0


def log_intervals(run: Run, start: float, end: float) -> list[tuple[float, float]]:
    """Return the relative length of each interval of the log, and its fraction of waiting."""
    waits = dict(logged_between(run, "data_wait_fraction", start, end))
    found: list[tuple[float, float]] = []
    before = start
    for step, speed in logged_between(run, "images_s", start, end):
        if speed > 0:
            found.append(((step - before) / speed, waits.get(step, 0.0)))
            before = step
    return found


def time_bar(run: Run) -> str:
    """Draw the fractions as one bar with a legend."""
    found = time_fractions(run)
    if not found:
        return ""
    bar = "".join(
        f'<i class="f{k}" style="flex-grow:{fraction:.4f}"></i>'
        for k, fraction in enumerate(found.values(), 1)
    )
    keys = "".join(
        f'<li><i class="f{k}"></i>{escape(use)} <b>{format_percent(fraction)}</b></li>'
        for k, (use, fraction) in enumerate(found.items(), 1)
    )
    summary = ", ".join(f"{use} {format_percent(fraction)}" for use, fraction in found.items())
    return (
        '<figure class="spent"><figcaption>Use of time</figcaption>'
        f'<div class="bar" role="img" aria-label="{escape(summary)}">{bar}</div>'
        f'<ul class="legend">{keys}</ul><p class="note">All launches, on rank 0; '
        "saving counts as computing.</p></figure>"
    )
