"""The main loop: the life of a micro-batch, and what happens once a step."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmtmae_scale.backends.base import Backend, MicroBatch
from cmtmae_scale.checkpoint.writer import Writer
from cmtmae_scale.config.derive import BatchPlan, Needs
from cmtmae_scale.config.schema import Config
from cmtmae_scale.errors import ConfigError
from cmtmae_scale.method.attention import (
    collaborative_attention,
    map_agreement,
    sharpen,
    visible_mass,
)
from cmtmae_scale.method.images import IMAGENET_MEAN, IMAGENET_STD, normalise_images
from cmtmae_scale.method.masking import PatchChoice, choose_masks
from cmtmae_scale.method.targets import Predictions, TokenLayout, normalise, patchify, pixel_targets
from cmtmae_scale.teachers.base import Teacher, TeacherView
from cmtmae_scale.training.guards import StopRequest, raise_non_finite
from cmtmae_scale.training.progress import Progress, Scalars, scalars_at
from cmtmae_scale.training.telemetry import Telemetry
from dataloading.stream import Batch

REPORT = (
    "loss/total",
    "loss/teacher",
    "loss/student",
    "loss/pixel",
    "mask/visible_mass",
    "attention/agreement",
    "valid_rows",
    "stop",
)


@dataclass
class Parts:
    """Everything a loop needs, built by ``build.py``."""

    config: Config
    needs: Needs
    plan: BatchPlan
    layout: TokenLayout
    length: int
    patch: int
    device: torch.device
    stream: Iterator[Batch]
    teacher: Teacher | None
    backend: Backend
    progress: Progress
    writer: Writer
    stop: StopRequest
    telemetry: Telemetry | None
    saved_facts: dict[str, Any]
    run_dir: Path


def train(parts: Parts) -> str | None:
    """Train until the end or a stop request; save at the end of either.

    Returns:
        The reason of the stop, or ``None`` when the run is complete.

    Raises:
        NonFiniteError: a loss or gradient was not finite; the last checkpoint stands.
        ConfigError: more images than allowed could not be decoded.
    """
    config, progress = parts.config, parts.progress
    reason = stop_reason(parts, False)
    drawn = invalid = 0.0
    while progress.step < progress.end_step and reason is None:
        scalars = scalars_at(config, progress.share)
        report, waited_s = step(parts, scalars)
        drawn += parts.plan.global_batch
        invalid += parts.plan.global_batch - report["valid_rows"] / config.mask.masks_per_view
        if invalid > max(config.data.max_bad_share * drawn, 1):
            raise ConfigError(
                f"step {progress.step}: {invalid:.0f} of {drawn:.0f} draws could not be decoded, "
                f"more than data.max_bad_share={config.data.max_bad_share}; see quarantine.jsonl"
            )
        if parts.telemetry is not None:
            values = readable(report, scalars, parts.plan)
            parts.telemetry.record(progress.step, values, parts.plan.global_batch, waited_s)
        reason = stop_reason(parts, report["stop"] > 0)
        if reason is None and progress.step % config.checkpoint.every == 0:
            parts.writer.save(progress.step, parts.backend.fragments(), saved_state(parts))
    parts.writer.finish(progress.step, parts.backend.fragments(), saved_state(parts))
    return reason if progress.step < progress.end_step else None


def step(parts: Parts, scalars: Scalars) -> tuple[dict[str, float], float]:
    """Take one optimizer step; returns the report by name, summed over ranks, and the data wait."""
    total = torch.zeros(len(REPORT), device=parts.device)
    ids: list[Tensor] = []
    waited_s = 0.0
    for micro_step in range(parts.plan.accumulation):
        began = time.monotonic()
        batch = next(parts.stream)
        waited_s += time.monotonic() - began
        micro_batch, mass, agreement = prepare(parts, batch, scalars)
        losses = parts.backend.micro(micro_batch, last=micro_step + 1 == parts.plan.accumulation)
        valid = micro_batch.valid.sum().float()
        stop = torch.full((), float(parts.stop.wanted()), device=parts.device)
        total += torch.stack([*losses, mass, agreement, valid, stop])
        ids.append(batch.sample_id)
    outcome = parts.backend.step(scalars.lr, total)
    if not outcome.applied:
        raise_non_finite(parts.progress.step + 1, REPORT, total, ids)
    parts.backend.momentum_update(scalars.momentum)
    parts.progress.advance(parts.plan.global_batch, outcome.applied)
    report = dict(zip(REPORT, outcome.report, strict=True))
    return report | {"grad_norm": outcome.grad_norm}, waited_s


def prepare(parts: Parts, batch: Batch, scalars: Scalars) -> tuple[MicroBatch, Tensor, Tensor]:
    """From views to masks and targets: teacher, momentum student, mixed map, choice.

    Returns:
        The micro-batch, the share of the map's mass that stays visible, and the agreement of the
        two maps; the latter two are 0-dim float32. No host synchronisation.
    """
    config = parts.config
    images = normalise_images(batch.images[0], IMAGENET_MEAN, IMAGENET_STD)
    with torch.no_grad():
        view = parts.teacher(batch.images[-1]) if parts.teacher else TeacherView(None, None)
        features, attention = parts.backend.momentum_forward(images)
        mixed = mix(parts, view.attention, attention, scalars.alpha_attention)
        choice = choose_masks(
            config.mask,
            mixed,
            batch.position,
            config.run.seed,
            scalars.salient_frac,
            length=parts.length,
        )
        targets = Predictions(
            gather(parts, view.features, config.target.teacher.norm, choice),
            gather(parts, features, config.target.student.norm, choice),
            pixel_target(parts, images, choice),
        )
        valid = batch.valid.to(parts.device).repeat_interleave(config.mask.masks_per_view)
        alpha = torch.full((), scalars.alpha_target, device=parts.device)
        zero = torch.zeros((), device=parts.device)
        mass = zero if mixed is None else visible_mass(mixed, choice.ids_keep)
        agreement = zero
        if view.attention is not None and attention is not None:
            agreement = map_agreement(view.attention, attention)
    return MicroBatch(images, choice, targets, valid, alpha), mass, agreement


def mix(
    parts: Parts, teacher: Tensor | None, student: Tensor | None, alpha: float
) -> Tensor | None:
    """The collaborative map ``[B, N]``, or ``None`` where no mask needs one."""
    if teacher is None and student is None:
        return None
    settings = parts.config.attention
    teacher, student = (
        None if one is None else sharpen(one, settings.temperature, settings.clip_quantile)
        for one in (teacher, student)
    )
    weight = torch.full((), alpha, device=parts.device)
    return collaborative_attention(teacher, student, weight, settings.norm)


def gather(parts: Parts, features: Tensor | None, norm: str, choice: PatchChoice) -> Tensor | None:
    """Normalised target features of the predicted tokens, ``[R, Q, F]`` float32."""
    if features is None:
        return None
    return parts.layout.gather(normalise(features, norm), choice)


def pixel_target(parts: Parts, images: Tensor, choice: PatchChoice) -> Tensor | None:
    """Pixels of the predicted patches, ``[R, Q, 3 P P]`` float32."""
    if not parts.needs.pixels:
        return None
    pixels = pixel_targets(patchify(images, parts.patch), parts.config.target.pixel.norm)
    return parts.layout.without_cls().gather(pixels, choice)


def readable(report: dict[str, float], scalars: Scalars, plan: BatchPlan) -> dict[str, float]:
    """Means for the log: losses a valid row, the rest a micro-batch."""
    rows = max(report["valid_rows"], 1.0)
    parts = plan.accumulation * plan.world_size
    values = {name: report[name] / rows for name in REPORT if name.startswith("loss/")}
    values |= {name: report[name] / parts for name in ("mask/visible_mass", "attention/agreement")}
    values |= {"grad_norm": report["grad_norm"], "valid_rows": report["valid_rows"]}
    return values | vars(scalars)


def stop_reason(parts: Parts, requested: bool) -> str | None:
    """Why to stop now, the same on every rank, or ``None``."""
    stop_after = parts.config.train.stop_after
    if stop_after is not None and parts.progress.step >= stop_after:
        return f"train.stop_after={stop_after}"
    return (parts.stop.reason or "a request on another rank") if requested else None


def saved_state(parts: Parts) -> dict[str, Any]:
    """What a checkpoint holds beside tensors."""
    return {"progress": parts.progress.to_dict(), **parts.saved_facts}
