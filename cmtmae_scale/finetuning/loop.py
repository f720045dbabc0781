"""The loop of fine-tuning: views, labels, steps, and accuracy after every pass."""

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmtmae_scale.backends.base import Backend
from cmtmae_scale.checkpoint.writer import Writer
from cmtmae_scale.config.derive import BatchPlan
from cmtmae_scale.config.finetune import Finetune, LayeredOptimizer
from cmtmae_scale.engine.guards import next_batch, not_finite, raise_failure, refuse_bad_fraction
from cmtmae_scale.engine.progress import Progress
from cmtmae_scale.engine.stop import StopRequest
from cmtmae_scale.engine.telemetry import Telemetry
from cmtmae_scale.errors import NonFiniteError
from cmtmae_scale.evaluation.result import TOP, Score
from cmtmae_scale.finetuning.accuracy import Accuracy
from cmtmae_scale.finetuning.augment import Augmenter
from dataloading.errors import DataError, ReadError
from dataloading.stream import Batch

logger = logging.getLogger(__name__)

REPORT = ("loss/total", "valid_rows", "valid_views", "stop")


@dataclass
class Parts:
    """Everything the loop needs, built by ``build.py``."""

    config: Finetune
    plan: BatchPlan
    device: torch.device
    stream: Iterator[Batch]
    labels: Tensor
    """Class of each row of the index, int64, on the device."""
    size: int
    """Side of the views, pixels."""
    augment: Augmenter
    backend: Backend
    accuracy: Accuracy
    progress: Progress
    writer: Writer
    stop: StopRequest
    telemetry: Telemetry | None
    saved_facts: dict[str, Any]
    run_dir: Path

    @property
    def num_images(self) -> int:
        """Images that are learnt from."""
        return len(self.labels)

    @property
    def passes(self) -> int:
        """Whole passes over the images so far."""
        return self.progress.position // self.num_images


def tune(parts: Parts) -> str | None:
    """Train until the end, a stop request or want of data; save at the end of any.

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
        passes = parts.passes
        lr = lr_at(config.optimizer, progress, parts)
        try:
            report, waited_s = step(parts, lr)
        except ReadError as error:
            reason = str(error)
            break
        drawn += parts.plan.global_batch_size
        invalid += parts.plan.global_batch_size - report["valid_views"]
        refuse_bad_fraction(
            progress.step, invalid, drawn, config.data.max_bad_fraction, parts.run_dir
        )
        if parts.telemetry is not None:
            report["loss/total"] /= max(report["valid_rows"], 1.0)
            values = {name: report[name] for name in ("loss/total", "valid_rows", "grad_norm")}
            parts.telemetry.record(
                progress.step, values | {"lr": lr}, parts.plan.global_batch_size, waited_s
            )
        requested = report["stop"] > 0
        reason = stop_reason(parts, requested)
        if reason is None and progress.step % config.checkpoint.every == 0:
            parts.writer.save(progress.step, parts.backend.fragments(), saved_state(parts))
        if reason is None and parts.passes > passes and progress.step < progress.end_step:
            evaluate(parts)
    parts.writer.finish(progress.step, parts.backend.fragments(), saved_state(parts))
    return reason if progress.step < progress.end_step else None


def step(parts: Parts, lr: float) -> tuple[dict[str, float], float]:
    """Take one optimizer step; returns the report by name, summed over ranks, and the data wait.

    Raises:
        NonFiniteError: on every rank; nothing was updated.
        ReadError: on every rank, if storage failed on one of them; nothing was updated.
    """
    total = torch.zeros(len(REPORT), device=parts.device)
    ids: list[Tensor] = []
    waited_s = 0.0
    for micro_step in range(parts.plan.accumulation):
        began = time.monotonic()
        batch = next_batch(
            parts.stream, parts.stop, (parts.size,), parts.plan.micro_batch_size, parts.device
        )
        waited_s += time.monotonic() - began
        examples = parts.augment(batch, parts.labels[batch.sample_id])
        loss = parts.backend.micro(examples, last=micro_step + 1 == parts.plan.accumulation)
        stop = torch.full((), parts.stop.urgency(), device=parts.device)
        rows, views = (one.sum().float() for one in (examples.valid, batch.valid))
        total += torch.stack([loss.total, rows, views, stop])
        ids.append(batch.sample_id)
    outcome = parts.backend.step(lr, total)
    report = dict(zip(REPORT, outcome.report, strict=True))
    number = parts.progress.step + 1
    if math.isinf(report["stop"]):
        raise_failure(number, parts.stop.failure)
    if not outcome.applied:
        raise NonFiniteError(f"step {number}: {not_finite(REPORT, total, ids)}")
    parts.progress.advance(parts.plan.global_batch_size, outcome.applied)
    return report | {"grad_norm": outcome.grad_norm}, waited_s


def lr_at(settings: LayeredOptimizer, progress: Progress, parts: Parts) -> float:
    """Learning rate of the head for the next step."""
    epochs = progress.horizon / parts.num_images
    peak = settings.base_lr * parts.plan.global_batch_size / 256
    return learning_rate(
        progress.share * epochs, epochs, peak, settings.warmup_epochs, settings.min_lr
    )


def learning_rate(epoch: float, epochs: float, peak: float, warmup: float, lowest: float) -> float:
    """Linear warm-up from 0, then a half cosine from ``peak`` to ``lowest``.

    Args:
        epoch: passes over the images so far.
        epochs: passes of the whole run, above ``warmup``.
        peak: rate at the end of the warm-up.
        warmup: passes with rising rate.
        lowest: rate at the end.

    Source: MAE's ``util/lr_sched.py``.
    """
    if epoch < warmup:
        return peak * epoch / warmup
    share = min((epoch - warmup) / (epochs - warmup), 1.0)
    return lowest + (peak - lowest) * (1 + math.cos(math.pi * share)) / 2


def evaluate(parts: Parts) -> Score | None:
    """Measure accuracy and note it; what cannot be read leaves it out."""
    began = time.monotonic()
    try:
        score, _ = parts.accuracy(parts.backend)
    except DataError as error:
        logger.warning("pass %d is not evaluated: %s", parts.passes, error)
        return None
    note(parts, score, time.monotonic() - began)
    return score


def note(parts: Parts, score: Score, took_s: float) -> None:
    """Write an accuracy into the log."""
    if parts.telemetry is not None:
        values = {"eval/pass": float(parts.passes), "eval/top1": score.correct / score.total}
        if parts.augment.classes > TOP:
            values["eval/top5"] = score.correct_top5 / score.total
        parts.telemetry.record_pause(parts.progress.step, values, took_s)


def stop_reason(parts: Parts, requested: bool) -> str | None:
    """Why to stop now, the same on every rank, or ``None``."""
    stop_after = parts.config.train.stop_after
    if stop_after is not None and parts.progress.step >= stop_after:
        return f"train.stop_after={stop_after}"
    return (parts.stop.reason or "a request on another rank") if requested else None


def saved_state(parts: Parts) -> dict[str, Any]:
    """What a checkpoint holds beside tensors."""
    return {"progress": parts.progress.to_dict(), **parts.saved_facts}
