"""Accuracies of a run: those of its log, and those of its result files."""

from collections.abc import Sequence
from typing import Any

from cmtmae_scale.tools.report.chart import draw_charts
from cmtmae_scale.tools.report.curves import evaluation_charts
from cmtmae_scale.tools.report.markup import (
    format_number,
    format_percent,
    paragraph,
    section,
    table,
)
from cmtmae_scale.tools.report.run import RESULT, Run, as_object, is_drawable

TEMPERATURE = 0.07
"""Of the votes of k-NN during a run."""
TOP1 = "eval/top1"
CARDS = {"eval/knn10": "k-NN accuracy", "eval/linear": "linear accuracy", TOP1: "top-1 accuracy"}
"""Logged accuracies in the headline."""


def accuracy_cards(run: Run) -> list[tuple[str, str, str]]:
    """Return label, value and remarks of the last accuracies in the log."""
    cards: list[tuple[str, str, str]] = []
    for name, label in CARDS.items():
        measured = run.series(name)
        if not measured:
            continue
        step, accuracy = measured[-1]
        beside = [f"at step {format_number(step)}"]
        if name == TOP1 and step == run.result.get("steps"):
            for _, row in result_rows([(RESULT, run.result)]):
                beside.append(f"95 % interval {format_interval(row.get('interval_95'))}")
        if run.num_classes:
            beside.append(f"chance {format_percent(1 / run.num_classes)}")
        random = None if name == TOP1 else random_accuracy(run, name)
        if random is not None:
            beside.append(f"random weights {format_percent(random)}")
        cards.append((label, format_percent(accuracy), ", ".join(beside)))
    return cards


def random_accuracy(run: Run, name: str) -> float | None:
    """Return the accuracy of random weights by the method of a card, on the run's own images."""
    method = "k-NN k=10" if name == "eval/knn10" else "logistic"
    wanted = {"method": method, "features": "patches", "weights": "random weights"}
    own = [(file, result) for file, result in run.results if is_evaluated_alike(run, result)]
    for _, row in result_rows(own):
        if wanted.items() <= row.items() and is_drawable(row.get("accuracy")):
            return float(row["accuracy"])
    return None


def is_evaluated_alike(run: Run, result: dict[str, Any]) -> bool:
    """Return whether a result has the images and k-NN settings of the evaluation during the run."""
    images, settings = (as_object(result.get(key)) for key in ("images", "settings"))
    if result.get("split") or settings.get("temperature", TEMPERATURE) != TEMPERATURE:
        return False
    for part in ("train", "test"):
        found, digest = as_object(images.get(part)), run.digests.get(part)
        if digest is not None and "digest" in found:
            is_own = found["digest"] == digest
        else:
            path = run.settings.get(f"eval.{part}_path")
            is_own = path is not None and found.get("path") == path
        if not is_own:
            return False
    return True


def result_rows(results: Sequence[tuple[str, dict[str, Any]]]) -> list[tuple[str, dict[str, Any]]]:
    """Return the rows of results, each with the name of its file."""
    return [
        (name, row)
        for name, result in results
        if isinstance(result.get("results"), list)
        for row in result["results"]
        if isinstance(row, dict)
    ]


def evaluation_section(run: Run, others: Sequence[Run], anchor: str) -> str:
    """Return accuracies during the run, and those of result files."""
    parts: list[str] = []
    found = evaluation_charts(run, others)
    if found:
        where = f"{run.settings.get('eval.train_path')} and {run.settings.get('eval.test_path')}"
        note = f"During the run, on {where}."
        if run.is_tuning:
            note = f"After each pass over the images, on {run.settings.get('data.test_path')}."
        parts += [draw_charts(found), paragraph(note, "note")]
    elif run.is_tuning:
        parts.append(paragraph("The accuracy is first measured after a pass over the images."))
    else:
        parts.append(paragraph("The run was not evaluated during training (eval.every)."))
    rows = [
        (
            one.get("weights", "-"),
            one.get("features", "-"),
            one.get("method", "-"),
            format_percent(one.get("accuracy")),
            format_interval(one.get("interval_95")),
            format_percent(one.get("accuracy_top5")),
            f"{one.get('correct', '-')}/{one.get('count', '-')}",
            name,
        )
        for name, one in result_rows(run.results)
        if "value" not in one
    ]
    dense = [
        (
            *(one.get(key, "-") for key in ("weights", "features", "method", "measure")),
            format_number(one.get("value")),
            " to ".join(format_number(end) for end in one.get("interval_95") or ()),
            str(one.get("count", "-")),
            name,
        )
        for name, one in result_rows(run.results)
        if "value" in one
    ]
    if dense:
        head = (
            "weights",
            "features",
            "method",
            "measure",
            "value",
            "95 % interval",
            "count",
            "file",
        )
        parts.append(table(head, dense))
    if rows:
        head = ("weights", "features", "method", "accuracy", "95 % interval", "top-5", "correct")
        head += ("file",)
        parts.append(table(head, rows))
    elif run.is_tuning:
        parts.append(paragraph(f"The accuracy of the last weights will be in {RESULT}."))
    elif not dense:
        parts.append(paragraph("The run's folder holds no result of cmtmae evaluate."))
    verdicts = {str(result["verdict"]) for _, result in run.results if result.get("verdict")}
    parts += [paragraph(one, "note") for one in sorted(verdicts)]
    return section("Evaluation", anchor, *parts)


def format_interval(ends: Any) -> str:
    """Format both ends of an interval in per cent; empty for other values."""
    return " to ".join(map(format_percent, ends)) if isinstance(ends, list) else ""
