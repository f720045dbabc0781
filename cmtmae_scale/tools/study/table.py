"""Results of a study as Markdown and as JSON."""

from typing import Any

from cmtmae_scale.tools.study.file import Study
from cmtmae_scale.tools.study.results import Comparison, Results, RunResult, StudyRow
from cmtmae_scale.tools.study.statistics import mean_and_std

SECOND = ("logistic", "k-NN k=10")


def results_markdown(study: Study, results: Results, place: str) -> str:
    """Return the table, the comparisons and the commands of each row; ``place`` is the file."""
    other = "cls" if study.evaluation.features == "patches" else "patches"
    count = next((len(one.hits) for row in results.rows for one in row.found), 0)
    parts = [
        f"Primary measure, fixed beforehand: linear probe on the `{study.evaluation.features}` "
        f"features of the {study.evaluation.weights}, {count} test images "
        f"(`{study.evaluation.test}`), settings chosen on a held-out tenth of "
        f"`{study.evaluation.train}`. In %, mean +- standard deviation over seeds; for one "
        "seed and for references, the 95 % interval over test images.",
        "",
        table_head(study.evaluation.features, other),
        *(reference_line(one.name, one.accuracy, one.interval_95) for one in results.references),
        *(row_line(row, study.evaluation.features, other) for row in results.rows),
        "",
        *comparison_lines(study, results),
        "",
        *command_lines(results, place),
    ]
    return "\n".join(parts) + "\n"


def table_head(features: str, other: str) -> str:
    """Return the head of the table."""
    names = ["row", "note", "seeds", f"**linear, {features}**", f"linear, {other}"]
    names += [f"{method}, {features}" for method in SECOND] + ["training, min"]
    return "| " + " | ".join(names) + " |\n" + "|---" * len(names) + "|"


def reference_line(name: str, accuracy: float, interval: tuple[float, float]) -> str:
    """Return the line of a reference."""
    return f"| *{name}* | reference | | {in_percent(accuracy)} {interval_text(interval)} | | | | |"


def row_line(row: StudyRow, features: str, other: str) -> str:
    """Return the line of a row of the study."""
    seeds = f"{len(row.found)} of {row.num_seeds}"
    cells = [f"`{row.name}`", row.note, seeds]
    if not row.found:
        return "| " + " | ".join([*cells, "missing", "", "", "", ""]) + " |"
    first = mean_text(row.mean, row.std)
    if row.std is None:
        first += f" {interval_text(row.found[0].interval_95)}"
    keys = [f"linear {other}", *(f"{method} {features}" for method in SECOND)]
    seconds = [other_cell(row, key) for key in keys]
    minutes = [one.minutes for one in row.found if one.minutes is not None]
    took = f"{sum(minutes) / len(minutes):.1f}" if minutes else ""
    return "| " + " | ".join([*cells, f"**{first}**", *seconds, took]) + " |"


def other_cell(row: StudyRow, key: str) -> str:
    """Return a secondary measure of a row; empty where its features are absent."""
    values = [one.others[key] for one in row.found if key in one.others]
    return mean_text(*mean_and_std(values)) if values else ""


def comparison_lines(study: Study, results: Results) -> list[str]:
    """Return the table of comparisons."""
    if not results.comparisons:
        return ["No comparison is available yet."] if study.comparisons else []
    lines = [
        "| expected better | than | difference | 95 % interval | test | p | p, Holm | |",
        "|---|---|---|---|---|---|---|---|",
        *(comparison_line(one) for one in results.comparisons),
    ]
    missing = len(study.comparisons) - len(results.comparisons)
    if missing:
        lines += ["", f"{missing} comparisons lack a row."]
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
        f"| `{one.better}` | `{one.other}` | {100 * one.test.difference:+.2f} | {low} to {high} | "
        f"{what} | {one.test.p:.2g} | {one.p_corrected:.2g} | {one.verdict} |"
    )


def command_lines(results: Results, place: str) -> list[str]:
    """Return the commands of each row that has a result, for its first seed."""
    lines = [f"All rows: `cmtmae study {place}`. Single rows, first seed:", "", "```"]
    for row in results.rows:
        for one in row.found[:1]:
            lines += [f"# {row.name}", *(job.command for job in one.run.jobs)]
    return [*lines, "```"]


def mean_text(mean: float, std: float | None) -> str:
    """Format mean and standard deviation in %."""
    return in_percent(mean) if std is None else f"{in_percent(mean)} +- {in_percent(std)}"


def in_percent(fraction: float) -> str:
    """Format a fraction in %."""
    return f"{100 * fraction:.2f}"


def interval_text(interval: tuple[float, float]) -> str:
    """Format an interval in %."""
    return f"[{in_percent(interval[0])}, {in_percent(interval[1])}]"


def results_record(study: Study, results: Results) -> dict[str, Any]:
    """Return the whole table, and commands and accuracies of each run; fractions."""
    return {
        "primary": f"linear {study.evaluation.features}, {study.evaluation.weights}",
        "test": study.evaluation.test,
        "references": [vars(one) for one in results.references],
        "rows": {
            row.name: {
                "note": row.note,
                "num_seeds": row.num_seeds,
                "mean": row.mean if row.found else None,
                "std": row.std if row.found else None,
                "runs": [run_record(one) for one in row.found],
            }
            for row in results.rows
        },
        "comparisons": [
            {"better": one.better, "than": one.other, **one.test._asdict()}
            | {"p_holm": one.p_corrected, "verdict": one.verdict}
            for one in results.comparisons
        ],
    }


def run_record(one: RunResult) -> dict[str, Any]:
    """Return a run's accuracies and commands."""
    return {
        "seed": one.run.seed,
        "primary": one.primary,
        "interval_95": one.interval_95,
        "others": one.others,
        "training_minutes": one.minutes,
        "weights_sha256": one.sha256,
        "images": one.images,
        "commands": [job.command for job in one.run.jobs],
    }
