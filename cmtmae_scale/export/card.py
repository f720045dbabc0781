"""The model card: what was run, on what, with which results, and under which terms.

Places of one machine are reduced to their last name.
"""

from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch

from cmtmae_scale import __version__
from cmtmae_scale.config.derive import Needs, needs, peak_lr
from cmtmae_scale.config.schema import Config, Schedule
from cmtmae_scale.export.origin import Origin
from cmtmae_scale.export.results import find_results


class Card(NamedTuple):
    """What a card says beside the run."""

    library: str
    """Name under which the Hugging Face hub knows the program that loads it."""
    title: str
    """What is in the folder."""
    snippet: str
    """Python that loads it."""
    checked: str
    """How it was checked."""
    sha256: str
    """Of the encoder's weights."""
    num_images: int | None
    """Images of the run's data."""


def model_card(origin: Origin, card: Card) -> str:
    """Markdown with the Hugging Face hub's front matter."""
    config, need = origin.config, needs(origin.config)
    title, tag = method_of(need)
    name = " ".join(config.run.name.split())
    random = need.teacher and config.teacher.weights == "random"
    hint = ", with a teacher of RANDOM WEIGHTS" if random else ""
    return "\n".join(
        [
            "---",
            "license: other",
            "license_name: terms-of-teacher-and-data",
            f"library_name: {card.library}",
            "pipeline_tag: image-feature-extraction",
            f"tags: [{tag}, masked-image-modeling, self-supervised, vision-transformer]",
            "---",
            "",
            f"# {name}: {card.title}",
            "",
            f"{config.student.arch}{patches(config)} at {config.views.image_size} pixels, trained by "
            f"{title}{hint}; step {origin.step} of {origin.state['progress']['end_step']}.",
            "",
            *section("Load", ["```python", card.snippet.rstrip(), "```", "", card.checked]),
            *section("Method", table(method_rows(config, need))),
            *section("Run", table(run_rows(origin, card.num_images))),
            *section("Results", results(origin, card.sha256)),
            *section("Licence", licence(config, need)),
            *section("Identity", table(identity_rows(origin, card.sha256))),
        ]
    )


def section(title: str, lines: list[str]) -> list[str]:
    """A heading with what stands under it."""
    return [f"## {title}", "", *lines, ""]


def table(rows: dict[str, str]) -> list[str]:
    """Two columns without a head."""
    return ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())]


def method_of(need: Needs) -> tuple[str, str]:
    """What the method is called, and the hub's tag for it."""
    if need.teacher and need.momentum:
        return "collaborative masking and targets (CMT-MAE, arXiv 2412.17566)", "cmt-mae"
    if need.teacher:
        return "masked distillation of a frozen teacher, without a momentum student", "distillation"
    if need.momentum:
        return "masked self-distillation from its own moving average", "self-distillation"
    return "masked autoencoding of pixels (MAE, arXiv 2111.06377)", "mae"


def patches(config: Config) -> str:
    """Patch side, where it is not the architecture's own."""
    side = config.student.patch_size
    return "" if side is None else f" with patches of {side}"


def teacher_of(config: Config, need: Needs) -> str:
    """The frozen teacher in words; a random one is called so and by nothing else."""
    teacher = config.teacher
    if not need.teacher:
        return "none"
    if teacher.weights == "random":
        model = str(teacher.model).split(".")[0]  # a tag would name weights that were not there
        return f"RANDOM WEIGHTS, architecture {model}: the teacher knew nothing; for tests only"
    depth = f", its first {teacher.depth} blocks" if teacher.depth else ""
    return (
        f"{teacher.model} of {teacher.library}, weights {shown_path(str(teacher.weights))}{depth}, "
        f"features {teacher.feature}"
    )


