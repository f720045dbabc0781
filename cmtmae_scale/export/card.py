"""The model card: method, run, results and licence.

Absolute paths are reduced to their last component.
"""

from pathlib import Path
from typing import NamedTuple

from huggingface_hub import ModelCard, ModelCardData

from cmtmae_scale.config.derive import name_student, peak_lr
from cmtmae_scale.config.needs import Needs, needs
from cmtmae_scale.config.schema import Config, Schedule, Teacher
from cmtmae_scale.config.teachers import teacher_configs, used_teachers
from cmtmae_scale.export.origin import Origin
from cmtmae_scale.export.results import escape_markdown, find_results
from cmtmae_scale.runtime.versions import library_versions
from dataloading.addresses import is_url


class CardFacts(NamedTuple):
    """Facts of a card that do not follow from the run."""

    library: str
    """Name of the loading library on the Hugging Face hub."""
    title: str
    """Content of the folder."""
    snippet: str
    """Python code that loads the folder."""
    checked: str
    """How the export was verified."""
    sha256: str
    """Of the encoder's weights."""
    num_images: int | None
    """Images of the run's data."""


def model_card(origin: Origin, card: CardFacts) -> str:
    """Return Markdown with the Hugging Face hub's front matter."""
    config, need = origin.config, needs(origin.config)
    title, tag = method_name(need)
    name = escape_markdown(config.run.name)
    teachers = teacher_configs(config) if need.teacher else {}
    random = any(one.teacher.weights == "random" for one in teachers.values())
    hint = ", with a teacher of RANDOM WEIGHTS" if random else ""
    side = config.student.patch_size
    patches = "" if side is None else f" with patches of {side}"
    size = config.views.image_size
    trained = origin.trained_size or size
    exported = "" if size == trained else f", exported for images of {size} pixels"
    data = ModelCardData(
        license="other",
        license_name="terms-of-teacher-and-data",
        library_name=card.library,
        pipeline_tag="image-feature-extraction",
        tags=[tag, "masked-image-modeling", "self-supervised", "vision-transformer"],
    )
    lines = [
        "---",
        data.to_yaml(),
        "---",
        "",
        f"# {name}: {card.title}",
        "",
        f"{name_student(config.student)}{patches} at {trained} pixels, trained by {title}{hint}; "
        f"step {origin.step} of {origin.state['progress']['end_step']}{exported}.",
        "",
        *card_section("Load", ["```python", card.snippet.rstrip(), "```", "", card.checked]),
        *card_section("Method", fact_table(method_rows(config, need))),
        *card_section("Run", fact_table(run_rows(origin, card.num_images))),
        *card_section("Results", result_lines(origin, card.sha256)),
        *card_section("Licence", licence_lines(config, need)),
        *card_section("Identity", fact_table(identity_rows(origin, card.sha256))),
    ]
    return str(ModelCard("\n".join(lines)))


def card_section(title: str, lines: list[str]) -> list[str]:
    """Return a heading and its lines."""
    return [f"## {title}", "", *lines, ""]


def fact_table(rows: dict[str, str]) -> list[str]:
    """Return a table of two columns without a head."""
    lines = (f"| {key} | {escape_markdown(value)} |" for key, value in rows.items())
    return ["| | |", "|---|---|", *lines]


def method_name(need: Needs) -> tuple[str, str]:
    """Return the method's name and its tag on the hub."""
    if need.teacher and need.momentum:
        return "collaborative masking and targets (CMT-MAE, arXiv 2412.17566)", "cmt-mae"
    if need.teacher:
        return "masked distillation of a frozen teacher, without a momentum encoder", "distillation"
    if need.momentum:
        return "masked self-distillation from its own momentum encoder", "self-distillation"
    return "masked autoencoding of pixels (MAE, arXiv 2111.06377)", "mae"


def teacher_rows(config: Config, need: Needs) -> dict[str, str]:
    """Return each frozen teacher, and the weights of several."""
    if not need.teacher:
        return {"teacher": "none"}
    if not config.teachers:
        return {"teacher": teacher_text(config.teacher)}
    return {
        f"teacher {one.name}": f"{teacher_text(one)}; weight {one.map:g} among the attention maps, "
        f"{one.loss:g} among the losses of the teachers"
        for one in used_teachers(config)
    }


def teacher_text(teacher: Teacher) -> str:
    """Name a frozen teacher and its weights; random weights carry no tag."""
    model = public_path(str(teacher.model))  # of open_clip it may be a file
    if teacher.weights == "random":
        model = model.split(".")[0]  # a tag would name weights that were not used
        return f"RANDOM WEIGHTS, architecture {model}: untrained, for tests only"
    depth = f", its first {teacher.depth} blocks" if teacher.depth else ""
    weights = "of the factory" if teacher.weights is None else public_path(teacher.weights)
    return f"{model} of {teacher.library}, weights {weights}{depth}, features {teacher.feature}"


