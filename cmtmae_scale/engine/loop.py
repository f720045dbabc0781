"""The main loop: the life of a micro-batch, and what happens once a step."""

import logging
import math
import time
from typing import NamedTuple

import torch
from torch import Tensor

from cmtmae_scale.config.derive import needs, reads_cache
from cmtmae_scale.engine.guards import next_batch, not_finite, raise_failure, refuse_bad_fraction
from cmtmae_scale.engine.progress import Scalars, scalars_at
from cmtmae_scale.engine.rollback import go_back
from cmtmae_scale.engine.task import Parts
from cmtmae_scale.errors import CacheError
from cmtmae_scale.pretraining.prepare import prepare
from cmtmae_scale.runtime.progress_file import PublishedProgress
from cmtmae_scale.teachers.base import view_sizes
from dataloading.errors import DataError, ReadError

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


class Step(NamedTuple):
    """What came of a step."""

    report: dict[str, float]
    """``REPORT`` and the gradient norm, summed over ranks."""
    waited_s: float
    """Seconds in which this rank waited for data."""
    refusal: str | None
    """Why nothing was updated, the same on every rank; ``None``: it was applied."""


def train(parts: Parts) -> str | None:
    """Train until the end, a stop request or want of data; save at the end of any.

    Returns:
        The reason of the stop, or ``None`` when the run is complete.

    Raises:
        NonFiniteError: steps had to be left out too often; the last checkpoint stands.
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
            report, waited_s, refusal = step(parts, scalars)
        except ReadError as error:
            reason = str(error)
            break
        except CacheError:
            save_last(parts)
            raise
        drawn += parts.plan.global_batch_size
        invalid += parts.plan.global_batch_size - report["valid_rows"] / config.mask.masks_per_view
        refuse_bad_fraction(
            progress.step, invalid, drawn, config.data.max_bad_fraction, parts.run_dir
        )
        if refusal is not None:
            leave_out(parts, refusal)
        elif parts.telemetry is not None:
            values = readable(report, scalars, parts)
            parts.telemetry.record(progress.step, values, parts.plan.global_batch_size, waited_s)
        slow = parts.stragglers.look(progress.step)
        if slow is not None:
            parts.incident("slow rank", slow)
        tell_standing(parts)
        requested = report["stop"] > 0
        if not requested:
            evaluate_if_due(parts)
            draw_if_due(parts)
        reason = stop_reason(parts, requested)
        due = progress.step % config.checkpoint.every == 0 and refusal is None
        if reason is None and due:
            parts.place.enter("save", progress.step)
            parts.writer.save(progress.step, parts.models.backend.fragments(), parts.saved_state())
    save_last(parts)
    return reason if progress.step < progress.end_step else None


def step(parts: Parts, scalars: Scalars) -> Step:
    """Take one optimizer step, or find on every rank that it must be left out.

    Raises:
        ReadError: on every rank, if storage failed on one of them; nothing was updated.
        CacheError: on every rank, if the teacher cache failed on one; nothing was updated.
    """
    models, skips, place = parts.models, parts.skips, parts.place
    skips.expect(scalars)
    number = parts.progress.step + 1
    sizes = view_sizes(parts.config.views.image_size, models.teacher)
    total = torch.zeros(len(REPORT), device=parts.device)
    ids: list[Tensor] = []
    waited_s = 0.0
    for micro_step in range(parts.plan.accumulation):
        with parts.stragglers.alone():
            began = time.monotonic()
            place.enter("data", number, micro_step)
            batch = next_batch(
                parts.stream, parts.stop, sizes, parts.config.train.micro_batch_size, parts.device
            )
            waited_s += time.monotonic() - began
            place.enter("compute", number, micro_step)
            micro_batch, observed = prepare(parts.config, models, batch, scalars)
        losses = models.backend.micro(micro_batch, last=micro_step + 1 == parts.plan.accumulation)
        valid = micro_batch.valid.sum().float()
        stop = torch.full((), parts.stop.urgency(), device=parts.device)
        total += torch.stack([*losses, *observed, valid, stop])
        ids.append(batch.sample_id)
    place.enter("update", number)
    outcome = models.backend.step(
        scalars.lr, total, lambda values: skips.spike(mean_loss(values)) is None
    )
    report = dict(zip(REPORT, outcome.report, strict=True)) | {"grad_norm": outcome.grad_norm}
    if math.isinf(report["stop"]):
        raise_failure(number, parts.stop.failure)
    loss = mean_loss(outcome.report)
    if not outcome.applied:
        refusal = skips.spike(loss) or not_finite(REPORT, total, ids)
        return Step(report, waited_s, f"step {number}: {refusal}")
    skips.taken(loss)
    models.backend.momentum_update(scalars.momentum)
    parts.progress.advance(parts.plan.global_batch_size, applied=True)
    return Step(report, waited_s, None)


def leave_out(parts: Parts, refusal: str) -> None:
    """Go past a step that changed nothing; after too many in a row, back to a checkpoint.

    Raises:
        NonFiniteError: if the run puts up with none, or cannot go back.
    """
    too_many = parts.skips.left_out()
    if parts.config.guard.skip_limit:
        parts.progress.advance(parts.plan.global_batch_size, applied=False)
        parts.incident("step left out", refusal, in_a_row=parts.skips.in_a_row)
    if too_many:
        parts.place.enter("save", parts.progress.step)
        go_back(parts, refusal)


def mean_loss(report: list[float]) -> float:
    """Loss a valid row, from the sums over ranks."""
    return report[REPORT.index("loss/total")] / max(report[REPORT.index("valid_rows")], 1.0)


def evaluate_if_due(parts: Parts) -> None:
    """Evaluate at the steps that ask for it; what cannot be read leaves the evaluation out."""
    step, every = parts.progress.step, parts.config.eval.every
    if parts.evaluate is None or every is None or step % every:
        return
    began = time.monotonic()
    parts.place.enter("evaluation", step)
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
    parts.place.enter("pictures", progress.step)
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
    needed = needs(parts.config)
    maps = (needed.teacher_attention, needed.student_attention)
    # What a run does not have is left out: a zero would be read as a measurement.
    means = ["mask/visible_mass"] if any(maps) else []
    means += ["attention/agreement"] if all(maps) else []
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
    parts.place.enter("save", parts.progress.step)
    state = parts.saved_state()
    parts.writer.finish(parts.progress.step, parts.models.backend.fragments(), state)
    tell_standing(parts)


def tell_standing(parts: Parts) -> None:
    """Tell those who work beside the run where it stands."""
    if parts.standing is None:
        return
    progress, step = parts.progress, parts.writer.saved_step
    batch = parts.plan.global_batch_size
    saved = progress.position0 if step is None else progress.position_at(step, batch)
    parts.standing.tell(PublishedProgress(progress.position, saved, progress.horizon))
