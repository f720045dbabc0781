"""Results of one run: read from the files of its evaluations, or from the study's record."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from cmtmae_scale.checkpoint.layout import is_count, is_finite
from cmtmae_scale.engine.summary import read_entries
from cmtmae_scale.engine.telemetry import LOG_FILE
from cmtmae_scale.errors import ConfigError, may_pass
from cmtmae_scale.evaluation.result import method_family, unpack_hits
from cmtmae_scale.tools.study.execute import training_minutes
from cmtmae_scale.tools.study.work import Run

TUNED = "fine-tuned"
PROVENANCE = ("versions", "date")
SERIES = ("eval/", "diagnostics/", "loss/")
"""Logged values that a record keeps."""
POINTS = 25
"""Largest number of points of a series."""

Series = dict[str, list[tuple[int, float]]]


class Accuracy(NamedTuple):
    """A fraction of the test images."""

    value: float
    interval_95: tuple[float, float]
    """Wilson's, over the test images."""


@dataclass
class Reference:
    """Weights that the study did not train, or raw pixels."""

    weights: str
    """What was evaluated."""
    primary: Accuracy
    """By the primary measure."""
    others: dict[str, Accuracy]
    """As in ``RunResult``."""


@dataclass
class RunResult:
    """Accuracies of one run."""

    run: Run
    primary: float
    """The measure fixed in advance, as a fraction."""
    interval_95: tuple[float, float]
    """Wilson's, over the test images."""
    count: int
    """Number of test images."""
    hits: str | None
    """Whether the primary probe classifies each test image correctly, as ``pack_hits`` encodes it;
    ``None``: in a record of an earlier version."""
    others: dict[str, Accuracy]
    """Every accuracy and mIoU, by method and features, and ``TUNED``."""
    images: tuple[str, str]
    """Digests of the probe's training and test images."""
    labels: dict[str, tuple[str, str]]
    """Digests of the training and test labels, of a segmentation those of its images with masks,
    by the field of ``Run`` that names the result file; results of earlier versions have none."""
    minutes: float | None
    """Wall time of the training."""
    sha256: str
    """Of the evaluated weights."""
    provenance: dict[str, Any]
    """Versions and date of the probe."""
    evaluations: list[str]
    """Names of the evaluations, with digests of their options."""
    references: list[Reference]
    """Measured with this run: the teacher, random weights, raw pixels."""
    series: Series
    """Step and value of logged values during the training."""


def read_run_result(run: Run, features: str) -> RunResult:
    """Read a run's accuracies, and the references that were measured with it.

    Raises:
        ConfigError: files that are not those of an evaluation.
    """
    try:
        return join_results(run, features)
    except (LookupError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{run.linear.parent}: the files are not results of cmtmae evaluate ({error!r}); "
            "delete them and run again"
        ) from error


def join_results(run: Run, features: str) -> RunResult:
    """Join the result files of a run."""
    linear, knn = read_result(run.linear), read_result(run.knn)
    rows = [*linear["results"], *knn["results"]]
    by_name = {"linear": linear, "knn": knn}
    if run.segmentation is not None and run.segmentation.exists():
        by_name["segmentation"] = read_result(run.segmentation)
        rows += by_name["segmentation"]["results"]
        if any(row["interval_95"] is None for row in by_name["segmentation"]["results"]):
            raise ConfigError(
                f"{run.segmentation}: one test image gives no interval; give the study's "
                "evaluation.segmentation two or more"
            )
    subject = rows[0]["weights"]
    own = [one for one in rows if one["weights"] == subject]
    primary = find_row(own, "linear", features, run.linear)
    others = measures_of(own, features)
    if run.tuned is not None and run.tuned.exists():
        by_name["tuned"] = read_result(run.tuned)
        others[TUNED] = accuracy_of(by_name["tuned"]["results"][0])
    rest = [one for one in rows if one["weights"] != subject]
    rest += [one for file in run.teacher if file.exists() for one in read_result(file)["results"]]
    return RunResult(
        run,
        primary["accuracy"],
        tuple(primary["interval_95"]),
        primary["count"],
        primary["hits"],
        others,
        (linear["images"]["train"]["digest"], linear["images"]["test"]["digest"]),
        {name: found for name, tree in by_name.items() if (found := labels_of(tree)) is not None},
        training_minutes(run),
        linear["subject"]["sha256"],
        {key: linear[key] for key in PROVENANCE if key in linear},
        [job.output.stem for job in run.jobs if job.kind == "evaluate" and job.done()],
        make_references(rest, features),
        read_series(run.folder / LOG_FILE),
    )


def labels_of(result: dict[str, Any]) -> tuple[str, str] | None:
    """Return the digests of a result's labels; ``None``: an earlier version wrote it.

    Of a segmentation they are those of its images with masks.
    """
    images = result.get("images", {})
    key = "digest" if result.get("method") == "segmentation" else "labels_digest"
    found = [images.get(part, {}).get(key) for part in ("train", "test")]
    return None if None in found else (found[0], found[1])


