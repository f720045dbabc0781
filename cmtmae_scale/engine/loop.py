"""The training loop of every task: the micro-batches of a step, and what follows a step."""

import logging
import math
import time
from typing import NamedTuple

import torch
from torch import Tensor

from cmtmae_scale.engine.guards import (
    describe_non_finite,
    next_batch,
    raise_failure,
    refuse_bad_fraction,
    refuse_empty_run,
)
from cmtmae_scale.engine.profile import StepProfile, span
from cmtmae_scale.engine.rollback import roll_back
from cmtmae_scale.engine.scalars import Scalars
from cmtmae_scale.engine.task import Drawn, Run
from cmtmae_scale.errors import CacheError, CmtMaeError, TeacherError
from cmtmae_scale.runtime.collectives import gather_texts
from cmtmae_scale.runtime.progress_file import PublishedProgress
from dataloading.errors import DataError, ReadError

logger = logging.getLogger(__name__)

COUNTS = ("valid_rows", "valid_views")
"""Entries of the report that the loop adds to the task's terms per micro-batch."""


class Step(NamedTuple):
    """Result of an optimizer step, the same on every rank except for ``waited_s``."""

    report: dict[str, float]
    """The task's terms, ``COUNTS``, stop requests and gradient norm, summed over ranks."""
    own_s: list[float]
    """Each rank's own seconds at the end of an interval; see ``Stragglers.own_seconds``."""
    waited_s: float
    """Seconds in which this rank waited for data."""
    refusal: str | None
    """Why nothing was updated; ``None``: the step was applied."""


def train(run: Run) -> str | None:
    """Train until the end, a stop request or a lack of data, and save.

    Returns:
        The reason of the stop, or ``None`` when the run is complete.

    Raises:
        NonFiniteError: too many steps were skipped, or all of them; the last checkpoint is kept.
        ConfigError: more images than allowed could not be decoded, or all of them.
        CacheError: the teacher cache failed; the state before that step is saved.
        TeacherError: the teacher's output is not finite; the state before that step is saved.
    """
    progress = run.progress
    reason = stop_reason(run, requested=False)
    refusal: str | None = None
    publish_progress(run)
    while progress.step < progress.end_step and reason is None:
        scalars, number = run.task.scalars(progress), progress.step + 1
        if run.profile is not None:
            run.profile.begin(number)
        try:
            with span(f"step {number}"):
                step = take_step(run, scalars)
        except ReadError as error:
            reason = str(error)
            break
        except (CacheError, TeacherError):
            save_last(run)
            raise
        if run.profile is not None and run.profile.is_tracing:
            end_profiled_step(run, run.profile, number)
        refuse_bad_fraction(run, step.report["valid_views"])
        if step.refusal is None:
            record_step(run, step, scalars)
        else:
            refusal = step.refusal
            skip_step(run, step, refusal)
        report_stragglers(run, step.own_s)
        publish_progress(run)
        requested = step.report["stop"] > 0
        reason = stop_reason(run, requested)
        if progress.step >= progress.end_step:
            refuse_empty_run(run, refusal)
        if reason is not None or progress.step >= progress.end_step:
            save_last(run)
        elif step.refusal is None:
            save_if_due(run)
        if not requested and progress.step == number:  # not again after a roll-back
            run_side_tasks(run)
    save_last(run)
    return reason if progress.step < progress.end_step else None


