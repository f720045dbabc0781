"""Comparison of runs: final values, differing settings, overlaid curves."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from cmtmae_scale.tools.report.chart import Chart, Line, draw_charts
from cmtmae_scale.tools.report.markup import (
    format_number,
    format_percent,
    paragraph,
    section,
    table,
)
from cmtmae_scale.tools.report.run import Run
from cmtmae_scale.tools.report.sections import run_outcome

METRICS = {
    "loss/total": "Loss",
    "loss/teacher": "Loss against the teacher",
    "loss/student": "Loss against the momentum encoder",
    "loss/pixel": "Loss of pixels",
    "attention/agreement": "Agreement of the two attentions",
    "mask/visible_mass": "Attention that stays visible",
    "grad_norm": "Gradient norm",
    "lr": "Learning rate",
    "eval/knn10": "k-NN accuracy (k = 10, mean of patches)",
    "eval/linear": "Linear accuracy (mean of patches)",
    "eval/top1": "Top-1 accuracy (fine-tuned)",
    "eval/top5": "Top-5 accuracy (fine-tuned)",
    "images_s": "Views per second",
}
OWN = ("run.name", "run.output_dir", "run.allow_change", "cache.dir", "data.index")
"""Settings that may differ without an effect on the results."""
TAIL = 0.1
"""Fraction of the log entries that a final value averages."""


def comparison_sections(runs: Sequence[Run]) -> str:
    """Return the sections of a comparison."""
    return (
        section("Final values", "final", final_values(runs))
        + section("Differences", "differences", differing_settings(runs))
        + section("Overlaid curves", "overlaid", draw_charts(overlaid_charts(runs)))
    )


def overlaid_charts(runs: Sequence[Run]) -> list[Chart]:
    """Return one chart per logged value that is not always zero, with one line per run."""
    found: list[Chart] = []
    for name, title in METRICS.items():
        lines = [Line(run.label, run.series(name)) for run in runs]
        if any(value for line in lines for _, value in line.points):
            found.append(Chart(title, lines))
    return found


def differing_settings(runs: Sequence[Run]) -> str:
    """Return a table of the settings, or encoders of fine-tunings, that differ between runs."""
    inputs = [run.inputs for run in runs]
    keys = dict.fromkeys(key for given in inputs for key in given)
    rows = [
        (key, *(setting_text(given, key) for given in inputs))
        for key in keys
        if key not in OWN and len({setting_text(given, key) for given in inputs}) > 1
    ]
    if not rows:
        return paragraph("The settings are the same.")
    return table(("setting", *(run.label for run in runs)), rows)


def setting_text(settings: dict[str, Any], key: str) -> str:
    """Format a setting."""
    value = settings.get(key, "unknown")
    return "off" if value is None else str(value)


def final_values(runs: Sequence[Run]) -> str:
    """Return a table of final values, one row per run."""
    names = [name for name in METRICS if name not in ("lr", "grad_norm")]
    names = [name for name in names if any(value for run in runs for _, value in run.series(name))]
    head = ("run", "outcome", "steps", *(METRICS[name] for name in names), "Memory, GiB")
    rows = [
        (
            run.label,
            run_outcome(run)[1],
            format_number(run.last_step),
            *(final_value(run, name) for name in names),
            format_number(run.last("memory_gib"), 3),
        )
        for run in runs
    ]
    note = "Accuracies are the last ones; other values are means of the last tenth of the log."
    return table(head, rows, numbers=2) + paragraph(note, "note")


def final_value(run: Run, name: str) -> str:
    """Return a final accuracy, or the mean of the last tenth of the log."""
    if name.startswith("eval/"):
        return format_percent(run.last(name))
    values = [value for _, value in run.series(name)]
    tail = values[-max(1, round(TAIL * len(values))) :]
    return format_number(fmean(tail), 3) if tail else "-"