def measures_of(rows: Sequence[dict[str, Any]], features: str) -> dict[str, Accuracy]:
    """Return accuracies and mIoU in the lines of result files, by method and features.

    Args:
        rows: lines of one set of weights.
        features: name for raw pixels, which have a single kind.
    """
    found: dict[str, Accuracy] = {}
    for row in rows:
        kind = row.get("measure") or row["features"].replace("pixels", features)
        if kind != "pixel accuracy":  # of a segmentation, beside its mIoU
            found[f"{method_family(row['method'])} {kind}"] = accuracy_of(row)
    return found


def accuracy_of(row: dict[str, Any]) -> Accuracy:
    """Return the accuracy, or the mIoU, in a line of a result file."""
    value = row["value"] if "value" in row else row["accuracy"]
    return Accuracy(value, tuple(row["interval_95"]))


def make_references(rows: Sequence[dict[str, Any]], features: str) -> list[Reference]:
    """Return the references in the lines of result files, by name."""
    by_weights: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_weights.setdefault(row["weights"], []).append(row)
    found = [(name, measures_of(own, features)) for name, own in by_weights.items()]
    primary = f"linear {features}"
    return [Reference(name, own[primary], own) for name, own in found if primary in own]


def read_series(log: Path) -> Series:
    """Read the logged values that a record keeps, at most ``POINTS`` of each, the last included."""
    found: dict[str, dict[int, float]] = {}
    for entry in read_entries(log):
        step = entry.get("step")
        for name, value in entry.items():
            is_kept = name.startswith(SERIES) and not name.endswith("time_fraction")
            if is_kept and isinstance(step, int) and is_finite(value):
                found.setdefault(name, {})[step] = float(f"{value:.4g}")
    return {
        name: sorted(values.items())[::-1][:: math.ceil(len(values) / POINTS)][::-1]
        for name, values in found.items()
    }


def recorded_result(run: Run) -> RunResult:
    """Return the results that the study's record has of a run.

    Raises:
        ConfigError: if they are incomplete.
    """
    record = run.recorded or {}
    try:
        others = recorded_measures(record["accuracies"])
        primary = f"linear {record['features']}"
        count, hits, minutes = record["count"], record["hits"], record["training_minutes"]
        if not is_count(count) or not count:
            raise TypeError(f"count={count!r} is not a number of images")
        if hits is not None:
            unpack_hits(hits, count)
        return RunResult(
            run,
            require_finite(record["primary"]),
            others[primary].interval_95,
            count,
            hits,
            others,
            require_digests(record["images"]),
            {name: require_digests(pair) for name, pair in record.get("labels", {}).items()},
            None if minutes is None else require_finite(minutes),
            record["weights_sha256"],
            {key: record[key] for key in PROVENANCE if key in record},
            record["evaluations"],
            [
                Reference(name, measures[primary], measures)
                for name, accuracies in record["references"].items()
                for measures in [recorded_measures(accuracies)]
            ],
            {
                name: [(require_finite(x), require_finite(y)) for x, y in points]
                for name, points in record["series"].items()
            },
        )
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"the study's record: {run.row}, seed {run.seed}: not a result ({error!r}); delete its "
            "line, and the run is trained again"
        ) from error


def recorded_measures(accuracies: dict[str, Any]) -> dict[str, Accuracy]:
    """Return accuracies in the study's record: value, and the ends of the interval, by measure."""
    return {
        name: Accuracy(value, (low, high))
        for name, values in accuracies.items()
        for value, low, high in [map(require_finite, values)]
    }


def require_finite(value: Any) -> Any:
    """Return a number of the study's record.

    Raises:
        TypeError: for anything else.
    """
    if not is_finite(value):
        raise TypeError(f"{value!r} is not a finite number")
    return value


def require_digests(values: Any) -> tuple[str, str]:
    """Return two digests of the study's record.

    Raises:
        TypeError, ValueError: for anything else.
    """
    train, test = values
    if not isinstance(train, str) or not isinstance(test, str):
        raise TypeError(f"{values!r} are not digests")
    return train, test


def find_row(
    rows: Sequence[dict[str, Any]], method: str, features: str, file: Path
) -> dict[str, Any]:
    """Return the line of a method and kind of features.

    Raises:
        ConfigError: if there is none.
    """
    for row in rows:
        if method_family(row["method"]) == method and row["features"] == features:
            return row
    raise ConfigError(f"{file}: has no {method} probe of {features}; choose other features")


def read_result(file: Path) -> dict[str, Any]:
    """Read a result file.

    Raises:
        ConfigError: if it is damaged, or has a number that is not finite.
        OSError: if the store fails.
    """
    try:
        return json.loads(
            file.read_text(), parse_constant=refuse_constant, parse_float=parse_finite
        )
    except (OSError, ValueError) as error:
        if may_pass(error):
            raise
        raise ConfigError(f"{file}: cannot be read ({error}); delete it and run again") from error


def parse_finite(text: str) -> float:
    """Return a JSON number.

    Raises:
        ValueError: for a number beyond float64, which Python reads as infinity.
    """
    value = float(text)
    return value if math.isfinite(value) else refuse_constant(text)


def refuse_constant(name: str) -> float:
    """Refuse NaN and infinities, which Python's JSON reads as numbers.

    Raises:
        ValueError: always.
    """
    raise ValueError(f"{name} is not a result")
