"""A trace of some steps, and the names of stages in it."""

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from cmtmae_scale.runtime.storage import optional_write

logger = logging.getLogger(__name__)

FOLDER = "profile"


def span(name: str) -> AbstractContextManager[Any]:
    """Return a context that names a stage: in a trace, else on a GPU as an NVTX range."""
    if torch.autograd._profiler_enabled():  # pyright: ignore[reportPrivateImportUsage]
        return record_function(name)
    if torch.cuda.is_initialized():
        return torch.cuda.nvtx.range(name)
    return nullcontext()


class StepProfile:
    """Traces the steps ``log.profile_steps`` on this rank, once per launch.

    Args:
        run_dir: the run's folder; ``profile/`` is written there.
        steps: first and last step.
        device: device of this rank; a GPU's allocations are recorded too.
    """

    def __init__(self, run_dir: Path, steps: Sequence[int], device: torch.device) -> None:
        self.folder = run_dir / FOLDER
        self.first, self.last = steps
        self.device = device
        self.profiler: profile | None = None
        self.traced: list[int] = []

    @property
    def is_tracing(self) -> bool:
        return self.profiler is not None

    def begin(self, step: int) -> None:
        """Start at the first step, or at a later step of the range if the launch begins there."""
        if self.is_tracing or self.traced or not self.first <= step <= self.last:
            return
        activities = [ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history()
        self.profiler = profile(activities=activities, acc_events=True)
        self.profiler.start()

    def end(self, step: int) -> None:
        """Count a step, applied or skipped; write the trace after the last step."""
        self.traced.append(step)
        if step >= self.last:
            self.close()

    def close(self) -> None:
        """Stop tracing, and write the traced steps."""
        profiler, self.profiler = self.profiler, None
        if profiler is None:
            return
        profiler.stop()
        if self.traced:
            self.write(profiler, f"steps-{self.traced[0]:08d}-{self.traced[-1]:08d}")
        if self.device.type == "cuda":
            torch.cuda.memory._record_memory_history(enabled=None)

    def write(self, profiler: profile, steps: str) -> None:
        """Write the trace and a GPU's allocations; an error of the store only causes a warning."""
        trace, memory = self.folder / f"{steps}.json.gz", self.folder / f"memory-{steps}.pickle"
        with optional_write(trace):
            self.folder.mkdir(exist_ok=True)
            profiler.export_chrome_trace(str(trace))
            logger.info("trace %s: open it in ui.perfetto.dev", trace)
            if self.device.type == "cuda":
                torch.cuda.memory._dump_snapshot(str(memory))
                logger.info("memory snapshot %s: open it in pytorch.org/memory_viz", memory)
