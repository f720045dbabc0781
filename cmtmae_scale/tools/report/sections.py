"""Sections of a run's report; each names the data that is missing."""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import yaml

from cmtmae_scale.config.derive import SIZES, name_student, needs, used_teachers
from cmtmae_scale.config.schema import Student
from cmtmae_scale.errors import EXIT_CONFIG, EXIT_DONE, EXIT_NO_PROGRESS, EXIT_STOPPED
from cmtmae_scale.runtime.storage import read_inside
from cmtmae_scale.tools.report.chart import Chart, draw_chart
from cmtmae_scale.tools.report.curves import evaluation_charts, time_charts, training_charts
from cmtmae_scale.tools.report.markup import (
    details,
    escape,
    facts,
    format_number,
    format_percent,
    paragraph,
    section,
    table,
)
from cmtmae_scale.tools.report.run import FIGURE_BYTES, Run, is_drawable
from cmtmae_scale.tools.report.spent import time_bar

SHOWN = 20
"""Rows per table of incidents."""
TEMPERATURE = 0.07
"""Of the votes of k-NN during a run."""
OUTCOMES = {
    EXIT_DONE: ("good", "done"),
    EXIT_STOPPED: ("fair", "stopped; the same command continues"),
    EXIT_CONFIG: ("bad", "will not work as configured"),
    EXIT_NO_PROGRESS: ("bad", "no progress over several launches"),
}


def run_outcome(run: Run) -> tuple[str, str]:
    """Return the outcome of a run: kind of badge, and text."""
    if run.exit is None:
        return "fair", "not ended: still running, or killed"
    code, step = run.exit.get("code"), run.exit.get("step")
    kind, words = OUTCOMES.get(code if isinstance(code, int) else 1, ("bad", "crashed"))
    if isinstance(step, int) and run.last_step > step:
        return "fair", "running again, or killed since its last end"
    if code == EXIT_DONE and not run.is_complete:
        return "fair", "stopped before its end"
    return kind, words


def headline(run: Run) -> str:
    """Return outcome and key values."""
    kind, words = run_outcome(run)
    end = run.end_step
    steps = format_number(run.last_step) + (f" of {format_number(end)}" if end else "")
    cards: list[tuple[str, str, str]] = [("steps", steps, "")]
    losses = run.series("loss/total")
    if losses:
        cards.append(("loss", format_number(losses[-1][1]), f"from {format_number(losses[0][1])}"))
    agreement = run.series("attention/agreement")
    if agreement:
        first = f"from {agreement[0][1]:.2f}"
        cards.append(("attention agreement", f"{agreement[-1][1]:.2f}", first))
    for name, label in (("eval/knn10", "k-NN accuracy"), ("eval/linear", "linear accuracy")):
        measured = run.series(name)
        if measured:
            step, accuracy = measured[-1]
            beside = [f"at step {format_number(step)}"]
            if run.num_classes:
                beside.append(f"chance {format_percent(1 / run.num_classes)}")
            random = random_accuracy(run, name)
            if random is not None:
                beside.append(f"random weights {format_percent(random)}")
            cards.append((label, format_percent(accuracy), ", ".join(beside)))
    if run.last("images_s") is not None:
        cards.append(("views per second", format_number(run.last("images_s"), 3), ""))
    items = "".join(
        f"<div><dt>{escape(a)}</dt><dd>{escape(b)}<small>{escape(c)}</small></dd></div>"
        for a, b, c in cards
    )
    reason = str((run.exit or {}).get("reason", ""))
    detail = f"<span>{escape(reason)}</span>" if reason not in ("", "done") else ""
    return (
        f'<p class="outcome"><b class="badge {kind}">{escape(words)}</b>{detail}</p>'
        f'<dl class="cards">{items}</dl>'
    )


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
    """Return whether a result is of the images, and the k-NN, of the evaluation during the run."""
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


def as_object(value: Any) -> dict[str, Any]:
    """Return a JSON object; an empty one for any other value."""
    return cast(dict[str, Any], value) if isinstance(value, dict) else {}


def result_rows(results: Sequence[tuple[str, dict[str, Any]]]) -> list[tuple[str, dict[str, Any]]]:
    """Return the rows of the results of ``cmtmae evaluate``, each with the name of its file."""
    return [
        (name, row)
        for name, result in results
        if isinstance(result.get("results"), list)
        for row in result["results"]
        if isinstance(row, dict)
    ]


