"""The parts of a run's report; each says in words what is not there."""

import base64
from collections.abc import Sequence

import yaml

from cmtmae_scale.config.derive import needs
from cmtmae_scale.errors import EXIT_CONFIG, EXIT_DONE, EXIT_NO_PROGRESS, EXIT_STOPPED
from cmtmae_scale.tools.report.chart import Chart, draw
from cmtmae_scale.tools.report.curves import evaluation_charts, time_charts, training_charts
from cmtmae_scale.tools.report.markup import (
    details,
    facts,
    number,
    paragraph,
    percent,
    section,
    table,
    text,
)
from cmtmae_scale.tools.report.run import Run
from cmtmae_scale.tools.report.spent import spent

SHOWN = 20
"""Rows of a table of incidents."""
OUTCOMES = {
    EXIT_DONE: ("good", "done"),
    EXIT_STOPPED: ("fair", "stopped; the same command continues"),
    EXIT_CONFIG: ("bad", "will not work as configured"),
    EXIT_NO_PROGRESS: ("bad", "no progress over several starts"),
}


def outcome(run: Run) -> tuple[str, str]:
    """How the run ended: kind of badge, and words."""
    if run.exit is None:
        return "fair", "not ended: still running, or killed"
    code, step = run.exit.get("code"), run.exit.get("step")
    kind, words = OUTCOMES.get(code if isinstance(code, int) else 1, ("bad", "crashed"))
    if isinstance(step, int) and run.last_step > step:
        return "fair", "running again, or killed since its last end"
    return kind, words


def headline(run: Run) -> str:
    """Outcome and key figures."""
    kind, words = outcome(run)
    end = run.end_step
    steps = number(run.last_step) + (f" of {number(end)}" if end else "")
    cards: list[tuple[str, str, str]] = [("steps", steps, "")]
    losses = run.series("loss/total")
    if losses:
        cards.append(("loss", number(losses[-1][1]), f"from {number(losses[0][1])}"))
    agreement = run.series("attention/agreement")
    if agreement:
        started = f"from {agreement[0][1]:.2f}"
        cards.append(("attention agreement", f"{agreement[-1][1]:.2f}", started))
    for name, label in (("eval/knn10", "k-NN accuracy"), ("eval/linear", "linear accuracy")):
        if run.last(name) is not None:
            chance = f"chance {percent(1 / run.num_classes)}" if run.num_classes else ""
            cards.append((label, percent(run.last(name)), chance))
    if run.last("images_s") is not None:
        cards.append(("views a second", number(run.last("images_s"), 3), ""))
    items = "".join(
        f"<div><dt>{text(a)}</dt><dd>{text(b)}<small>{text(c)}</small></dd></div>"
        for a, b, c in cards
    )
    reason = str((run.exit or {}).get("reason", ""))
    told = f"<span>{text(reason)}</span>" if reason not in ("", "done") else ""
    return (
        f'<p class="outcome"><b class="badge {kind}">{text(words)}</b>{told}</p>'
        f'<dl class="cards">{items}</dl>'
    )


def identity_section(run: Run, anchor: str) -> str:
    """What was run."""
    if not run.settings:
        body = paragraph("The folder has no readable config.yaml, so its settings are not known.")
        return section("What was run", anchor, body, troubles(run))
    return section(
        "What was run",
        anchor,
        facts(described(run)),
        started(run),
        troubles(run),
        details("All settings", f"<pre>{text(as_yaml(run))}</pre>"),
    )


def described(run: Run) -> list[tuple[str, object]]:
    """The settings that say most."""
    get = run.settings.get
    images = f"{number(run.num_images)} images" if run.num_images else "number of images not known"
    length = (
        f"{get('train.steps')} steps" if get("train.steps") else f"{get('train.epochs')} epochs"
    )
    backend = f"{get('backend.name')}, {get('backend.precision')}"
    patch = f", patches of {get('student.patch_size')}" if get("student.patch_size") else ""
    masks = get("mask.masks_per_view", 1)
    pairs: list[tuple[str, object]] = [
        ("folder", run.dir),
        ("student", f"{get('student.arch')} at {get('views.image_size')} pixels{patch}"),
        ("teacher", teacher(run)),
        ("masks", f"{get('mask.sampler')}, {percent(get('mask.ratio'))} hidden, {masks} a view"),
        ("decoder", f"{get('decoder.type')}, {get('decoder.depth')} blocks"),
        ("data", f"{get('data.path')}: {images}"),
        ("length", f"{length} of {number(get('train.global_batch_size'))} views"),
        ("backend", backend + (", compiled" if get("backend.compile") else "")),
        ("seed", get("run.seed")),
    ]
    return pairs


def teacher(run: Run) -> str:
    """Which teacher, in words."""
    get = run.settings.get
    unused = run.config is not None and not needs(run.config).teacher
    if unused or get("teacher.mode") == "none":
        return "none"
    weights = "RANDOM WEIGHTS" if get("teacher.weights") == "random" else get("teacher.weights")
    return f"{get('teacher.model')} of {get('teacher.library')} ({weights}), {get('teacher.mode')}"


def started(run: Run) -> str:
    """Recipe, overrides and versions of each start."""
    if not run.starts:
        return paragraph("Recipe, overrides and versions of its starts were not recorded.", "note")
    rows = [
        (
            start.get("time", "-"),
            number(start.get("step")),
            start.get("recipe", "-"),
            "  ".join(map(str, start.get("overrides") or ["none"])),
            f"{start.get('world_size', '-')} x {start.get('device', '-')}",
            ", ".join(f"{a} {b}" for a, b in (start.get("versions") or {}).items()),
        )
        for start in run.starts
    ]
    head = ("start (UTC)", "from step", "recipe", "overrides", "ranks", "versions")
    return table(head, rows)


