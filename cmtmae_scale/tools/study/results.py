"""What came of the runs of a study: accuracies by row, references, comparisons."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cmtmae_scale.errors import ConfigError
from cmtmae_scale.evaluation.result import unpack_hits
from cmtmae_scale.tools.study.execute import minutes_of
from cmtmae_scale.tools.study.file import Study
from cmtmae_scale.tools.study.statistics import Test, holm, mcnemar, mean_and_deviation, paired_t
from cmtmae_scale.tools.study.work import Run


@dataclass
class Found:
    """Accuracies of one run."""

    run: Run
    primary: float
    """The measure that was named beforehand, as a share."""
    interval_95: tuple[float, float]
    """Wilson's, over the test images."""
    hits: NDArray[np.bool_]
    """Which test images the primary probe got right."""
    others: dict[str, float]
    """Every accuracy, by method and features."""
    images: tuple[str, str]
    """Digests of the probe's training and test images."""
    minutes: float | None
    """Wall time of the training."""
    sha256: str
    """Of the weights that were judged."""


@dataclass
class Reference:
    """Something that was not trained here, by the primary measure."""

    name: str
    accuracy: float
    interval_95: tuple[float, float]


@dataclass
class Line:
    """One row of the table."""

    name: str
    note: str
    found: list[Found]
    """One for each finished seed, in order."""
    wanted: int
    """Seeds that the study asks for."""

    @property
    def mean(self) -> float:
        """Mean of the primary measure."""
        return mean_and_deviation([one.primary for one in self.found])[0]

    @property
    def deviation(self) -> float | None:
        """Deviation over seeds; ``None`` for one."""
        return mean_and_deviation([one.primary for one in self.found])[1]


@dataclass
class Comparison:
    """A pair of rows, the first of which was expected to be better."""

    better: str
    other: str
    test: Test
    p_corrected: float
    """Holm's, over all comparisons of the study that could be made."""

    @property
    def verdict(self) -> str:
        """Whether what was expected shows."""
        if self.p_corrected >= 0.05:
            return "not shown"
        return "shown" if self.test.difference > 0 else "the opposite shown"


@dataclass
class Results:
    """Everything that is known of a study."""

    lines: list[Line]
    references: list[Reference]
    comparisons: list[Comparison]


def collect(study: Study, runs: Sequence[Run]) -> Results:
    """Read every result that is there.

    Raises:
        ConfigError: a result that cannot be read, or judged on other images than the rest.
    """
    features = study.evaluation.features
    found = [read_run(run, features) for run in runs if is_judged(run)]
    judged_on = {one.images: one for one in found}
    if len(judged_on) > 1:
        places = " and ".join(str(one.run.linear) for one in judged_on.values())
        raise ConfigError(f"{places} were judged on different images; delete the results of one")
    lines = [
        Line(
            name, row.note, [one for one in found if one.run.row == name], len(study.seeds_of(name))
        )
        for name, row in study.rows.items()
    ]
    tests = {
        (better, other): test
        for better, other in study.comparisons
        if (test := compare(*(line_of(lines, name).found for name in (better, other)))) is not None
    }
    corrected = holm({"/".join(pair): test.p for pair, test in tests.items()})
    comparisons = [
        Comparison(*pair, test, corrected["/".join(pair)]) for pair, test in tests.items()
    ]
    return Results(lines, list(read_references(runs, features)), comparisons)


def is_judged(run: Run) -> bool:
    """Whether both of a run's results are there."""
    return run.linear.exists() and run.knn.exists()


def line_of(lines: Sequence[Line], name: str) -> Line:
    """The row of a name."""
    return next(line for line in lines if line.name == name)


def compare(a: Sequence[Found], b: Sequence[Found]) -> Test | None:
    """Over the seeds that both have; over images where that is one; ``None`` where it is none."""
    ours, theirs = ({one.run.seed: one for one in found} for found in (a, b))
    seeds = [seed for seed in ours if seed in theirs]
    if len(seeds) > 1:
        return paired_t(*([own[seed].primary for seed in seeds] for own in (ours, theirs)))
    if not seeds:
        return None
    return mcnemar(ours[seeds[0]].hits, theirs[seeds[0]].hits)


def read_run(run: Run, features: str) -> Found:
    """A run's accuracies, without the references beside it."""
    linear, knn = read(run.linear), read(run.knn)
    subject = linear["results"][0]["weights"]
    rows = [one for record in (linear, knn) for one in record["results"]]
    own = [one for one in rows if one["weights"] == subject]
    primary = row_of(own, "linear", features, run.linear)
    others = {f"{family(one)} {one['features']}": one["accuracy"] for one in own}
    return Found(
        run,
        primary["accuracy"],
        tuple(primary["interval_95"]),
        unpack_hits(primary["hits"], primary["count"]),
        others,
        (linear["images"]["train"]["digest"], linear["images"]["test"]["digest"]),
        minutes_of(run),
        linear["subject"]["sha256"],
    )


def read_references(runs: Sequence[Run], features: str) -> list[Reference]:
    """The teacher, random weights and raw pixels, as far as they are there."""
    found: list[Reference] = []
    for run in runs:
        if run.teacher is not None and run.teacher.exists():
            rows = read(run.teacher)["results"]
            found.append(reference(row_of(rows, "linear", features, run.teacher)))
    first = runs[0].linear
    if first.exists():
        rows = read(first)["results"]
        for kind, name in ((features, "random weights"), ("pixels", "raw pixels")):
            rest = [one for one in rows if one["weights"] == name]
            found.append(reference(row_of(rest, "linear", kind, first)))
    return found


def reference(row: dict[str, Any]) -> Reference:
    """A line of a result as a reference."""
    return Reference(row["weights"], row["accuracy"], tuple(row["interval_95"]))


def row_of(
    rows: Sequence[dict[str, Any]], method: str, features: str, file: Path
) -> dict[str, Any]:
    """The line of a method and kind of features.

    Raises:
        ConfigError: if there is none.
    """
    for row in rows:
        if family(row) == method and row["features"] == features:
            return row
    raise ConfigError(f"{file}: has no {method} probe of {features}; choose other features")


def family(row: dict[str, Any]) -> str:
    """A line's method without what was chosen for it."""
    return row["method"].split(",")[0]


def read(file: Path) -> dict[str, Any]:
    """A result file.

    Raises:
        ConfigError: if it is damaged.
    """
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: cannot be read ({error}); delete it and run again") from error
