"""The record of a study, ``NAME.json``: written after every launch, and read by the next.

A run whose folder is missing keeps its results in the record, so that a study continues on another
machine from that file alone.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cmtmae_scale.errors import ConfigError, may_pass
from cmtmae_scale.tools.study.file import Study, is_list_of
from cmtmae_scale.tools.study.results import Results
from cmtmae_scale.tools.study.run_results import (
    Accuracy,
    RunResult,
    parse_finite,
    recorded_result,
    refuse_constant,
)
from cmtmae_scale.tools.study.table import row_command
from cmtmae_scale.tools.study.work import Record, Run

logger = logging.getLogger(__name__)

PROBES = ("linear-", "knn-")
"""Beginnings of the names of the evaluations that every run has."""


def read_record(file: Path) -> list[Record]:
    """Return the runs of a record, the unmatched ones too; none where there is no file.

    Raises:
        ConfigError: if it is not a study's record, or has a number that is not finite.
        OSError: if the store fails.
    """
    try:
        text = file.read_text()
        tree = json.loads(text, parse_constant=refuse_constant, parse_float=parse_finite)
        runs = [*tree["runs"], *tree.get("unmatched", [])]
        for one in runs:
            names = one.get("evaluations", [])
            if not isinstance(one["settings_digest"], str) or not is_list_of(names, str):
                raise TypeError(f"{one['row']}, seed {one['seed']}: names that are not text")
        return [{"row": one["row"], "seed": one["seed"]} | one for one in runs]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        if may_pass(error):
            raise
        raise ConfigError(
            f"{file}: is not the record of a study ({error!r}); move it elsewhere and run again"
        ) from error


def adopt_records(
    study: Study, runs: Sequence[Run], records: Sequence[Record]
) -> tuple[list[Run], list[Record]]:
    """Give the runs whose folder is missing their recorded results.

    Returns:
        The runs, and the records that match no run: the settings of the study, or its evaluation,
        have changed, or the run is being trained again.

    Raises:
        ConfigError: a recorded result that cannot be used.
    """
    adopted: list[Run] = []
    used: list[Record] = []
    for run in runs:
        found = None if run.folder.exists() else find_record(records, run, study)
        if found is not None:
            used.append(found)
            run = replace(run, recorded=found)
            recorded_result(run)  # a damaged one is refused before anything runs
        adopted.append(run)
    partial = [run for run in adopted if lacks_evaluation(run)]
    if partial:
        logger.info(
            "recorded runs without a folder that lack an evaluation: %d (%s); to train one again, "
            "delete its line in the record",
            *(len(partial), ", ".join(f"{run.row} seed {run.seed}" for run in partial)),
        )
    rest = [one for one in records if not any(is_part_of(one, other) for other in used)]
    unmatched = without_files(study, rest)
    if unmatched:
        names = ", ".join(f"{one['row']} seed {one['seed']}" for one in unmatched)
        logger.warning(
            "recorded results that do not count now: %d (%s): settings or evaluation have changed, "
            "or the run is trained again; they stay in the record as unmatched",
            *(len(unmatched), names),
        )
    return adopted, unmatched


def find_record(records: Sequence[Record], run: Run, study: Study) -> Record | None:
    """Return the record of a run; among rows with equal settings the run's own row comes first."""
    features = study.evaluation.features
    own = [one for one in records if one["settings_digest"] == run.folder.name]
    usable = [one for one in own if is_result_of(one, run, features)]
    usable.sort(key=lambda one: one["row"] != run.row)
    return usable[0] if usable else None


def is_part_of(record: Record, other: Record) -> bool:
    """Return whether another record of the same run has the same evaluations, or more."""
    names, others = (set(one.get("evaluations", ())) for one in (record, other))
    return record["settings_digest"] == other["settings_digest"] and bool(names) and names <= others


def without_files(study: Study, records: Sequence[Record]) -> list[Record]:
    """Return the records whose results are not in the files of the study."""

    def has_files(record: Record) -> bool:
        folder = Path(study.dir) / "runs" / str(record["settings_digest"]) / "evaluation"
        names = [one for one in record.get("evaluations", ()) if one.startswith(PROBES)]
        return bool(names) and all((folder / f"{one}.json").exists() for one in names)

    return [one for one in records if not has_files(one)]


def is_result_of(record: Record, run: Run, features: str) -> bool:
    """Return whether a record has the probe and k-NN of a run, as the study measures them."""
    probes = (job for job in run.jobs if job.output in (run.linear, run.knn))
    names = record.get("evaluations", ())
    return all(job.is_among(names) for job in probes) and record.get("features") == features


def lacks_evaluation(run: Run) -> bool:
    """Return whether a recorded run lacks an evaluation that the study has now."""
    jobs = (job for job in run.jobs if job.kind == "evaluate")
    recorded = run.recorded
    return recorded is not None and not all(job.is_among(recorded["evaluations"]) for job in jobs)


def results_record(study: Study, results: Results, unmatched: Sequence[Record], place: str) -> str:
    """Return all results as JSON, fractions, with one run per line."""
    record: dict[str, Any] = {
        "study": place,
        "primary": f"linear {study.evaluation.features}, {study.evaluation.weights}",
        "test": study.evaluation.test,
        "rows": {
            row.name: {
                "note": row.note,
                "command": row_command(place, row.name),
                "settings": study.settings_of(row.name),
                "num_seeds": row.num_seeds,
                "mean": row.mean if row.found else None,
                "std": row.std if row.found else None,
            }
            for row in results.rows
        },
        "comparisons": [
            {"measure": one.measure, "better": one.better, "than": one.other}
            | one.test._asdict()
            | {"p_holm": one.p_corrected, "verdict": one.verdict}
            for one in results.comparisons
        ],
    }
    features = study.evaluation.features
    runs = [run_record(one, features) for row in results.rows for one in row.found]
    left = without_files(study, unmatched)  # a run that was trained again has files now
    lists = {"runs": runs} | ({"unmatched": left} if left else {})
    head = json.dumps(record, indent=1).removesuffix("\n}")
    return head + "".join(map(lines_of, lists, lists.values())) + "\n}\n"


def lines_of(name: str, records: Sequence[Record]) -> str:
    """Return a key of the record whose value has one line per run."""
    return f',\n "{name}": [\n  ' + ",\n  ".join(map(json.dumps, records)) + "\n ]"


def run_record(one: RunResult, features: str) -> Record:
    """Return the results of a run, and the course of its logged values.

    Args:
        one: the results.
        features: features of the primary measure.
    """
    return {
        "row": one.run.row,
        "seed": one.run.seed,
        "settings_digest": one.run.folder.name,
        "evaluations": one.evaluations,
        "features": features,
        "count": one.count,
        "primary": one.primary,
        "accuracies": measures_record(one.others),
        "training_minutes": one.minutes,
        "weights_sha256": one.sha256,
        "images": one.images,
        **({"labels": one.labels} if one.labels else {}),
        "references": {other.weights: measures_record(other.others) for other in one.references},
        **one.provenance,
        "hits": one.hits,
        "series": one.series,
    }


def measures_record(measures: Mapping[str, Accuracy]) -> dict[str, list[float]]:
    """Return value and interval by measure."""
    return {
        name: [round(number, 7) for number in (found.value, *found.interval_95)]
        for name, found in measures.items()
    }