def as_yaml(run: Run) -> str:
    """Settings as ``group.key: value`` lines."""
    return yaml.safe_dump(run.settings, sort_keys=False, default_flow_style=None, width=1000)


def troubles(run: Run) -> str:
    """What could not be read."""
    return "".join(paragraph(one, "trouble") for one in run.troubles)


def charts(found: Sequence[Chart]) -> str:
    """Charts side by side."""
    return f'<div class="charts">{"".join(draw(one) for one in found)}</div>'


def curves_section(run: Run, others: Sequence[Run], anchor: str) -> str:
    """Curves, and where the expected range comes from."""
    if not run.entries:
        return section("Curves", anchor, paragraph("The log has no entry yet."))
    if others:
        names = ", ".join(f"{one.dir.name} (seed {one.settings.get('run.seed')})" for one in others)
        said = f"Expected range: finished runs of the same settings, {names}."
    else:
        said = (
            "No finished run of the same settings lies beside this one, so no range of results is "
            "drawn; thin grey lines are what the schedules plan."
        )
    return section("Curves", anchor, charts(training_charts(run, others)), paragraph(said, "note"))


def pictures_section(run: Run, anchor: str, most: int) -> str:
    """Pictures over time, the newest first; the earlier ones folded."""
    if not run.pictures:
        every = run.settings.get("log.images_every")
        why = "log.images_every is off" if every is None else f"the first is due at step {every}"
        return section("Pictures", anchor, paragraph(f"There are no pictures: {why}."))
    count = min(most, len(run.pictures))
    spread = (round(k * (len(run.pictures) - 1) / max(count - 1, 1)) for k in range(count))
    places = [len(run.pictures) - 1] if count == 1 else sorted(set(spread), reverse=True)
    parts = [
        details(
            f"Step {number(step)}",
            f'<div class="scroll sheet" tabindex="0"><img alt="views, attention, masks and '
            f'features at step {step}" src="{inline(path.read_bytes())}"></div>',
            opened=place == places[0],
        )
        for place in places
        for step, path in [run.pictures[place]]
    ]
    said = "The same images each time."
    if len(places) < len(run.pictures):
        said += f" {len(places)} of {len(run.pictures)}; all lie in {run.dir / 'pictures'}."
    return section("Pictures over time", anchor, paragraph(said, "note"), *parts)


def inline(png: bytes) -> str:
    """A picture inside the page."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def time_section(run: Run, others: Sequence[Run], anchor: str) -> str:
    """Throughput and where time went."""
    found = time_charts(run, others)
    if not found:
        return section("Time", anchor, paragraph("Nothing was timed yet."))
    return section("Time", anchor, spent(run), charts(found))


def incidents_section(run: Run, anchor: str) -> str:
    """Restarts, bad files, and what the run itself noted."""
    parts: list[str] = []
    if len(run.starts) > 1:
        steps = ", ".join(number(start.get("step")) for start in run.starts[1:])
        parts.append(paragraph(f"Started again {len(run.starts) - 1} times, from step {steps}."))
    if run.incidents:
        rows = [
            (number(one["step"]), one["incident"], remarks(one, ("step", "incident")))
            for one in run.incidents[:SHOWN]
        ]
        parts.append(table(("step", "incident", "details"), rows))
        parts.append(left_out(len(run.incidents)))
    if run.bad_files:
        count = len(run.bad_files)
        parts.append(
            paragraph(f"{count} images could not be decoded and are left out of the loss:")
        )
        rows = [
            (one.get("name", "-"), one.get("reason", "-"), one.get("path", "-"))
            for one in run.bad_files[:SHOWN]
        ]
        parts += [table(("image", "reason", "file"), rows), left_out(count)]
    if not parts:
        parts = [paragraph("None: one start, no bad file, nothing noted.")]
    return section("Incidents", anchor, *parts)


def remarks(entry: dict[str, object], without: Sequence[str]) -> str:
    """The other values of an entry."""
    return ", ".join(f"{key} {value}" for key, value in entry.items() if key not in without)


def left_out(count: int) -> str:
    """How many rows a table does not show."""
    return paragraph(f"and {count - SHOWN} more", "note") if count > SHOWN else ""


def evaluation_section(run: Run, others: Sequence[Run], anchor: str) -> str:
    """Accuracies during the run, and what ``evaluate.py`` found."""
    parts: list[str] = []
    found = evaluation_charts(run, others)
    if found:
        parts.append(charts(found))
        where = f"{run.settings.get('eval.train_path')} and {run.settings.get('eval.test_path')}"
        parts.append(paragraph(f"During the run, on {where}.", "note"))
    else:
        parts.append(paragraph("The run was not evaluated while it went on (eval.every)."))
    rows = [
        (
            one.get("weights", "-"),
            one.get("features", "-"),
            one.get("method", "-"),
            percent(one.get("accuracy")),
            " to ".join(percent(end) for end in one.get("interval_95") or ()),
            f"{one.get('correct', '-')}/{one.get('count', '-')}",
            name,
        )
        for name, result in run.results
        for one in result.get("results") or ()
        if isinstance(one, dict)
    ]
    if rows:
        head = ("weights", "features", "method", "accuracy", "95 % interval", "correct", "file")
        parts.append(table(head, rows))
        said = {str(result["verdict"]) for _, result in run.results if result.get("verdict")}
        parts += [paragraph(one, "note") for one in sorted(said)]
    else:
        parts.append(paragraph("No result of launchers/evaluate.py lies in the run's folder."))
    return section("Evaluation", anchor, *parts)
