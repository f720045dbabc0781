"""Where a run's time went, as far as the log tells."""

from typing import NamedTuple

from cmtmae_scale.tools.report.markup import percent, text
from cmtmae_scale.tools.report.run import Run


class Share(NamedTuple):
    """A part of the time."""

    label: str
    share: float


def shares(run: Run) -> list[Share]:
    """Shares of the time, which sum to 1; empty where nothing was timed.

    Evaluations and pictures are logged as shares of the time since the last start. Waiting is a
    share of what is left for steps, weighted with the length of each interval.
    """
    aside = [
        Share(label, min(max(run.last(name) or 0.0, 0.0), 1.0))
        for name, label in (
            ("eval/time_share", "evaluations"),
            ("pictures/time_share", "pictures"),
        )
    ]
    took = intervals(run)
    total = sum(seconds for seconds, _ in took)
    if not total:
        return []
    steps = max(1 - sum(part.share for part in aside), 0.0)
    waiting = steps * min(sum(seconds * wait for seconds, wait in took) / total, 1.0)
    found = [Share("computing", steps - waiting), Share("waiting for data", waiting), *aside]
    return [part for part in found if part.share > 0]


def intervals(run: Run) -> list[tuple[float, float]]:
    """Relative length of each interval of the log, and its share of waiting."""
    found: list[tuple[float, float]] = []
    before = 0.0
    for entry in run.entries:
        speed = entry.get("images_s", 0.0)
        if speed > 0:
            found.append(((entry["step"] - before) / speed, entry.get("data_wait_share", 0.0)))
            before = entry["step"]
    return found


def spent(run: Run) -> str:
    """The shares as one bar with a legend."""
    found = shares(run)
    if not found:
        return ""
    bar = "".join(
        f'<i class="f{k}" style="flex-grow:{part.share:.4f}"></i>'
        for k, part in enumerate(found, 1)
    )
    keys = "".join(
        f'<li><i class="f{k}"></i>{text(part.label)} <b>{percent(part.share)}</b></li>'
        for k, part in enumerate(found, 1)
    )
    said = ", ".join(f"{part.label} {percent(part.share)}" for part in found)
    return (
        '<figure class="spent"><figcaption>Where time went</figcaption>'
        f'<div class="bar" role="img" aria-label="{text(said)}">{bar}</div>'
        f'<ul class="legend">{keys}</ul><p class="note">Since the last start, on the first rank; '
        "saving counts as computing.</p></figure>"
    )