def identity_section(run: Run, anchor: str) -> str:
    """Return settings, launches and problems."""
    if not run.settings:
        body = paragraph("The folder has no readable config.yaml, so the settings are unknown.")
        return section("Run", anchor, body, problem_list(run))
    settings = yaml.safe_dump(run.settings, sort_keys=False, default_flow_style=None, width=1000)
    return section(
        "Run",
        anchor,
        facts(key_settings(run)),
        launch_table(run),
        problem_list(run),
        details("All settings", f"<pre>{escape(settings)}</pre>"),
    )


def key_settings(run: Run) -> list[tuple[str, object]]:
    """Return the main settings."""
    get = run.settings.get
    count = format_number(run.num_images) if run.num_images else "unknown number of"
    unit = "steps" if get("train.steps") else "epochs"
    length = f"{get(f'train.{unit}')} {unit}"
    backend = f"{get('backend.name')}, {get('backend.precision')}"
    patch = f", patches of {get('student.patch_size')}" if get("student.patch_size") else ""
    sizes: dict[str, Any] = {name: get(f"student.{name}") for name in SIZES}
    student = Student(str(get("student.arch")), **sizes)
    ratio, masks = format_percent(get("mask.ratio")), get("mask.masks_per_view", 1)
    return [
        ("folder", run.dir),
        ("student", f"{name_student(student)} at {get('views.image_size')} pixels{patch}"),
        ("teacher", teacher_setting(run)),
        ("masks", f"{get('mask.sampler')}, {ratio} masked, {masks} per view"),
        ("decoder", f"{get('decoder.type')}, depth {get('decoder.depth')}"),
        ("data", f"{get('data.path')}: {count} images"),
        ("length", f"{length} of {format_number(get('train.global_batch_size'))} views"),
        ("backend", backend + (", compiled" if get("backend.compile") else "")),
        ("seed", get("run.seed")),
    ]


def teacher_setting(run: Run) -> str:
    """Name the teacher, its weights and mode."""
    get = run.settings.get
    unused = run.config is not None and not needs(run.config).teacher
    if unused or get("teacher.mode") == "none":
        return "none"
    if run.config is not None and run.config.teachers:
        return "; ".join(
            f"{one.name}: {one.model} of {one.library} "
            f"({'RANDOM WEIGHTS' if one.weights == 'random' else one.weights}), {one.mode}"
            for one in used_teachers(run.config)
        )
    weights = "RANDOM WEIGHTS" if get("teacher.weights") == "random" else get("teacher.weights")
    if get("teacher.library") == "python" and not weights:
        weights = "weights of the factory"
    return f"{get('teacher.model')} of {get('teacher.library')} ({weights}), {get('teacher.mode')}"


def launch_table(run: Run) -> str:
    """Return recipe, overrides and versions of each launch."""
    if not run.launches:
        return paragraph("Recipe, overrides and versions were not recorded.", "note")
    rows = [
        (
            launch.get("time", "-"),
            format_number(launch.get("step")),
            launch.get("recipe", "-"),
            "  ".join(map(str, launch.get("overrides") or ["none"])),
            f"{launch.get('world_size', '-')} x {launch.get('device', '-')}",
            ", ".join(f"{a} {b}" for a, b in (launch.get("versions") or {}).items()),
        )
        for launch in run.launches
    ]
    head = ("launch (UTC)", "from step", "recipe", "overrides", "ranks", "versions")
    return table(head, rows)


def problem_list(run: Run) -> str:
    """Return the files that could not be read."""
    return "".join(paragraph(problem, "problem") for problem in run.problems)


def draw_charts(found: Sequence[Chart]) -> str:
    """Draw charts side by side."""
    return f'<div class="charts">{"".join(map(draw_chart, found))}</div>'


def curves_section(run: Run, others: Sequence[Run], anchor: str) -> str:
    """Return curves, and the source of the expected range."""
    if not run.logged:
        return section("Curves", anchor, paragraph("The log has no entry yet."))
    if others and others[0].row is not None:
        names = ", ".join(other.label for other in others)
        note = (
            f"Expected range: {names}, of {others[0].dir.name}. Their settings are not compared "
            "with those of this run."
        )
    elif others:
        names = ", ".join(
            f"{other.dir.name} (seed {other.settings.get('run.seed')})" for other in others
        )
        note = f"Expected range: finished runs of the same settings, {names}."
    else:
        note = "No sibling folder holds a finished run of the same settings: no range is drawn."
    charts = training_charts(run, others)
    if any(line.label == "schedule" and line.points for chart in charts for line in chart.lines):
        note += " Thin grey lines are schedules."
    return section("Curves", anchor, draw_charts(charts), paragraph(note, "note"))