def method_rows(config: Config, need: Needs) -> dict[str, str]:
    """Teacher, masks, targets, decoder."""
    mask, decoder, mix = config.mask, config.decoder, config.collaboration
    guided = need.teacher_attention or need.student_attention
    targets = {
        "the teacher's features": need.teacher_features,
        "the momentum student's features": need.student_features,
        "pixels": need.pixels,
    }
    rows = {
        "teacher": teacher_of(config, need),
        "masks": f"{mask.sampler}, {mask.ratio:.0%} hidden, {mask.masks_per_view} a view",
        "targets": ", ".join(name for name, used in targets.items() if used),
        "decoder": "none"
        if decoder.type == "none"
        else f"{decoder.type}, {decoder.depth} blocks of width {decoder.width}",
        "loss": f"{config.loss.type} on {config.loss.tokens} tokens"
        if need.teacher_features or need.student_features
        else f"mean square of pixels ({config.target.pixel.norm}) on {config.loss.tokens} tokens",
    }
    if guided:
        rows["teacher's weight in the map"] = schedule_text(mix.alpha_attention)
    if need.teacher_features and need.student_features:
        rows["teacher's weight in the loss"] = schedule_text(mix.alpha_target)
    if config.student.init_weights is not None:
        rows["started from"] = shown_path(config.student.init_weights)
    return rows


def schedule_text(value: Schedule | float) -> str:
    """A schedule in words."""
    if not isinstance(value, Schedule):
        return f"{value:g}"
    if value.kind == "constant":
        return f"{value.start:g}"
    if value.kind == "two_stage":
        return f"{value.start:g}, from {value.switch:.0%} of the run on {value.end:g}"
    return f"{value.kind} from {value.start:g} to {value.end:g}, {value.u0:.0%} to {value.u1:.0%}"


def run_rows(origin: Origin, num_images: int | None) -> dict[str, str]:
    """Data, length, batch."""
    config, progress = origin.config, origin.state["progress"]
    count = num_images or config.data.expected_images
    seen = int(progress["position"])
    epochs = f", {seen / count:.3g} epochs" if count else ""
    images = f"{count} images" if count else "number of images not at hand when exported"
    return {
        "data": f"{shown_path(config.data.path)}, {images}, index digest "
        f"{origin.state['index_digest']}",
        "length": f"{progress['step']} steps, {seen} views{epochs}",
        "batch": f"{config.train.global_batch_size} views a step, crops {list(config.views.crop_scale)} of "
        "the area",
        "optimizer": f"AdamW, peak learning rate {peak_lr(config):.3g}, weight decay "
        f"{config.optimizer.weight_decay:g}",
        "precision": f"{config.backend.precision} compute, float32 weights, "
        f"{config.backend.name}, ranks: {origin.state['world_size']}",
        "seed": str(config.run.seed),
    }


def results(origin: Origin, sha256: str) -> list[str]:
    """What evaluations say of these weights."""
    found = find_results(origin.run_dir, sha256)
    lines = ["These weights were not evaluated."]
    if found.rows:
        head = "| weights | features | method | top-1 | |"
        lines = [head, "|---|---|---|---|---|", *found.rows]
    if found.others:
        lines += ["", "Not about these weights:", *(f"- {text}" for text in found.others)]
    return lines


def licence(config: Config, need: Needs) -> list[str]:
    """Terms of code, teacher and data."""
    sources = [f"of the images ({shown_path(config.data.path)})"]
    if need.teacher and config.teacher.weights != "random":
        sources.insert(0, f"of the teacher ({config.teacher.model})")
    if config.student.init_weights is not None:
        sources.append(f"of the start weights ({shown_path(config.student.init_weights)})")
    return [
        "The program that trained them, cmtmae_scale, is under Apache-2.0. Weights inherit the "
        f"terms {' and '.join(sources)}; look there before you pass them on."
    ]


def identity_rows(origin: Origin, sha256: str) -> dict[str, str]:
    """What they are, to the bit, and what made them."""
    versions: dict[str, Any] = origin.state.get("versions", {})
    trained = ", ".join(f"{name} {version}" for name, version in versions.items())
    return {
        "weights": f"{origin.weights}, step {origin.step}",
        "SHA-256 of the encoder's tensors": f"{sha256} (as in the files of evaluate.py)",
        "trained with": trained,
        "exported with": f"cmtmae_scale {__version__}, torch {torch.__version__}, "
        f"timm {timm.__version__}",
    }


def shown_path(path: str) -> str:
    """A place without the machine: a relative one as it is, of an absolute one the last name."""
    return Path(path).name if Path(path).is_absolute() else path
