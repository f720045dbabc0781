"""The protocol between the engine and a task, and the parts of a run."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from cmtmae_scale.backends.base import Backend, Work
from cmtmae_scale.checkpoint.writer import Writer
from cmtmae_scale.config.batch import BatchPlan
from cmtmae_scale.config.schema import Trained
from cmtmae_scale.engine.profile import StepProfile
from cmtmae_scale.engine.progress import Progress
from cmtmae_scale.engine.scalars import Scalars
from cmtmae_scale.engine.skips import Skips
from cmtmae_scale.engine.stop import StopRequest
from cmtmae_scale.engine.stragglers import Stragglers
from cmtmae_scale.engine.telemetry import Telemetry
from cmtmae_scale.engine.watchdog import Place
from cmtmae_scale.runtime.progress_file import ProgressFile
from dataloading.index import Index
from dataloading.stream import Batch, Stream


class SideTask(NamedTuple):
    """Work between steps that changes nothing of the training."""

    stage: str
    """Stage for the watchdog and for messages, one of ``watchdog.STAGES``."""
    is_due: Callable[[Progress], bool]
    """Whether to run after the last step of the progress; the same on every rank."""
    run: Callable[["Run"], None]
    """A collective; an exception ends only the side task, and training continues."""


class Task(Protocol):
    """What is trained: pre-training or fine-tuning.

    The engine calls ``open_index``, ``build``, ``open_stream``, then ``scalars`` per step,
    ``prepare_fixed`` and ``prepare`` per micro-batch, and ``conclude`` after the last step.
    """

    name: str
    """Recorded in every checkpoint; another task refuses to resume it."""
    terms: tuple[str, ...]
    """Names of the loss terms and then of the observations of a micro-batch, in order; the first
    is ``loss/total``."""
    logged: tuple[str, ...]
    """The terms that this run has; the others are not logged."""
    free_keys: tuple[str, ...]
    """Config keys, or groups with a trailing dot, that may change at a resume."""
    view_sizes: Sequence[int]
    """Sides of the views in a batch, pixels."""
    side_tasks: list[SideTask]
    prior_steps: int
    """Applied steps of another run whose moments this run started with; AdamW counts them too."""

    def open_index(self, run_dir: Path) -> Index:
        """Open the training images. A collective."""
        ...

    def build(self, saved: dict[str, Any] | None, stop: StopRequest, stack: ExitStack) -> Backend:
        """Build the models and hand them to a backend. A collective.

        Args:
            saved: state of the checkpoint whose weights are loaded next; ``None``: a new run.
            stop: takes failures that must keep a step from being applied.
            stack: closes what is opened.
        """
        ...

    def open_stream(self, position: int) -> Stream:
        """Open this rank's views from a global sample index on."""
        ...

    def scalars(self, progress: Progress) -> Scalars:
        """Return the scheduled numbers of the next step."""
        ...

    def prepare_fixed(self, batch: Batch) -> Any:
        """Compute what depends on the views alone, such as the teacher's output.

        The engine calls it for the first micro-batch of a step before the previous step is applied,
        so it must use neither the weights nor scheduled numbers. No collective.
        """
        ...

    def prepare(self, batch: Batch, fixed: Any, scalars: Any) -> tuple[Work, Sequence[Tensor]]:
        """Turn views into inputs and targets, and 0-dim observations for the report.

        Args:
            batch: the views.
            fixed: from ``prepare_fixed``.
            scalars: the step's, from ``scalars``.
        """
        ...

    def check_inputs(self, step: int) -> None:
        """Check for inputs that are not finite after a step was refused. A collective.

        Raises:
            TeacherError: on every rank, if skipping the step would not help; names the samples.
        """
        ...

    def step_sums(self) -> Tensor:
        """Return what the step sums over ranks besides the report: 1-D float32, may be empty.

        It is reduced together with the report, after the last micro-batch; a value that is not
        finite prevents the update.
        """
        ...

    def record_applied(self, sums: Sequence[float]) -> None:
        """Receive the sums of ``step_sums`` over ranks after a step that was applied."""
        ...

    def saved_state(self) -> dict[str, Any]:
        """Return the part of a checkpoint's state that is specific to this task."""
        ...

    def restore(self, saved: dict[str, Any]) -> None:
        """Continue from the state of a checkpoint whose weights are loaded."""
        ...

    def conclude(self, run: "Run") -> None:
        """Do the work that follows the last step of a complete run. A collective."""
        ...


class Drawn(NamedTuple):
    """A micro-batch, and what is computed from it without the weights."""

    batch: Batch
    fixed: Any
    """From ``Task.prepare_fixed``."""
    waited_s: float
    """Seconds in which this rank waited for the views."""


@dataclass
class Run:
    """Everything that the loop works with, built by ``build.py``."""

    config: Trained
    task: Task
    plan: BatchPlan
    device: torch.device
    run_dir: Path
    index: Index
    stream: Iterator[Batch]
    backend: Backend
    progress: Progress
    writer: Writer
    stop: StopRequest
    telemetry: Telemetry | None
    """On rank 0 only."""
    progress_file: ProgressFile | None
    """On rank 0 only."""
    skips: Skips
    stragglers: Stragglers
    saved_facts: dict[str, Any]
    ahead: Drawn | None = None
    """First micro-batch of the next step, if it is prepared already; it is not saved: a launch
    prepares it again."""
    profile: StepProfile | None = None
    """On rank 0, if ``log.profile_steps`` is given."""
    place: Place = field(default_factory=Place)
    """Where in the loop this rank is; for the watchdog."""
    drawn: float = 0.0
    """Views sampled since this launch, over all ranks."""
    undecodable: float = 0.0
    """Of them, views that could not be decoded."""

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds besides tensors."""
        return {
            "task": self.task.name,
            "progress": self.progress.to_dict(),
            "skips": self.skips.to_dict(),
            **({} if self.telemetry is None else {"log_interval": self.telemetry.open_interval()}),
            **self.saved_facts,
            **self.task.saved_state(),
        }

    def record_incident(self, kind: str, why: str, **facts: Any) -> None:
        """Record a fault in the log, on rank 0."""
        if self.telemetry is not None:
            self.telemetry.record_incident(self.progress.step, kind, why, **facts)