def figures_section(run: Run, anchor: str, most: int) -> str:
    """Return figure sheets, the newest first, the earlier ones collapsed."""
    if not run.figures:
        every = run.settings.get("log.images_every")
        reason = "log.images_every is off" if every is None else f"the first is due at step {every}"
        return section("Figures", anchor, paragraph(f"There are no figures: {reason}."))
    count = min(most, len(run.figures))
    spread = (round(k * (len(run.figures) - 1) / max(count - 1, 1)) for k in range(count))
    places = [len(run.figures) - 1] if count == 1 else sorted(set(spread), reverse=True)
    parts = [
        details(
            f"Step {format_number(step)}",
            f'<div class="scroll sheet" tabindex="0"><img alt="views, attention, masks and '
            f'features at step {step}" src="{inline_png(read_figure(run, path))}"></div>',
            opened=place == places[0],
        )
        for place in places
        for step, path in [run.figures[place]]
    ]
    note = "The same images each time."
    if len(places) < len(run.figures):
        note += f" {len(places)} of {len(run.figures)}; all are in {run.dir / 'figures'}."
    return section("Figures over time", anchor, paragraph(note, "note"), *parts)


def read_figure(run: Run, path: Path) -> bytes:
    """Read a figure; empty where it has gone since it was found."""
    try:
        return read_inside(run.dir, path, FIGURE_BYTES)
    except OSError:
        return b""


def inline_png(png: bytes) -> str:
    """Return a PNG as a data URL."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def time_section(run: Run, others: Sequence[Run], anchor: str) -> str:
    """Return throughput and the use of time."""
    found = time_charts(run, others)
    if not found:
        return section("Time", anchor, paragraph("No time was logged yet."))
    return section("Time", anchor, time_bar(run), draw_charts(found))


def incidents_section(run: Run, anchor: str) -> str:
    """Return restarts, bad files, and the incidents that the run recorded."""
    parts: list[str] = []
    if len(run.launches) > 1:
        steps = ", ".join(format_number(launch.get("step")) for launch in run.launches[1:])
        parts.append(paragraph(f"Relaunched {len(run.launches) - 1} times, from step {steps}."))
    if run.incidents:
        rows = [
            (format_number(one["step"]), one["incident"], entry_details(one, ("step", "incident")))
            for one in run.incidents[:SHOWN]
        ]
        parts.append(table(("step", "incident", "details"), rows))
        parts.append(hidden_rows_note(len(run.incidents)))
    if run.bad_files:
        count = len(run.bad_files)
        parts.append(
            paragraph(f"{count} images could not be decoded and are excluded from the loss:")
        )
        rows = [
            (one.get("name", "-"), one.get("reason", "-"), one.get("path", "-"))
            for one in run.bad_files[:SHOWN]
        ]
        parts += [table(("image", "reason", "file"), rows), hidden_rows_note(count)]
    if not parts:
        parts = [paragraph("None: one launch, no bad file, no recorded incident.")]
    return section("Incidents", anchor, *parts)


def entry_details(entry: dict[str, object], without: Sequence[str]) -> str:
    """Return the other values of an entry."""
    return ", ".join(f"{key} {value}" for key, value in entry.items() if key not in without)


def hidden_rows_note(count: int) -> str:
    """Return the number of rows that a table does not show."""
    return paragraph(f"and {count - SHOWN} more", "note") if count > SHOWN else ""


def evaluation_section(run: Run, others: Sequence[Run], anchor: str) -> str:
    """Return accuracies during the run, and the results of ``cmtmae evaluate``."""
    parts: list[str] = []
    found = evaluation_charts(run, others)
    if found:
        parts.append(draw_charts(found))
        where = f"{run.settings.get('eval.train_path')} and {run.settings.get('eval.test_path')}"
        parts.append(paragraph(f"During the run, on {where}.", "note"))
    else:
        parts.append(paragraph("The run was not evaluated during training (eval.every)."))
    rows = [
        (
            one.get("weights", "-"),
            one.get("features", "-"),
            one.get("method", "-"),
            format_percent(one.get("accuracy")),
            " to ".join(format_percent(end) for end in one.get("interval_95") or ()),
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
        head = ("weights", "features", "method", "accuracy", "95 % interval", "correct", "file")
        parts.append(table(head, rows))
        verdicts = {str(result["verdict"]) for _, result in run.results if result.get("verdict")}
        parts += [paragraph(one, "note") for one in sorted(verdicts)]
    elif not dense:
        parts.append(paragraph("The run's folder holds no result of cmtmae evaluate."))
    return section("Evaluation", anchor, *parts)
