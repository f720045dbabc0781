"""Sections of a run's report; each names the data that is missing."""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from cmtmae_scale.config.derive import SIZES, name_student
from cmtmae_scale.config.needs import needs
from cmtmae_scale.config.schema import Student
from cmtmae_scale.config.teachers import used_teachers
from cmtmae_scale.errors import EXIT_CONFIG, EXIT_DONE, EXIT_NO_PROGRESS, EXIT_STOPPED
from cmtmae_scale.runtime.storage import read_inside
from cmtmae_scale.tools.report.chart import draw_charts
from cmtmae_scale.tools.report.curves import time_charts, training_charts
from cmtmae_scale.tools.report.evaluation import accuracy_cards
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
from cmtmae_scale.tools.report.run import FIGURE_BYTES, Run, as_object
from cmtmae_scale.tools.report.spent import time_bar

SHOWN = 20
"""Rows per table of incidents."""
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
    """Return the outcome and the key values of a run."""
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
    cards += accuracy_cards(run)
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


def identity_section(run: Run, anchor: str) -> str:
    """Return settings, launches and problems."""
    if not run.settings:
        body = paragraph("The folder has no readable config.yaml, so the settings are unknown.")
        return section("Run", anchor, body, problem_list(run))
    settings = yaml.safe_dump(run.settings, sort_keys=False, default_flow_style=None, width=1000)
    return section(
        "Run",
        anchor,
        facts(tuning_settings(run) if run.is_tuning else key_settings(run)),
        launch_table(run),
        problem_list(run),
        details("All settings", f"<pre>{escape(settings)}</pre>"),
    )


def key_settings(run: Run) -> list[tuple[str, object]]:
    """Return the main settings of a pre-training."""
    get = run.settings.get
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
        *common_settings(run),
    ]


def tuning_settings(run: Run) -> list[tuple[str, object]]:
    """Return the main settings of a fine-tuning."""
    get = run.settings.get
    magnitude = get("augment.magnitude")
    shares = ("erase", "mixup", "cutmix", "smoothing")
    used = [f"RandAugment {'off' if magnitude is None else magnitude}"]
    used += [f"{name} {get(f'augment.{name}')}" for name in shares]
    return [
        ("folder", run.dir),
        ("encoder", encoder_setting(run)),
        ("head", f"{get('head.pool')}, drop path {get('head.drop_path')}"),
        ("augment", ", ".join(used)),
        (
            "learning rate",
            f"{get('optimizer.base_lr')} for 256 views, {get('optimizer.layer_decay')} per layer",
        ),
        ("test images", get("data.test_path")),
        *common_settings(run),
    ]


def encoder_setting(run: Run) -> str:
    """Name the encoder that a fine-tuning started from, its architecture and image size."""
    if run.encoder is None:
        return "not known before the first checkpoint"
    start = as_object(run.state.get("encoder"))
    found = as_object(start.get("student")), as_object(run.result.get("subject"))
    arch = next((one["arch"] for one in found if "arch" in one), "unknown architecture")
    size = start.get("size") or run.result.get("size") or "unknown"
    return f"{run.encoder}: {arch} at {size} pixels"


def common_settings(run: Run) -> list[tuple[str, object]]:
    """Return data, length, backend and seed."""
    get = run.settings.get
    count = format_number(run.num_images) if run.num_images else "unknown number of"
    unit = "steps" if get("train.steps") else "epochs"
    length = f"{get(f'train.{unit}')} {unit}"
    backend = f"{get('backend.name')}, {get('backend.precision')}"
    return [
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
        same = "settings and encoder" if run.is_tuning else "settings"
        note = f"No sibling folder holds a finished run of the same {same}: no range is drawn."
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
    """Read a figure; empty if it was deleted in the meantime."""
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
            (format_number(one["step"]), one["incident"], entry_details(one))
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


def entry_details(entry: dict[str, object]) -> str:
    """Return what an incident recorded beside its step and kind."""
    rest = [f"{key} {value}" for key, value in entry.items() if key not in ("step", "incident")]
    return ", ".join(rest)


def hidden_rows_note(count: int) -> str:
    """Return the number of rows that a table does not show."""
    return paragraph(f"and {count - SHOWN} more", "note") if count > SHOWN else ""