def take_step(run: Run, scalars: Scalars) -> Step:
    """Take one optimizer step, or agree on all ranks that it must be skipped.

    Raises:
        ReadError: on every rank, if storage failed on one of them; nothing was updated.
        CacheError: on every rank, if the teacher cache failed on one; nothing was updated.
        TeacherError: on every rank, if the teacher's output is not finite on one.
    """
    task, backend, skips, place = run.task, run.backend, run.skips, run.place
    skips.expect(scalars.mixing)
    number, accumulation = run.progress.step + 1, run.plan.accumulation
    terms = task.terms + COUNTS
    names = (*terms, "stop")
    total = torch.zeros(len(terms), device=run.device)
    ids: list[Tensor] = []
    waited_s = 0.0
    for micro_step in range(accumulation):
        drawn, run.ahead = run.ahead or draw(run, number, micro_step), None
        batch, waited_s = drawn.batch, waited_s + drawn.waited_s
        place.enter("compute", number, micro_step)
        with span("prepare"):
            work, observed = task.prepare(batch, drawn.fixed, scalars)
        with span("micro"):
            losses = backend.micro(work, last=micro_step + 1 == accumulation)
        rows, views = work.valid.sum().float(), batch.valid.sum().float()
        total += torch.stack([*losses.values(), *observed, rows, views.to(run.device)])
        ids.append(batch.sample_id)
    place.enter("update", number, accumulation)
    failure = run.stop.failure
    stop = torch.full((1,), run.stop.urgency(), device=run.device)
    own_sums = task.step_sums()
    with span("update"):
        outcome = backend.step(
            scalars.lr,
            torch.cat([total, stop, own_sums, run.stragglers.own_seconds(number)]),
            lambda sums: skips.find_spike(mean_loss(names, sums)) is None,
            lambda: draw_ahead(run, number),
        )
    sums, rest = outcome.report[: len(names)], outcome.report[len(names) :]
    task_sums, own_s = rest[: len(own_sums)], rest[len(own_sums) :]
    report = dict(zip(names, sums, strict=True)) | {"grad_norm": outcome.grad_norm}
    if math.isinf(report["stop"]):
        raise_failure(number, failure)
    loss = mean_loss(names, sums)
    if not outcome.applied:
        task.check_inputs(number)
        refusal = skips.find_spike(loss) or describe_non_finite(terms, total, ids)
        return Step(report, own_s, waited_s, f"step {number}: {refusal}")
    skips.record_applied(loss if report["valid_rows"] else None)
    task.record_applied(task_sums)
    if scalars.momentum is not None:
        with span("momentum_update"):
            backend.momentum_update(scalars.momentum)
    run.progress.advance(run.plan.global_batch_size, applied=True)
    return Step(report, own_s, waited_s, None)


def draw(run: Run, step: int, micro_step: int) -> Drawn:
    """Draw this rank's next micro-batch, and compute what does not depend on the weights."""
    with run.stragglers.own_time():
        began = time.monotonic()
        run.place.enter("data", step, micro_step)
        with span("next_batch"):
            batch = next_batch(run)
        waited_s = time.monotonic() - began
        run.place.enter("compute", step, micro_step)
        with span("prepare_fixed"):
            return Drawn(batch, run.task.prepare_fixed(batch), waited_s)


def draw_ahead(run: Run, step: int) -> None:
    """Draw the first micro-batch of the next step, unless the run ends with this step.

    The device computes it while the host reads the sums of this step and enqueues the update. A
    failure here is a failure of the next step.
    """
    last = min(run.progress.end_step, run.config.train.stop_after or run.progress.end_step)
    if step < last and not run.stop.urgency():
        run.ahead = draw(run, step, run.plan.accumulation)
        run.place.enter("update", step, run.plan.accumulation)


def mean_loss(names: tuple[str, ...], sums: list[float]) -> float:
    """Return the loss per valid row from the sums over ranks."""
    report = dict(zip(names, sums, strict=False))
    return report["loss/total"] / max(report["valid_rows"], 1.0)


def skip_step(run: Run, step: Step, refusal: str) -> None:
    """Count a skipped step; roll back after too many consecutive skipped steps.

    Raises:
        NonFiniteError: if the run allows no skipped step, or cannot roll back.
    """
    too_many = run.skips.record_skip()
    if run.config.guard.skip_limit:
        run.progress.advance(run.plan.global_batch_size, applied=False)
        run.record_incident("step skipped", refusal, in_succession=run.skips.in_succession)
        record_values(run, step, {})
    if too_many:
        run.place.enter("save", run.progress.step)
        roll_back(run, refusal)


def record_step(run: Run, step: Step, scalars: Scalars) -> None:
    """Log an applied step: losses per valid row, observations per micro-batch.

    A step without a valid row has neither, because a 0 would be taken for a measurement.
    """
    if run.telemetry is None:
        return
    report = step.report
    rows, micro_batches = (
        max(report["valid_rows"], 1.0),
        run.plan.accumulation * run.plan.world_size,
    )
    values = {
        name: report[name] / (rows if name.startswith("loss/") else micro_batches)
        for name in run.task.logged
        if report["valid_rows"]
    }
    values |= {"grad_norm": report["grad_norm"], "valid_rows": report["valid_rows"]}
    values |= {name: value for name, value in vars(scalars).items() if value is not None}
    record_values(run, step, values)


