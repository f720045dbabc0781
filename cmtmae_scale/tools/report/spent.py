"""Use of a run's time, from its log."""

from cmtmae_scale.tools.report.markup import escape, format_percent
from cmtmae_scale.tools.report.run import Run, is_drawable

LOGGED = {"evaluations": "eval/time_fraction", "figures": "figures/time_fraction"}


def time_fractions(run: Run) -> dict[str, float]:
    """Return fractions of the time by use, which sum to 1; empty where no time was logged.

    Evaluations and figures are logged as fractions of the time since a launch, whose steps took the
    rest. Waiting is a fraction of the time of the steps. Launches are added up.
    """
    spent = dict.fromkeys(("computing", "waiting for data", *LOGGED), 0.0)
    for start, entries in split_launches(run):
        intervals = log_intervals(entries, start)
        steps = sum(length for length, _ in intervals)
        if not steps:
            continue
        aside = {use: min(max(last_value(entries, name), 0.0), 1.0) for use, name in LOGGED.items()}
        whole = steps / max(1 - sum(aside.values()), 1e-3)
        waiting = min(sum(length * wait for length, wait in intervals), steps)
        spent["computing"] += steps - waiting
        spent["waiting for data"] += waiting
        for use, fraction in aside.items():
            spent[use] += whole * fraction
    total = sum(spent.values())
    return {use: length / total for use, length in spent.items() if length > 0}


def split_launches(run: Run) -> list[tuple[float, list[dict[str, float]]]]:
    """Return the first step and the log entries of each launch; later launches cut the log."""
    steps = [launch.get("step") for launch in run.launches[1:]]
    starts = sorted({0.0, *(float(step) for step in steps if is_drawable(step))})
    ends = [*starts[1:], float("inf")]
    return [
        (start, [entry for entry in run.entries if start < entry["step"] <= end])
        for start, end in zip(starts, ends, strict=True)
    ]


def last_value(entries: list[dict[str, float]], name: str) -> float:
    """Return the last value of a name; 0 where it was not logged."""
    return next((entry[name] for entry in reversed(entries) if name in entry), 0.0)


def log_intervals(entries: list[dict[str, float]], start: float) -> list[tuple[float, float]]:
    """Return the relative length of each interval of the log, and its fraction of waiting."""
    found: list[tuple[float, float]] = []
    before = start
    for entry in entries:
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
