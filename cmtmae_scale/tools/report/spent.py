"""Use of a run's time, from its log."""

from cmtmae_scale.tools.report.markup import escape, format_percent
from cmtmae_scale.tools.report.run import Run


def time_fractions(run: Run) -> dict[str, float]:
    """Return fractions of the time by use, which sum to 1; empty where no time was logged.

    Evaluations and figures are logged as fractions of the time since the last launch. Waiting is a
    fraction of the remaining time, weighted with the length of each interval.
    """
    logged = {"evaluations": "eval/time_fraction", "figures": "figures/time_fraction"}
    aside = {use: min(max(run.last(name) or 0.0, 0.0), 1.0) for use, name in logged.items()}
    intervals = log_intervals(run)
    total = sum(seconds for seconds, _ in intervals)
    if not total:
        return {}
    steps = max(1 - sum(aside.values()), 0.0)
    waiting = steps * min(sum(seconds * wait for seconds, wait in intervals) / total, 1.0)
    found = {"computing": steps - waiting, "waiting for data": waiting, **aside}
    return {use: fraction for use, fraction in found.items() if fraction > 0}


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
        f'<ul class="legend">{keys}</ul><p class="note">Since the last launch, on rank 0; '
        "saving counts as computing.</p></figure>"
    )
