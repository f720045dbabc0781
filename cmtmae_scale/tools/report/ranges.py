"""What is expected of a run: its schedules, and what other runs of the same settings did."""

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

from cmtmae_scale.engine.resume import FREE_KEYS, is_listed
from cmtmae_scale.errors import EXIT_DONE, ConfigError
from cmtmae_scale.pretraining.scalars import scalars_at
from cmtmae_scale.pretraining.task import Pretraining
from cmtmae_scale.tools.report.chart import Band, Line, Point
from cmtmae_scale.tools.report.run import Run, read_run

KEPT = ("data.path", "data.source")
"""May change at a resume, for the images are compared there; here they must be equal."""
PLANNED_POINTS = 120


def identity(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings that two runs must share to be runs of one recipe: all that count but the seed."""
    return {
        key: value
        for key, value in settings.items()
        if key in KEPT
        or not (is_listed(key, FREE_KEYS + Pretraining.free_keys) or key == "run.seed")
    }


def earlier_runs(run: Run, given: Sequence[Run]) -> list[Run]:
    """Finished runs of the same recipe: those given, and those in folders beside.

    Only these say what to expect; without one no range is drawn.
    """
    if not run.settings:
        return []
    known = {one.dir.resolve(): one for one in given}
    own = run.dir.resolve()
    for folder in sorted(own.parent.iterdir()):
        if folder not in known and (folder / "exit.json").exists():
            try:
                known[folder] = read_run(folder)
            except (ConfigError, OSError):
                continue  # not a run, or not ours to read
    return [
        one
        for folder, one in known.items()
        if folder != own
        and one.exit is not None
        and one.exit.get("code") == EXIT_DONE
        and identity(one.settings) == identity(run.settings)
    ]


def expected(runs: Sequence[Run], name: str) -> tuple[list[Line], list[Band]]:
    """Lowest and highest value of other runs at each step, or the one run's own line."""
    curves = [curve for run in runs if (curve := run.series(name))]
    if not curves:
        return [], []
    if len(curves) == 1:
        return [Line("one other run of these settings", curves[0], planned=True)], []
    steps = sorted({step for curve in curves for step, _ in curve})
    points: list[tuple[float, float, float]] = []
    for step in steps:
        values = [value for curve in curves if (value := at(curve, step)) is not None]
        points.append((step, min(values), max(values)))
    return [], [Band(f"range of {len(curves)} other runs of these settings", points)]


def at(curve: Sequence[Point], step: float) -> float | None:
    """Value of a curve between its points; ``None`` outside."""
    place = bisect_left(curve, step, key=lambda point: point[0])
    if place == len(curve):
        return None
    (right, after) = curve[place]
    if right == step or not place:
        return after if right == step else None
    left, before = curve[place - 1]
    return before + (after - before) * (step - left) / (right - left)


def planned(run: Run, name: str) -> list[Point]:
    """A scheduled number over the whole run; empty where the schedule is not known for sure."""
    end = run.end_step
    if run.config is None or not end or run.state.get("progress", {}).get("step0", 0):
        return []
    count = min(PLANNED_POINTS, end)
    steps = [1 + (end - 1) * k / max(count - 1, 1) for k in range(count)]
    return [(step, getattr(scalars_at(run.config, (step - 1) / end), name)) for step in steps]
