"""Results of a study as Markdown."""

import os
import shlex

from cmtmae_scale.tools.study.file import Study
from cmtmae_scale.tools.study.results import Comparison, Results, StudyRow, tested_measures
from cmtmae_scale.tools.study.run_results import TUNED, Accuracy, Reference
from cmtmae_scale.tools.study.statistics import mean_and_std

SECOND = ("logistic", "k-NN k=10")
SEGMENTATION = ("k-NN segmentation mIoU", "linear segmentation mIoU")


def results_markdown(study: Study, results: Results, place: str) -> str:
    """Return the table, the comparisons and the commands of each row; ``place`` is the file."""
    count = next((one.count for row in results.rows for one in row.found), 0)
    parts = [
        f"Primary measure, fixed beforehand: linear probe on the `{study.evaluation.features}` "
        f"features of the {study.evaluation.weights}, {count} test images "
        f"(`{study.evaluation.test}`), settings chosen on a held-out tenth of "
        f"`{study.evaluation.train}`. In %, mean +- standard deviation over seeds; for one "
        "seed and for references, the 95 % interval over test images.",
        "",
        table_head(study),
        *(reference_line(one, study) for one in results.references),
        *(row_line(row, study) for row in results.rows),
        "",
        *comparison_lines(study, results),
        "",
        *command_lines(study, results, place),
    ]
    return "\n".join(parts) + "\n"


def secondary_measures(study: Study) -> list[str]:
    """Return the measures beside the primary, as keys of ``RunResult.others``."""
    features = study.evaluation.features
    other = "cls" if features == "patches" else "patches"
    masks = [] if study.evaluation.segmentation is None else SEGMENTATION
    tuned = [] if study.evaluation.finetune is None else [TUNED]
    return [f"linear {other}", *(f"{method} {features}" for method in SECOND), *masks, *tuned]


def table_head(study: Study) -> str:
    """Return the head of the table."""
    names = ["row", "note", "seeds", f"**linear {study.evaluation.features}**"]
    names += [*secondary_measures(study), "training, min"]
    return "| " + " | ".join(names) + " |\n" + "|---" * len(names) + "|"


def reference_line(one: Reference, study: Study) -> str:
    """Return the line of a reference."""
    cells = [accuracy_text(one.primary)]
    for measure in secondary_measures(study):
        cells.append(accuracy_text(one.others[measure]) if measure in one.others else "")
    return f"| *{one.weights}* | reference | | {' | '.join(cells)} | |"


def row_line(row: StudyRow, study: Study) -> str:
    """Return the line of a row of the study."""
    seeds = f"{len(row.found)} of {row.num_seeds}"
    cells = [f"`{cell_text(row.name)}`", cell_text(row.note), seeds]
    measures = secondary_measures(study)
    if not row.found:
        return "| " + " | ".join([*cells, "missing", *[""] * (len(measures) + 1)]) + " |"
    first = mean_text(row.mean, row.std)
    if row.std is None:
        first += f" {interval_text(row.found[0].interval_95)}"
    seconds = [other_cell(row, key) for key in measures]
    minutes = [one.minutes for one in row.found if one.minutes is not None]
    took = f"{sum(minutes) / len(minutes):.1f}" if minutes else ""
    return "| " + " | ".join([*cells, f"**{first}**", *seconds, took]) + " |"


def cell_text(text: str) -> str:
    """Return a text that fits in one cell of a table: on one line, with bars escaped."""
    return " ".join(text.split()).replace("|", "\\|")


def other_cell(row: StudyRow, key: str) -> str:
    """Return a secondary measure of a row; empty where its features are absent."""
    found = [one.others[key] for one in row.found if key in one.others]
    if len(found) == 1:
        return accuracy_text(found[0])
    return mean_text(*mean_and_std([one.value for one in found])) if found else ""


def comparison_lines(study: Study, results: Results) -> list[str]:
    """Return the table of comparisons."""
    if not results.comparisons:
        return ["No comparison is available yet."] if study.comparisons else []
    lines = [
        "| measure | expected better | than | difference | 95 % interval | test | p | p, Holm | |",
        "|---|---|---|---|---|---|---|---|---|",
        *(comparison_line(one) for one in results.comparisons),
    ]
    missing = len(study.comparisons) * len(tested_measures(study)) - len(results.comparisons)
    if missing:
        lines += ["", f"{missing} comparisons lack a result."]
    if any(one.test.method.startswith("McNemar") for one in results.comparisons):
        lines += [
            "",
            "McNemar's test and its interval are about *these weights* on such images, not "
            "about other seeds.",
        ]
    return lines


def comparison_line(one: Comparison) -> str:
    """Return the line of a comparison."""
    low, high = (f"{100 * x:+.2f}" for x in one.test.interval_95)
    what = f"{one.test.method}, n = {one.test.pairs}"
    return (
        f"| {one.measure} | `{cell_text(one.better)}` | `{cell_text(one.other)}` | "
        f"{100 * one.test.difference:+.2f} | "
        f"{low} to {high} | {what} | {one.test.p:.2g} | {one.p_corrected:.2g} | {one.verdict} |"
    )


def command_lines(study: Study, results: Results, place: str) -> list[str]:
    """Return the command and the result files of each row that has a result."""
    lines = [
        "Files are those of the study's folder; the commands of a run are in its `jobs.jsonl`.",
        "",
        "| row | command | result files of the primary measure |",
        "|---|---|---|",
    ]
    for row in results.rows:
        files = [f"`{os.path.relpath(one.run.linear, study.dir)}`" for one in row.found]
        if files:
            lines.append(
                f"| `{cell_text(row.name)}` | `{cell_text(row_command(place, row.name))}` | "
                f"{', '.join(files)} |"
            )
    return lines


def row_command(place: str, row: str) -> str:
    """Return the command that runs a row of a study file."""
    return shlex.join(["cmtmae", "study", place, "--rows", row])


def mean_text(mean: float, std: float | None) -> str:
    """Format mean and standard deviation in %."""
    return in_percent(mean) if std is None else f"{in_percent(mean)} +- {in_percent(std)}"


def in_percent(fraction: float) -> str:
    """Format a fraction in %."""
    return f"{100 * fraction:.2f}"


def accuracy_text(one: Accuracy) -> str:
    """Format an accuracy with its interval, in %."""
    return f"{in_percent(one.value)} {interval_text(one.interval_95)}"


def interval_text(interval: tuple[float, float]) -> str:
    """Format an interval in %."""
    return f"[{in_percent(interval[0])}, {in_percent(interval[1])}]"
