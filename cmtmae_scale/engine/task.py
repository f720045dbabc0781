"""What the loop works with."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cmtmae_scale.backends.base import Backend
from cmtmae_scale.checkpoint.writer import Writer
from cmtmae_scale.config.derive import BatchPlan
from cmtmae_scale.config.schema import Config, Guard
from cmtmae_scale.engine.progress import Progress
from cmtmae_scale.engine.skips import Skips
from cmtmae_scale.engine.stop import StopRequest
from cmtmae_scale.engine.stragglers import Stragglers
from cmtmae_scale.engine.telemetry import Telemetry
from cmtmae_scale.engine.watchdog import Place
from cmtmae_scale.pretraining.prepare import Models
from cmtmae_scale.runtime.progress_file import ProgressFile
from dataloading.index import Index
from dataloading.stream import Batch

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
    standing: ProgressFile | None
    saved_facts: dict[str, Any]
    run_dir: Path
    skips: Skips = field(default_factory=lambda: Skips(Guard()))
    """Steps left out."""
    place: Place = field(default_factory=Place)
    """Where in the loop this rank is; for the watchdog."""
    stragglers: Stragglers = field(default_factory=lambda: Stragglers(torch.device("cpu"), 1))
    """Compares the ranks' speeds."""
    evaluate: Evaluate | None = None
    """Called every ``eval.every`` steps."""
    draw: Draw | None = None
    """Called every ``log.images_every`` steps and at the end."""
    index: Index | None = None
    """The images; ``None`` where they are synthetic."""

    def saved_state(self) -> dict[str, Any]:
        """What a checkpoint holds beside tensors."""
        return {
            "progress": self.progress.to_dict(),
            "skips": self.skips.to_dict(),
            **self.saved_facts,
        }

    def incident(self, what: str, why: str, **facts: Any) -> None:
        """Note in the log that something went wrong; rank 0 alone has one."""
        if self.telemetry is not None:
            self.telemetry.incident(self.progress.step, what, why, **facts)
