"""Results of a study as markdown and as JSON."""

from typing import Any

from cmtmae_scale.tools.study.file import Study
from cmtmae_scale.tools.study.results import Comparison, Found, Line, Results
from cmtmae_scale.tools.study.statistics import mean_and_deviation

SECOND = ("logistic", "k-NN k=10")


def as_markdown(study: Study, results: Results, place: str) -> str:
    """The table, the comparisons and the command of each row.

    Args:
        study: the file.
        results: what was collected.
        place: the file's path, for the commands.
    """
    other = "cls" if study.evaluation.features == "patches" else "patches"
    count = next((len(one.hits) for line in results.lines for one in line.found), 0)
    parts = [
        f"Primary measure, named beforehand: linear probe on the `{study.evaluation.features}` "
        f"features of the {study.evaluation.weights}, {count} test images "
        f"(`{study.evaluation.test}`), settings chosen on a held-out tenth of "
        f"`{study.evaluation.train}`. In %, mean +- deviation over seeds; for one seed, and for "
        "what was not trained here, the 95 % interval over test images.",
        "",
        head(study.evaluation.features, other),
        *(reference_text(one.name, one.accuracy, one.interval_95) for one in results.references),
        *(line_text(line, study.evaluation.features, other) for line in results.lines),
        "",
        *comparisons_text(study, results),
        "",
        *commands_text(results, place),
    ]
    return "\n".join(parts) + "\n"


def head(features: str, other: str) -> str:
    """Head of the table."""
    names = ["row", "what", "seeds", f"**linear, {features}**", f"linear, {other}"]
    names += [f"{method}, {features}" for method in SECOND] + ["training, min"]
    return "| " + " | ".join(names) + " |\n" + "|---" * len(names) + "|"


def reference_text(name: str, accuracy: float, interval: tuple[float, float]) -> str:
    """A line for something that was not trained here."""
    return f"| *{name}* | reference | | {percent(accuracy)} {bounds(interval)} | | | | |"


def line_text(line: Line, features: str, other: str) -> str:
    """A line for a row of the study."""
    seeds = f"{len(line.found)} of {line.wanted}"
    cells = [f"`{line.name}`", line.note, seeds]
    if not line.found:
        return "| " + " | ".join([*cells, "missing", "", "", "", ""]) + " |"
    first = spread(line.mean, line.deviation)
    if line.deviation is None:
        first += f" {bounds(line.found[0].interval_95)}"
    keys = [f"linear {other}", *(f"{method} {features}" for method in SECOND)]
    seconds = [other_cell(line, key) for key in keys]
    minutes = [one.minutes for one in line.found if one.minutes is not None]
    took = f"{sum(minutes) / len(minutes):.1f}" if minutes else ""
    return "| " + " | ".join([*cells, f"**{first}**", *seconds, took]) + " |"


def other_cell(line: Line, key: str) -> str:
    """A secondary measure of a row; empty where its features are absent."""
    values = [one.others[key] for one in line.found if key in one.others]
    return spread(*mean_and_deviation(values)) if values else ""


def comparisons_text(study: Study, results: Results) -> list[str]:
    """The comparisons that were named beforehand, with what came of them."""
    if not results.comparisons:
        return ["No comparison can be made yet."] if study.comparisons else []
    lines = [
        "| expected better | than | difference | 95 % interval | test | p | p, Holm | |",
        "|---|---|---|---|---|---|---|---|",
        *(comparison_text(one) for one in results.comparisons),
    ]
    absent = len(study.comparisons) - len(results.comparisons)
    if absent:
        lines += ["", f"{absent} comparisons lack a row."]
    if any(one.test.method.startswith("McNemar") for one in results.comparisons):
        lines += [
            "",
            "McNemar's test and its interval tell whether *these weights* differ on such images; "
            "one seed says nothing of another.",
        ]
    return lines


def comparison_text(one: Comparison) -> str:
    """One comparison."""
    low, high = (f"{100 * x:+.2f}" for x in one.test.interval_95)
    what = f"{one.test.method}, n = {one.test.pairs}"
    return (
        f"| `{one.better}` | `{one.other}` | {100 * one.test.difference:+.2f} | {low} to {high} | "
        f"{what} | {one.test.p:.2g} | {one.p_corrected:.2g} | {one.verdict} |"
    )


def commands_text(results: Results, place: str) -> list[str]:
    """The command of each row that has a result, for its first seed."""
    lines = [f"All of it: `python launchers/study.py {place}`. One row, first seed:", "", "```"]
    for line in results.lines:
        for one in line.found[:1]:
            lines += [f"# {line.name}", *(piece.command for piece in one.run.pieces)]
    return [*lines, "```"]


def spread(mean: float, deviation: float | None) -> str:
    """Mean and deviation in %."""
    return percent(mean) if deviation is None else f"{percent(mean)} +- {percent(deviation)}"


def percent(share: float) -> str:
    """A share in %."""
    return f"{100 * share:.2f}"


def bounds(interval: tuple[float, float]) -> str:
    """An interval in %."""
    return f"[{percent(interval[0])}, {percent(interval[1])}]"


def as_json(study: Study, results: Results) -> dict[str, Any]:
    """Everything of the table, and of each run its commands and all accuracies; shares."""
    return {
        "primary": f"linear {study.evaluation.features}, {study.evaluation.weights}",
        "test": study.evaluation.test,
        "references": [vars(one) for one in results.references],
        "rows": {
            line.name: {
                "note": line.note,
                "seeds_wanted": line.wanted,
                "mean": line.mean if line.found else None,
                "deviation": line.deviation if line.found else None,
                "runs": [run_as_json(one) for one in line.found],
            }
            for line in results.lines
        },
        "comparisons": [
            {"better": one.better, "than": one.other, **one.test._asdict()}
            | {"p_holm": one.p_corrected, "verdict": one.verdict}
            for one in results.comparisons
        ],
    }


def run_as_json(one: Found) -> dict[str, Any]:
    """A run."""
    return {
        "seed": one.run.seed,
        "primary": one.primary,
        "interval_95": one.interval_95,
        "others": one.others,
        "training_minutes": one.minutes,
        "weights_sha256": one.sha256,
        "images": one.images,
        "commands": [piece.command for piece in one.run.pieces],
    }