def method_rows(config: Config, need: Needs) -> dict[str, str]:
    """Return teacher, masks, targets, decoder and loss."""
    mask, decoder, mix = config.mask, config.decoder, config.collaboration
    guided = need.teacher_attention or need.student_attention
    targets = {
        "the teacher's features": need.teacher_features,
        "the momentum encoder's features": need.student_features,
        "pixels": need.pixels,
    }
    rows = {
        **teacher_rows(config, need),
        "masks": f"{mask.sampler}, {mask.ratio:.0%} masked, {mask.masks_per_view} per view",
        "targets": ", ".join(name for name, used in targets.items() if used),
        "decoder": "none"
        if decoder.type == "none"
        else f"{decoder.type}, {decoder.depth} blocks of width {decoder.width}",
        "loss": f"{config.loss.type} on {config.loss.tokens} tokens"
        if need.teacher_features or need.student_features
        else f"mean square of pixels ({config.target.pixel.norm}) on {config.loss.tokens} tokens",
    }
    if guided:
        rows["teacher's weight in the attention map"] = schedule_text(mix.alpha_attention)
    if need.teacher_features and need.student_features:
        rows["teacher's weight in the loss"] = schedule_text(mix.alpha_target)
    start = config.student.init_weights or config.student.init_from_run
    if start is not None:
        rows["initialised from"] = public_path(start)
    return rows


def schedule_text(value: Schedule | float) -> str:
    """Format a schedule."""
    if not isinstance(value, Schedule):
        return f"{value:g}"
    if value.kind == "constant":
        return f"{value.start:g}"
    if value.kind == "two_stage":
        return f"{value.start:g}, then {value.end:g} from {value.switch:.0%} of the run"
    return f"{value.kind} from {value.start:g} to {value.end:g}, {value.u0:.0%} to {value.u1:.0%}"


def run_rows(origin: Origin, num_images: int | None) -> dict[str, str]:
    """Return data, length, batch, optimizer, precision and seed."""
    config, progress = origin.config, origin.state["progress"]
    count = num_images or config.data.expected_images
    seen = int(progress["position"])
    epochs = f", {seen / count:.3g} epochs" if count else ""
    images = f"{count} images" if count else "number of images unknown at export"
    return {
        "data": f"{public_path(config.data.path)}, {images}, index digest "
        f"{origin.state['index_digest']}",
        "length": f"{progress['step']} steps, {seen} views{epochs}",
        "batch": f"{config.train.global_batch_size} views per step, crops "
        f"{list(config.views.crop_scale)} of the area",
        "optimizer": f"AdamW, peak learning rate {peak_lr(config):.3g}, weight decay "
        f"{config.optimizer.weight_decay:g}",
        "precision": f"{config.backend.precision} compute, float32 weights, "
        f"{config.backend.name}, ranks: {origin.state['world_size']}",
        "seed": str(config.run.seed),
    }


def result_lines(origin: Origin, sha256: str) -> list[str]:
    """Return the table of evaluations of these weights, and the other result files."""
    if origin.trained_size not in (None, origin.config.views.image_size):
        return ["These weights were not evaluated at this image size."]
    found = find_results(origin.run_dir, sha256)
    lines = ["These weights were not evaluated."]
    if found.rows:
        head = "| weights | features | method | result | count |"
        lines = [head, "|---|---|---|---|---|", *found.rows]
    if found.others:
        others = (f"- {escape_markdown(text)}" for text in found.others)
        lines += ["", "Other result files of the run:", *others]
    return lines


def licence_lines(config: Config, need: Needs) -> list[str]:
    """Return the terms of code, teacher and data."""
    sources = [f"of the images ({public_path(config.data.path)})"]
    teachers = teacher_configs(config) if need.teacher else {}
    models = [
        public_path(str(one.teacher.model))
        for one in teachers.values()
        if one.teacher.weights != "random"
    ]
    if models:
        whose = "teachers" if len(models) > 1 else "teacher"
        sources.insert(0, f"of the {whose} ({', '.join(models)})")
    start = config.student.init_weights or config.student.init_from_run
    if start is not None:
        sources.append(f"of the initial weights ({public_path(start)})")
    return [
        "The training code, cmtmae_scale, is under Apache-2.0. Weights inherit the terms "
        f"{escape_markdown(' and '.join(sources))}; check these before you distribute the weights."
    ]


def identity_rows(origin: Origin, sha256: str) -> dict[str, str]:
    """Return the identity of the weights and the versions that made them."""
    return {
        "weights": f"{origin.weights}, step {origin.step}",
        "SHA-256 of the encoder's tensors": f"{sha256} (as in the result files of cmtmae evaluate)",
        "trained with": join_versions(origin.state.get("versions", {})),
        "exported with": join_versions(library_versions()),
    }


def join_versions(versions: dict[str, str]) -> str:
    """Join names and versions of libraries."""
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def public_path(path: str) -> str:
    """Return a relative path as it is, and the last component of an absolute path or address."""
    return Path(path).name if is_url(path) or Path(path).is_absolute() else path
