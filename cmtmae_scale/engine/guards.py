"""Steps that cannot be taken: data that cannot be read, values that are not finite."""

import logging

import torch
import torch.distributed as dist
from torch import Tensor

from cmtmae_scale.engine.task import Run
from cmtmae_scale.errors import CacheError, ConfigError, NonFiniteError
from cmtmae_scale.runtime.collectives import all_ranks_agree, gather_texts, ranks
from dataloading.errors import ReadError
from dataloading.reading import GREY
from dataloading.stream import Batch

logger = logging.getLogger(__name__)


def next_batch(run: Run) -> Batch:
    """Return the next batch of this rank, or a grey batch when storage fails.

    A rank without data must not exit alone, because the other ranks wait for it. It takes part in
    the step, and ``StopRequest.urgency`` keeps every rank from applying the step.

    Returns:
        The batch; after a failure a batch without a valid view, at positions 0.
    """
    if run.stop.failure is None:
        try:
            return next(run.stream)
        except ReadError as error:
            run.stop.record_failure(error)
    size = run.plan.micro_batch_size
    zeros = torch.zeros(size, dtype=torch.int64, device=run.device)
    images = tuple(
        torch.full((size, side, side, 3), GREY, dtype=torch.uint8, device=run.device)
        for side in run.task.view_sizes
    )
    return Batch(images, zeros, zeros, zeros, zeros.bool())


def raise_failure(step: int, failure: ReadError | CacheError | None) -> None:
    """Raise the failure that kept a step from being applied, the same on every rank.

    Args:
        step: the step that was not taken; nothing was updated.
        failure: this rank's failure, or ``None``.

    Raises:
        CacheError: on every rank, if a rank has a ``CacheError``: another launch would not help.
        ReadError: on every rank otherwise. The message is the same on every rank. A collective.
    """
    final = not all_ranks_agree(not isinstance(failure, CacheError))
    kind = CacheError if final else ReadError
    what = "the teacher cache failed" if final else "data could not be read"
    everyone = gather_texts(str(failure) if isinstance(failure, kind) else "")
    failed = [str(rank) for rank, text in enumerate(everyone) if text]
    raise kind(
        f"step {step} was not taken: {what} on ranks {', '.join(failed)}: "
        f"{next(filter(None, everyone))}"
    )


def refuse_bad_fraction(run: Run, valid_views: float) -> None:
    """Count the views of a step, and stop a run with too many undecodable ones.

    One undecodable view is always allowed.

    Args:
        run: the run; its counts of views are updated.
        valid_views: views of the step that could be decoded, over all ranks.

    Raises:
        ConfigError: on every rank; names the list of the files.
    """
    run.drawn += run.plan.global_batch_size
    run.undecodable += run.plan.global_batch_size - valid_views
    limit = run.config.data.max_bad_fraction
    if run.undecodable > max(limit * run.drawn, 1):
        raise ConfigError(
            f"step {run.progress.step}: {run.undecodable:.0f} of {run.drawn:.0f} views "
            f"({run.undecodable / run.drawn:.2%}) could not be decoded, more than "
            f"data.max_bad_fraction={limit}; replace the files that "
            f"{run.run_dir / 'quarantine.jsonl'} names, or raise that key"
        )


def refuse_empty_run(run: Run, refusal: str | None) -> None:
    """Refuse to complete a run that trained nothing; warn of skipped steps otherwise.

    Args:
        run: a run after its last step, before it is saved.
        refusal: why the last skipped step of this launch was skipped.

    Raises:
        NonFiniteError: if every step was skipped.
        ConfigError: if no view of any step could be decoded.
    """
    progress = run.progress
    if not progress.applied:
        raise NonFiniteError(
            f"nothing was trained: all {progress.step} steps were skipped"
            f"{f'; the last: {refusal}' if refusal else ''}; no checkpoint is written, and the "
            f"incidents in {run.run_dir / 'log.jsonl'} name every reason"
        )
    if run.undecodable >= run.drawn == progress.position:
        raise ConfigError(
            f"nothing was trained: none of {run.drawn:.0f} views could be decoded; replace the "
            f"files that {run.run_dir / 'quarantine.jsonl'} names"
        )
    if progress.applied < progress.step:
        logger.warning(
            "%d of %d steps were skipped; the incidents in %s name every reason",
            progress.step - progress.applied,
            progress.step,
            run.run_dir / "log.jsonl",
        )


def describe_non_finite(names: tuple[str, ...], local: Tensor, ids: list[Tensor]) -> str:
    """Return which terms are not finite, on which ranks and samples. A collective.

    Args:
        names: names of the report's entries.
        local: this rank's report, before the sum over ranks.
        ids: sample ids of this rank's micro-batches in this step.

    Returns:
        The same text on every rank.
    """
    bad = (~torch.isfinite(local)).to("cpu", torch.int64)
    samples = torch.cat(ids).to("cpu", torch.int64)
    flags = [torch.zeros_like(bad) for _ in range(ranks())]
    everyone = [torch.zeros_like(samples) for _ in range(ranks())]
    if ranks() > 1:
        dist.all_gather(flags, bad)
        dist.all_gather(everyone, samples)
    else:
        flags, everyone = [bad], [samples]
    guilty = [rank for rank, flag in enumerate(flags) if bool(flag.any())]
    terms = [name for i, name in enumerate(names) if any(bool(flag[i]) for flag in flags)]
    if not guilty:
        return (
            "the gradient is not finite although every loss is; nothing was updated; lower "
            "optimizer.base_lr or set optimizer.grad_clip if it happens often"
        )
    shown = [int(i) for rank in guilty for i in everyone[rank]][:64]
    return (
        f"not finite on ranks {', '.join(map(str, guilty))}: {', '.join(terms)}; nothing was "
        f"updated; samples of these ranks: {', '.join(map(str, shown))}"
    )
