"""Stop requests, and how a run says how it ended."""

import json
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cmtmae_scale.errors import NonFiniteError
from cmtmae_scale.runtime.collectives import ranks

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
STOP_FILE = "STOP"
EXIT_FILE = "exit.json"


class StopRequest:
    """One wish to stop, from a signal or from ``RUN_DIR/STOP``; handlers only set a flag."""

    def __init__(self, run_dir: Path) -> None:
        self.file = run_dir / STOP_FILE
        self.reason: str | None = None

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
