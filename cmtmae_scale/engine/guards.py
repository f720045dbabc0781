"""Steps that cannot be taken."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from cmtmae_scale.engine.stop import StopRequest
from cmtmae_scale.errors import CacheError, ConfigError
from cmtmae_scale.runtime.collectives import agree_all, ranks, texts_of_all
from dataloading.errors import ReadError
from dataloading.reading import GREY
from dataloading.stream import Batch


def next_batch(
    stream: Iterator[Batch],
    stop: StopRequest,
    sizes: Sequence[int],
    micro_batch: int,
    device: torch.device,
) -> Batch:
    """Take the next batch, or a grey one when storage does not give it.

    A rank without data cannot leave alone, for the others wait for it: it takes part in the step,
    which ``stop.urgency`` keeps every rank from applying.

    Args:
        stream: this rank's batches.
        stop: takes note of the failure; nothing is read after one.
        sizes: sides of the views.
        micro_batch: views a batch, B.
        device: this rank's device.

    Returns:
        The batch, or one of no valid view at positions 0.
    """
    if stop.failure is None:
        try:
            return next(stream)
        except ReadError as error:
            stop.fail(error)
    zeros = torch.zeros(micro_batch, dtype=torch.int64, device=device)
    images = tuple(
        torch.full((micro_batch, size, size, 3), GREY, dtype=torch.uint8, device=device)
        for size in sizes
    )
    return Batch(images, zeros, zeros, zeros, zeros.bool())


def raise_failure(step: int, failure: ReadError | CacheError | None) -> None:
    """Raise with what failed, and where, for a step that was not applied.

    Args:
        step: the step that was not taken; nothing was updated.
        failure: this rank's, if it has one.

    Raises:
        CacheError: on every rank, if it is the failure of one: another start would not help.
        ReadError: on every rank otherwise. The message is the same everywhere. A collective.
    """
    final = not agree_all(not isinstance(failure, CacheError))
    kind = CacheError if final else ReadError
    what = "the teacher cache failed" if final else "data could not be read"
    everyone = texts_of_all(str(failure) if isinstance(failure, kind) else "")
    failed = [str(rank) for rank, text in enumerate(everyone) if text]
    raise kind(
        f"step {step} was not taken: {what} on ranks {', '.join(failed)}: "
        f"{next(filter(None, everyone))}"
    )


def refuse_bad_fraction(
    step: int, invalid: float, drawn: float, limit: float, run_dir: Path
) -> None:
    """Stop a run of which too many images could not be decoded; one is always allowed.

    Args:
        step: present step.
        invalid: views that were not valid since this start, over all ranks.
        drawn: views since this start, over all ranks.
        limit: ``data.max_bad_fraction``.
        run_dir: the run's folder.

    Raises:
        ConfigError: naming the list of the files.
    """
    if invalid > max(limit * drawn, 1):
        raise ConfigError(
            f"step {step}: {invalid:.0f} of {drawn:.0f} draws ({invalid / drawn:.2%}) could not be "
            f"decoded, more than data.max_bad_fraction={limit}; replace the files that "
            f"{run_dir / 'quarantine.jsonl'} names, or raise that key"
        )


def not_finite(names: tuple[str, ...], local: Tensor, ids: list[Tensor]) -> str:
    """Tell terms, ranks and samples of a step that was not applied; a collective.

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