def record_values(run: Run, step: Step, values: dict[str, float]) -> None:
    """Log the values of a finished step; a skipped step has none."""
    if run.telemetry is not None:
        batch, progress = run.plan.global_batch_size, run.progress
        run.telemetry.record(progress.step, values, batch, step.waited_s, progress.position)


def end_profiled_step(run: Run, profile: StepProfile, number: int) -> None:
    """Count a traced step; the time for writing a trace is excluded from the training time."""
    run.place.enter("save", run.progress.step)
    began = time.monotonic()
    profile.end(number)
    if run.telemetry is not None and not profile.is_tracing:
        run.telemetry.record_side_task("profile", number, {}, time.monotonic() - began)


def report_stragglers(run: Run, own_s: list[float]) -> None:
    """Record the rank that has been slow for several intervals, if any, as an incident."""
    slow = run.stragglers.compare_ranks(own_s)
    if slow is not None:
        run.record_incident("slow rank", slow)


def stop_reason(run: Run, requested: bool) -> str | None:
    """Return why to stop now, the same on every rank, or ``None``."""
    stop_after = run.config.train.stop_after
    if stop_after is not None and run.progress.step >= stop_after:
        return f"train.stop_after={stop_after}"
    return (run.stop.reason or "a request on another rank") if requested else None


def save_if_due(run: Run) -> None:
    """Start a save if the step is a multiple of ``checkpoint.every``."""
    if run.progress.step % run.config.checkpoint.every == 0:
        run.place.enter("save", run.progress.step)
        run.writer.save(run.progress.step, run.backend.fragments(), run.state())


def save_last(run: Run) -> None:
    """Save the present state, and wait until it is on storage."""
    run.place.enter("save", run.progress.step)
    run.writer.finish(run.progress.step, run.backend.fragments(), run.state())
    publish_progress(run)


def run_side_tasks(run: Run) -> None:
    """Run the side tasks that are due; a failure is an incident, and training continues.

    The ranks agree after each side task whether it failed on any of them. A rank that fails while
    the others are within a collective of the side task cannot reach this agreement: the watchdog
    ends such a run, and the next launch continues from the last save before the side task.
    """
    for side_task in run.task.side_tasks:
        if not side_task.is_due(run.progress):
            continue
        run.place.enter(side_task.stage, run.progress.step)
        failure: Exception | None = None
        try:
            side_task.run(run)
        except Exception as error:
            failure = error
        report_failure(run, side_task.stage, failure)


def report_failure(run: Run, stage: str, failure: Exception | None) -> None:
    """Record that a side task failed on some rank, and drop its gradients; a collective."""
    mine = "" if failure is None else describe_error(failure)
    everyone = gather_texts(mine)
    failed = [rank for rank, text in enumerate(everyone) if text]
    if not failed:
        return
    run.backend.discard()
    kind, why = f"no {stage}", everyone[failed[0]]
    if len(everyone) > 1:
        why = f"{why} (on ranks {', '.join(map(str, failed))})"
    if run.telemetry is not None:
        run.record_incident(kind, why)
    elif mine:
        logger.warning("step %d: %s: %s", run.progress.step, kind, mine)
    if failure is not None and not isinstance(failure, CmtMaeError | DataError | OSError):
        logger.warning("step %d: %s", run.progress.step, kind, exc_info=failure)


def describe_error(error: Exception) -> str:
    """Return an error's message, with its type unless the message is written for the user."""
    if isinstance(error, CmtMaeError | DataError):
        return str(error)
    return f"{type(error).__name__}: {error}"


def find_reached_stop(run: Run) -> str | None:
    """Return why a launch of an incomplete run has nothing to train, or ``None``."""
    progress, stop_after = run.progress, run.config.train.stop_after
    if stop_after is None or not stop_after <= progress.step < progress.end_step:
        return None
    return (
        f"train.stop_after={stop_after} is reached already: the run is at step {progress.step} of "
        f"{progress.end_step}, and nothing is trained; raise or remove train.stop_after to continue"
    )


def publish_progress(run: Run) -> None:
    """Write the run's position to ``RUN_DIR/progress.json``, for the sidecar."""
    if run.progress_file is None:
        return
    progress, step = run.progress, run.writer.saved_step
    batch = run.plan.global_batch_size
    saved = progress.position0 if step is None else progress.position_at(step, batch)
    run.progress_file.publish(PublishedProgress(progress.position, saved, progress.horizon))
