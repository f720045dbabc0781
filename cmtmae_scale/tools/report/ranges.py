"""Expected values of a run: its schedules, and other runs of the same settings or of a study."""

import os
from bisect import bisect_left
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from cmtmae_scale.config.changes import (
    FINETUNING_FREE_KEYS,
    FREE_KEYS,
    PRETRAINING_FREE_KEYS,
    is_listed,
)
from cmtmae_scale.errors import ConfigError
from cmtmae_scale.finetuning.scalars import scalars_at as finetuning_scalars
from cmtmae_scale.pretraining.scalars import scalars_at as pretraining_scalars
from cmtmae_scale.runtime.storage import read_json
from cmtmae_scale.tools.report.chart import Band, Line, Point
from cmtmae_scale.tools.report.run import Run, is_drawable, open_run, read_records

KEPT = ("data.path", "data.test_path", "data.source")
"""Keys that may change at a resume, which compares the images; here they must be equal."""
PLANNED_POINTS = 120


def recipe_settings(run: Run) -> dict[str, Any]:
    """Return the settings that runs of one recipe share: those with an effect, but the seed."""
    of_task = FINETUNING_FREE_KEYS if run.is_tuning else PRETRAINING_FREE_KEYS
    free = ("run.seed", *FREE_KEYS, *of_task)
    return {k: v for k, v in run.inputs.items() if k in KEPT or not is_listed(k, free)}


def finished_siblings(run: Run, given: Sequence[Run]) -> list[Run]:
    """Return finished runs of the same recipe: the given runs, and runs in sibling folders.

    Without such a run no range is drawn.
    """
    if not run.settings or (run.is_tuning and run.encoder is None):
        return []
    known = {other.dir.resolve(): other for other in given}
    own, wanted = run.dir.resolve(), recipe_settings(run)

    def is_sibling(other: Run) -> bool:
        return other.is_complete and recipe_settings(other) == wanted

    found = [other for folder, other in known.items() if folder != own and is_sibling(other)]
    seen = {str(folder) for folder in known}
    for folder in sorted(own.parent.iterdir()):
        place = os.path.realpath(folder)  # a link to a run is not another run
        try:
            if place not in seen and (folder / "exit.json").exists():
                seen.add(place)
                other = open_run(folder)
                if is_sibling(other):  # the logs of all others are not read
                    read_records(other)
                    found.append(other)
        except (ConfigError, OSError):
            continue  # not a run, or not readable
    return found


def read_reference(file: Path, row: str) -> list[Run]:
    """Read the logged values of a row's runs from a study's record (``study --collect FILE``).

    Raises:
        ConfigError: if the file is not a study's record, or has no run of the row.
    """
    try:
        records = read_json(file.read_bytes())["runs"]
        found = [(f"{row}, seed {one['seed']}", one) for one in records if one["row"] == row]
        runs = [
            Run(
                file,
                label,
                row,
                logged={
                    name: [
                        (step, value)
                        for step, value in points
                        if is_drawable(step) and is_drawable(value)
                    ]
                    for name, points in one["series"].items()
                },
            )
            for label, one in found
        ]
        names = sorted({str(one["row"]) for one in records})
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"--reference {file}: is not a study's record ({error}); name a file that "
            "study --collect wrote"
        ) from error
    if not runs:
        has = f"its rows with a run are {', '.join(names)}" if names else "it has no run yet"
        raise ConfigError(f"--reference {file}: {row} has no run there; {has}")
    return runs


def expected_range(runs: Sequence[Run], name: str) -> tuple[list[Line], list[Band]]:
    """Return the range of other runs at each step, or the line of a single other run."""
    curves = [curve for run in runs if (curve := run.series(name))]
    if not curves:
        return [], []
    settings = "these settings" if runs[0].row is None else runs[0].row
    if len(curves) == 1:
        return [Line(f"one other run of {settings}", curves[0], planned=True)], []
    points = [(step, low, high) for step, _, low, high in band_of_curves(curves)]
    return [], [Band(f"range of {len(curves)} other runs of {settings}", points)]


def band_of_curves(curves: Sequence[Sequence[Point]]) -> list[tuple[float, float, float, float]]:
    """Return each step with mean, lowest and highest value of the curves that reach it."""
    points: list[tuple[float, float, float, float]] = []
    for step in sorted({step for curve in curves for step, _ in curve}):
        known = (interpolate_curve(curve, step) for curve in curves)
        values = [value for value in known if value is not None]
        points.append((step, sum(values) / len(values), min(values), max(values)))
    return points


def interpolate_curve(curve: Sequence[Point], step: float) -> float | None:
    """Interpolate a curve linearly; ``None`` outside."""
    place = bisect_left(curve, step, key=lambda point: point[0])
    if place == len(curve):
        return None
    (right, after) = curve[place]
    if right == step or not place:
        return after if right == step else None
    left, before = curve[place - 1]
    return before + (after - before) * (step - left) / (right - left)


def scheduled_values(run: Run, name: str) -> list[Point]:
    """Return a scheduled value over the whole run; empty where the schedule is unknown."""
    end = run.end_step
    if not end or run.progress.get("step0", 0):
        return []
    config, tuning, images = run.config, run.tuning, run.num_images
    if config is not None:
        at = partial(pretraining_scalars, config)
    elif tuning is not None and images:
        epochs = end * tuning.train.global_batch_size / images
        at = partial(finetuning_scalars, tuning, epochs=epochs)
    else:
        return []
    count = min(PLANNED_POINTS, end)
    steps = [1 + (end - 1) * k / max(count - 1, 1) for k in range(count)]
    return [(step, getattr(at((step - 1) / end), name)) for step in steps]
