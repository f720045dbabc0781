"""Several runs side by side: what differs, the curves over each other, the final figures."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from cmtmae_scale.tools.report.chart import Chart, Line
from cmtmae_scale.tools.report.markup import number, paragraph, percent, section, table
from cmtmae_scale.tools.report.run import Run
from cmtmae_scale.tools.report.sections import charts, outcome

METRICS = {
    "loss/total": "Loss",
    "loss/teacher": "Loss against the teacher",
    "loss/student": "Loss against the momentum student",
    "loss/pixel": "Loss of pixels",
    "attention/agreement": "Agreement of the two attentions",
    "mask/visible_mass": "Attention that stays visible",
    "grad_norm": "Gradient norm",
    "lr": "Learning rate",
    "eval/knn10": "k-NN accuracy (k = 10, mean of patches)",
    "eval/linear": "Linear accuracy (mean of patches)",
    "images_s": "Views a second",
}
OWN = ("run.name", "run.output_dir", "run.allow_change", "cache.dir", "data.index")
"""Settings that differ without making a difference."""
TAIL = 0.1
"""Share of the log entries that a final figure is the mean of."""


def comparison(runs: Sequence[Run]) -> str:
    """The sections of a comparison."""
    return (
        section("Final figures", "figures", final_figures(runs))
        + section("What differs", "differences", differences(runs))
        + section("Curves over each other", "overlaid", charts(overlaid(runs)))
    )


def overlaid(runs: Sequence[Run]) -> list[Chart]:
    """One chart a number that more than zero was ever logged of, a line a run."""
    found: list[Chart] = []
    for name, title in METRICS.items():
        lines = [Line(run.label, run.series(name)) for run in runs]
        if any(value for line in lines for _, value in line.points):
            found.append(Chart(title, lines))
    return found


def differences(runs: Sequence[Run]) -> str:
    """Settings that are not the same in all runs."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    rows = [
        (key, *(shown(run.settings, key) for run in runs))
        for key in keys
        if key not in OWN and len({shown(run.settings, key) for run in runs}) > 1
    ]
    if not rows:
        return paragraph("The settings are the same.")
    return table(("setting", *(run.label for run in runs)), rows)


def shown(settings: dict[str, Any], key: str) -> str:
    """A setting in words."""
    value = settings.get(key, "not known")
    return "off" if value is None else str(value)


def final_figures(runs: Sequence[Run]) -> str:
    """A row a run; what fluctuates is the mean of the last tenth of the entries."""
    names = [name for name in METRICS if name not in ("lr", "grad_norm")]
    names = [name for name in names if any(value for run in runs for _, value in run.series(name))]
    head = ("run", "outcome", "steps", *(METRICS[name] for name in names), "Memory, GiB")
    rows = [
        (
            run.label,
            outcome(run)[1],
            number(run.last_step),
            *(figure(run, name) for name in names),
            number(run.last("memory_gib"), 3),
        )
        for run in runs
    ]
    note = "Accuracies are the last ones; the rest are means of the last tenth of the log."
    return table(head, rows, numbers=2) + paragraph(note, "note")


def figure(run: Run, name: str) -> str:
    """A final figure."""
    if name.startswith("eval/"):
        return percent(run.last(name))
    values = [value for _, value in run.series(name)]
    tail = values[-max(1, round(TAIL * len(values))) :]
    return number(fmean(tail), 3) if tail else "-"
