"""The main loop: the life of a micro-batch, and what happens once a step."""

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cmtmae_scale.backends.base import Backend
from cmtmae_scale.checkpoint.writer import Writer
from cmtmae_scale.config.derive import BatchPlan, reads_cache
from cmtmae_scale.config.schema import Config
from cmtmae_scale.errors import CacheError
from cmtmae_scale.runtime.standing import Standing, StandingFile
from cmtmae_scale.teachers.base import picture_sizes
from cmtmae_scale.training.guards import (
    StopRequest,
    next_batch,
    raise_failure,
    raise_non_finite,
    refuse_bad_share,
)
from cmtmae_scale.training.prepare import Models, prepare
from cmtmae_scale.training.progress import Progress, Scalars, scalars_at
from cmtmae_scale.training.telemetry import Telemetry
from dataloading.errors import DataError, ReadError
from dataloading.index import Index
from dataloading.stream import Batch

logger = logging.getLogger(__name__)

REPORT = (
    "loss/total",
    "loss/teacher",
    "loss/student",
    "loss/pixel",
    "mask/visible_mass",
    "attention/agreement",
    "cache/hit",
    "valid_rows",
    "stop",
)


Evaluate = Callable[[Backend], dict[str, float]]
"""Accuracies of the present encoder by name; a collective that changes nothing."""

Draw = Callable[[Models, Progress], NDArray[np.uint8] | None]
"""A sheet of pictures, ``[height, width, 3]``, on rank 0; a collective that changes nothing."""


@dataclass
class Parts:
    """Everything a loop needs, built by ``build.py``."""

    config: Config
    plan: BatchPlan
    device: torch.device
    stream: Iterator[Batch]
    models: Models
    progress: Progress
    writer: Writer
    stop: StopRequest
    telemetry: Telemetry | None
    standing: StandingFile | None
    saved_facts: dict[str, Any]
    run_dir: Path
    evaluate: Evaluate | None = None
    """Called every ``eval.every`` steps."""
    draw: Draw | None = None
    """Called every ``log.images_every`` steps and at the end."""
    index: Index | None = None
    """The images; ``None`` where they are synthetic."""


def train(parts: Parts) -> str | None:
    """Train until the end, a stop request or want of data; save at the end of any.

    Returns:
        The reason of the stop, or ``None`` when the run is complete.

    Raises:
        NonFiniteError: a loss or gradient was not finite; the last checkpoint stands.
        ConfigError: more images than allowed could not be decoded.
        CacheError: the teacher cache failed; the state before that step is saved.
    """
    config, progress = parts.config, parts.progress
    reason = stop_reason(parts, False)
    drawn = invalid = 0.0
    tell_standing(parts)
    while progress.step < progress.end_step and reason is None:
        scalars = scalars_at(config, progress.share)
        try:
            report, waited_s = step(parts, scalars)
        except ReadError as error:
            reason = str(error)
            break
        except CacheError:
            save_last(parts)
            raise
        drawn += parts.plan.global_batch
        invalid += parts.plan.global_batch - report["valid_rows"] / config.mask.masks_per_view
        refuse_bad_share(progress.step, invalid, drawn, config.data.max_bad_share, parts.run_dir)
        if parts.telemetry is not None:
            values = readable(report, scalars, parts)
            parts.telemetry.record(progress.step, values, parts.plan.global_batch, waited_s)
        tell_standing(parts)
        requested = report["stop"] > 0
        if not requested:
            evaluate_if_due(parts)
            draw_if_due(parts)
        reason = stop_reason(parts, requested)
        if reason is None and progress.step % config.checkpoint.every == 0:
            parts.writer.save(progress.step, parts.models.backend.fragments(), saved_state(parts))
    save_last(parts)
    return reason if progress.step < progress.end_step else None


