"""Stop requests, steps that cannot be taken, and how a run says how it ended."""

import json
import logging
import math
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cmtmae_scale.errors import (
    EXIT_DONE,
    EXIT_STOPPED,
    CacheError,
    CmtMaeError,
    ConfigError,
    NonFiniteError,
)
from cmtmae_scale.runtime.collectives import agree_all, ranks, texts_of_all
from dataloading.errors import DataError, ReadError
from dataloading.reading import GREY
from dataloading.stream import Batch

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
STOP_FILE = "STOP"
EXIT_FILE = "exit.json"


class StopRequest:
    """One wish to stop, from a signal, from ``RUN_DIR/STOP`` or for want of data or of a teacher.

    Handlers only set a flag.
    """

    def __init__(self, run_dir: Path) -> None:
        self.file = run_dir / STOP_FILE
        self.reason: str | None = None
        self.failure: ReadError | CacheError | None = None

    def install(self) -> None:
        """Listen to SIGTERM, SIGUSR1 and SIGINT; call from the main thread."""
        for number in SIGNALS:
            signal.signal(number, self.handle)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Note a signal; a second one changes nothing."""
        self.reason = self.reason or signal.Signals(number).name

    def wanted(self) -> bool:
        """Whether this rank has seen a request."""
        if self.reason is None and self.file.exists():
            self.reason = f"file {STOP_FILE}"
        return self.reason is not None

    def fail(self, failure: ReadError | CacheError) -> None:
        """Note why the present step must not be taken; the first reason counts."""
        if self.failure is None:
            logger.warning("%s", failure)
            self.failure = failure

    def urgency(self) -> float:
        """0: go on; 1: stop after this step; infinite: this step must not be taken."""
        return math.inf if self.failure is not None else float(self.wanted())


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


def refuse_bad_share(step: int, invalid: float, drawn: float, limit: float, run_dir: Path) -> None:
    """Stop a run of which too many images could not be decoded; one is always allowed.

    Args:
        step: present step.
        invalid: views that were not valid since this start, over all ranks.
        drawn: views since this start, over all ranks.
        limit: ``data.max_bad_share``.
        run_dir: the run's folder.

    Raises:
        ConfigError: naming the list of the files.
    """
    if invalid > max(limit * drawn, 1):
        raise ConfigError(
            f"step {step}: {invalid:.0f} of {drawn:.0f} draws ({invalid / drawn:.2%}) could not be "
            f"decoded, more than data.max_bad_share={limit}; replace the files that "
            f"{run_dir / 'quarantine.jsonl'} names, or raise that key"
        )


@dataclass
class Ending:
    """How a run ends; a crash until something else is said."""

    step: int = 0
    code: int = 1
    message: str = "crash"

    def say(self, step: int, reason: str | None) -> None:
        """It came to its end, or stopped for a reason."""
        self.step = step
        self.code, self.message = (EXIT_DONE, "done") if reason is None else (EXIT_STOPPED, reason)


@contextmanager
def noted_ending(run_dir: Path, rank: int) -> Iterator[Ending]:
    """Leave in ``RUN_DIR/exit.json`` how what happens within ends."""
    ending = Ending()
    try:
        yield ending
    except (CmtMaeError, DataError) as error:
        ending.code, ending.message = error.exit_code, str(error)
        raise
    finally:
        if rank == 0 and run_dir.is_dir():
            write_exit(run_dir, ending.code, ending.step, ending.message)


def code_to_leave_with(ending: Ending) -> int:
    """Exit code; under torchrun, which calls any other one a crash, 0 for a requested stop."""
    if ending.code != EXIT_STOPPED:
        return ending.code
    logger.info("stopped at step %d (%s); the same command continues", ending.step, ending.message)
    return EXIT_DONE if "TORCHELASTIC_RUN_ID" in os.environ else EXIT_STOPPED


def write_exit(run_dir: Path, code: int, step: int, reason: str) -> None:
    """Leave the outcome in ``RUN_DIR/exit.json``: launchers do not pass exit codes on."""
    record: dict[str, Any] = {"code": code, "step": step, "reason": reason}
    draft = run_dir / f"{EXIT_FILE}.tmp"
    draft.write_text(json.dumps(record) + "\n")
    draft.replace(run_dir / EXIT_FILE)


def raise_non_finite(step: int, names: tuple[str, ...], local: Tensor, ids: list[Tensor]) -> None:
    """Raise with the terms, ranks and samples of a step that was not applied.

    Args:
        step: the step that failed; nothing was updated.
        names: names of the report's entries.
        local: this rank's report, before the sum over ranks.
        ids: sample ids of this rank's micro-batches in this step.

    Raises:
        NonFiniteError: always, on every rank, with the same message. A collective.
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
        raise NonFiniteError(
            f"step {step}: the gradient is not finite although every loss is; nothing was updated; "
            "lower optimizer.base_lr or set optimizer.clip"
        )
    shown = [int(i) for rank in guilty for i in everyone[rank]][:64]
    raise NonFiniteError(
        f"step {step}: not finite on ranks {', '.join(map(str, guilty))}: {', '.join(terms)}; "
        f"nothing was updated; samples of these ranks: {', '.join(map(str, shown))}"
    )
