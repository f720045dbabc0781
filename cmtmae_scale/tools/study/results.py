"""Results of a study: rows, references, comparisons; refuses runs that do not belong together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cmtmae_scale.errors import ConfigError
from cmtmae_scale.evaluation.result import unpack_hits
from cmtmae_scale.tools.study.file import Study
from cmtmae_scale.tools.study.run_results import (
    TUNED,
    Reference,
    RunResult,
    read_run_result,
    recorded_result,
)
from cmtmae_scale.tools.study.statistics import (
    PairedTest,
    holm_correction,
    mcnemar,
    mean_and_std,
    paired_t,
)
from cmtmae_scale.tools.study.work import Run


@dataclass
class StudyRow:
    """One row of the table."""

    name: str
    note: str
    found: list[RunResult]
    """One result per finished seed, in order."""
    num_seeds: int
    """Number of seeds in the study."""

    @property
    def mean(self) -> float:
        """Mean of the primary measure."""
        return mean_and_std([one.primary for one in self.found])[0]

    @property
    def std(self) -> float | None:
        """Standard deviation over seeds; ``None`` for one seed."""
        return mean_and_std([one.primary for one in self.found])[1]


@dataclass
class Comparison:
    """A pair of rows, of which the first is expected to be better."""

    better: str
    other: str
    measure: str
    """Key of ``RunResult.others``."""
    test: PairedTest
    p_corrected: float
    """Holm's correction, over all available comparisons of the study."""

    @property
    def verdict(self) -> str:
        """Whether the test confirms the expectation."""
        if self.p_corrected >= 0.05:
            return "not shown"
        return "shown" if self.test.difference > 0 else "the opposite shown"


@dataclass
class Results:
    """All results of a study."""

    rows: list[StudyRow]
    references: list[Reference]
    comparisons: list[Comparison]


def collect_results(study: Study, runs: Sequence[Run]) -> Results:
    """Read all available results.

    Raises:
        ConfigError: a result that cannot be read, or results on different images or labels.
    """
    features = study.evaluation.features
    found = [
        recorded_result(run) if run.recorded is not None else read_run_result(run, features)
        for run in runs
        if run.recorded is not None or (run.linear.exists() and run.knn.exists())
    ]
    require_one({one.images: name_place(one, "linear") for one in found}, "on different images")
    for name in ("linear", "knn", "tuned", "segmentation"):
        having = [one for one in found if name in one.labels]
        places = {one.labels[name]: name_place(one, name) for one in having}
        what = "masks" if name == "segmentation" else "labels"
        require_one(places, f"with different {what}")
    by_row: dict[str, list[RunResult]] = {name: [] for name in study.rows}
    for one in found:
        by_row[one.run.row].append(one)
    rows = [
        StudyRow(name, row.note, by_row[name], len(study.seeds_of(name)))
        for name, row in study.rows.items()
    ]
    by_name = {row.name: row.found for row in rows}
    tests = {
        (better, other, measure): test
        for measure in tested_measures(study)
        for better, other in study.comparisons
        if (test := compare_rows(by_name[better], by_name[other], measure)) is not None
    }
    corrected = holm_correction({key: test.p for key, test in tests.items()})
    comparisons = [Comparison(*key, test, corrected[key]) for key, test in tests.items()]
    named = {reference.weights: reference for one in found[::-1] for reference in one.references}
    references = sorted(named.values(), key=lambda one: -one.primary.value)
    return Results(rows, references, comparisons)


def name_place(one: RunResult, name: str) -> str:
    """Return the result file of a run, by the field of ``Run`` that names it, or its record."""
    run = one.run
    if run.recorded is not None:
        return f"the record of {run.row} seed {run.seed}"
    return str(getattr(run, name))


def require_one(places: Mapping[tuple[str, str], str], how: str) -> None:
    """Refuse results that differ in the images or labels that they were measured with.

    Args:
        places: the place of a result by each pair of digests that was found.
        how: how the results differ, as in "were evaluated HOW".

    Raises:
        ConfigError: if there are several.
    """
    if len(places) > 1:
        found = " and ".join(places.values())
        raise ConfigError(f"{found} were evaluated {how}; delete the results of one")


def tested_measures(study: Study) -> list[str]:
    """Return the measures of the comparisons: the primary, and fine-tuning where there is one."""
    tuned = [] if study.evaluation.finetune is None else [TUNED]
    return [f"linear {study.evaluation.features}", *tuned]


def compare_rows(a: Sequence[RunResult], b: Sequence[RunResult], measure: str) -> PairedTest | None:
    """Test over common seeds; for a single common seed, the primary measure over images.

    Returns:
        ``None`` where no test is possible.
    """
    ours, theirs = (
        {one.run.seed: one for one in found if measure in one.others} for found in (a, b)
    )
    seeds = [seed for seed in ours if seed in theirs]
    if len(seeds) > 1:
        values = ([own[seed].others[measure].value for seed in seeds] for own in (ours, theirs))
        return paired_t(*values, resolution=1 / min(one.count for one in (*a, *b)))
    if not seeds or measure == TUNED:
        return None
    first, second = ours[seeds[0]], theirs[seeds[0]]
    if first.hits is None or second.hits is None:
        return None
    return mcnemar(*(unpack_hits(str(one.hits), one.count) for one in (first, second)))