def step(parts: Parts, scalars: Scalars) -> tuple[dict[str, float], float]:
    """Take one optimizer step; returns the report by name, summed over ranks, and the data wait.

    Raises:
        NonFiniteError: on every rank; nothing was updated.
        ReadError: on every rank, if storage failed on one of them; nothing was updated.
        CacheError: on every rank, if the teacher cache failed on one; nothing was updated.
    """
    models = parts.models
    sizes = picture_sizes(parts.config.views.size, models.teacher)
    total = torch.zeros(len(REPORT), device=parts.device)
    ids: list[Tensor] = []
    waited_s = 0.0
    for micro_step in range(parts.plan.accumulation):
        began = time.monotonic()
        batch = next_batch(
            parts.stream, parts.stop, sizes, parts.config.train.micro_batch, parts.device
        )
        waited_s += time.monotonic() - began
        micro_batch, observed = prepare(parts.config, models, batch, scalars)
        losses = models.backend.micro(micro_batch, last=micro_step + 1 == parts.plan.accumulation)
        valid = micro_batch.valid.sum().float()
        stop = torch.full((), parts.stop.urgency(), device=parts.device)
        total += torch.stack([*losses, *observed, valid, stop])
        ids.append(batch.sample_id)
    outcome = models.backend.step(scalars.lr, total)
    report = dict(zip(REPORT, outcome.report, strict=True))
    if math.isinf(report["stop"]):
        raise_failure(parts.progress.step + 1, parts.stop.failure)
    if not outcome.applied:
        raise_non_finite(parts.progress.step + 1, REPORT, total, ids)
    models.backend.momentum_update(scalars.momentum)
    parts.progress.advance(parts.plan.global_batch, outcome.applied)
    return report | {"grad_norm": outcome.grad_norm}, waited_s


def evaluate_if_due(parts: Parts) -> None:
    """Evaluate at the steps that ask for it; what cannot be read leaves the evaluation out."""
    step, every = parts.progress.step, parts.config.eval.every
    if parts.evaluate is None or every is None or step % every:
        return
    began = time.monotonic()
    try:
        values = parts.evaluate(parts.models.backend)
    except DataError as error:
        logger.warning("step %d is not evaluated: %s", step, error)
        return
    if parts.telemetry is not None:
        parts.telemetry.record_evaluation(step, values, time.monotonic() - began)


def draw_if_due(parts: Parts) -> None:
    """Draw at the steps that ask for it; what cannot be read or written is left out."""
    progress, every = parts.progress, parts.config.log.images_every
    if parts.draw is None or every is None:
        return
    if progress.step % every and progress.step != progress.end_step:
        return
    began = time.monotonic()
    try:
        sheet = parts.draw(parts.models, progress)
        if parts.telemetry is not None and sheet is not None:
            parts.telemetry.record_pictures(progress.step, sheet, time.monotonic() - began)
    except (DataError, OSError) as error:  # of rank 0, where no other waits for it
        logger.warning("step %d is not drawn: %s", progress.step, error)


def readable(report: dict[str, float], scalars: Scalars, parts: Parts) -> dict[str, float]:
    """Means for the log: losses a valid row, the rest a micro-batch."""
    rows = max(report["valid_rows"], 1.0)
    count = parts.plan.accumulation * parts.plan.world_size
    values = {name: report[name] / rows for name in REPORT if name.startswith("loss/")}
    means = ["mask/visible_mass", "attention/agreement"]
    means += ["cache/hit"] if reads_cache(parts.config) else []
    values |= {name: report[name] / count for name in means}
    values |= {"grad_norm": report["grad_norm"], "valid_rows": report["valid_rows"]}
    return values | vars(scalars)


def stop_reason(parts: Parts, requested: bool) -> str | None:
    """Why to stop now, the same on every rank, or ``None``."""
    stop_after = parts.config.train.stop_after
    if stop_after is not None and parts.progress.step >= stop_after:
        return f"train.stop_after={stop_after}"
    return (parts.stop.reason or "a request on another rank") if requested else None


def save_last(parts: Parts) -> None:
    """Save the present state, and wait until it is on storage."""
    state = saved_state(parts)
    parts.writer.finish(parts.progress.step, parts.models.backend.fragments(), state)
    tell_standing(parts)


def tell_standing(parts: Parts) -> None:
    """Tell those who work beside the run where it stands."""
    if parts.standing is None:
        return
    progress, step = parts.progress, parts.writer.saved_step
    batch = parts.plan.global_batch
    saved = progress.position0 if step is None else progress.position_at(step, batch)
    parts.standing.tell(Standing(progress.position, saved, progress.horizon))


def saved_state(parts: Parts) -> dict[str, Any]:
    """What a checkpoint holds beside tensors."""
    return {"progress": parts.progress.to_dict(), **parts.saved_facts}
