"""Logs of a run: ``log.jsonl``, TensorBoard, figures, and one line or a progress bar."""

import json
import logging
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from cmtmae_scale.runtime.storage import atomic_path, write_atomic

logger = logging.getLogger(__name__)

LOG_FILE = "log.jsonl"
FIGURES = "figures"
SHOWN = ("loss/total", "loss/teacher", "loss/student", "loss/pixel", "lr", "grad_norm", "images_s")


class Telemetry:
    """Averages values between log entries and writes them; only rank 0 has one.

    Args:
        run_dir: the run's folder.
        start: step that the run continues from; later entries of an earlier launch are cut.
        end: last step.
        every: steps between entries.
    """

    def __init__(self, run_dir: Path, start: int, end: int, every: int) -> None:
        self.file = run_dir / LOG_FILE
        cut_log(self.file, start)
        self.figures = run_dir / FIGURES
        cut_figures(self.figures, start)
        self.board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start + 1)
        self.every = every
        self.end = end
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}
        self.views = 0
        self.waited_s = 0.0
        self.since = self.began = time.monotonic()
        self.side_task_s: dict[str, float] = {}
        terminal = sys.stderr.isatty()
        self.bar = tqdm(total=end, initial=start, unit="step", disable=not terminal)

    def record(self, step: int, values: dict[str, float], views: int, waited_s: float) -> None:
        """Add a finished step; writes an entry when one is due.

        Args:
            step: number of the finished step, from 1.
            values: scalars; their mean over the steps of the interval that have them is written.
            views: views of the step, over all ranks.
            waited_s: seconds in which this rank waited for data.
        """
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1
        self.views += views
        self.waited_s += waited_s
        self.bar.update(1)
        if step % self.every == 0 or step == self.end:
            self.write(step)

    def write(self, step: int) -> None:
        """Write the interval's means, its rates and the memory in use."""
        elapsed_s = max(time.monotonic() - self.since, 1e-9)
        entry = {name: total / self.counts[name] for name, total in self.sums.items()}
        entry["images_s"] = self.views / elapsed_s
        entry["data_wait_fraction"] = self.waited_s / elapsed_s
        entry["memory_gib"] = memory_gib()
        self.append(step, entry)
        self.board.flush()
        line = "  ".join(f"{name} {entry[name]:.4g}" for name in SHOWN if name in entry)
        if self.bar.disable:
            logger.info("step %d/%d  %s", step, self.end, line)
        else:
            self.bar.set_postfix_str(line)
        self.sums, self.counts, self.views, self.waited_s = {}, {}, 0, 0.0
        self.since = time.monotonic()

    def record_side_task(
        self, stage: str, step: int, values: dict[str, float], took_s: float
    ) -> float:
        """Write the results of a side task; returns the fraction of the time that its kind takes.

        Args:
            stage: kind of the side task; names the fraction.
            step: number of the finished step.
            values: results by name.
            took_s: seconds that training waited for it; the rates leave them out.
        """
        self.since += took_s
        spent_s = self.side_task_s[stage] = self.side_task_s.get(stage, 0.0) + took_s
        fraction = spent_s / max(time.monotonic() - self.began, 1e-9)
        self.append(step, {**values, f"{stage}/time_fraction": fraction})
        self.board.flush()
        if values:
            shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
            logger.info("step %d/%d  %s", step, self.end, shown)
        return fraction

    def record_figures(self, step: int, sheet: NDArray[np.uint8], took_s: float) -> None:
        """Write a sheet of figures as PNG and to TensorBoard.

        Args:
            step: number of the finished step.
            sheet: the figures, ``[height, width, 3]``.
            took_s: seconds that training waited for them.

        Raises:
            OSError: if the file cannot be written.
        """
        self.record_side_task(FIGURES, step, {}, took_s)
        self.board.add_image(FIGURES, sheet, step, dataformats="HWC")
        self.board.flush()
        self.figures.mkdir(exist_ok=True)
        with atomic_path(self.figures / f"step-{step:08d}.png") as draft:
            Image.fromarray(sheet).save(draft, "PNG", optimize=True)

    def append(self, step: int, entry: dict[str, float]) -> None:
        """Add a line to the log file and points to TensorBoard."""
        with self.file.open("a") as log:
            log.write(json.dumps({"step": step, **entry}) + "\n")
        for name, value in entry.items():
            self.board.add_scalar(name, value, step)

    def record_incident(self, step: int, kind: str, why: str, **facts: Any) -> None:
        """Write a line about a fault; later launches keep it when they cut the log.

        Args:
            step: number of steps taken.
            kind: kind of incident.
            why: what was found.
            facts: further values.
        """
        logger.warning("step %d: %s: %s", step, kind, why)
        line = json.dumps({"step": step, "incident": kind, "why": why, **facts})
        with self.file.open("a") as log:
            log.write(line + "\n")

    def roll_back(self, step: int) -> None:
        """Drop the records after a step."""
        cut_log(self.file, step)
        self.board.close()
        self.board = SummaryWriter(str(self.file.parent / "tensorboard"), purge_step=step + 1)
        self.bar.update(step - self.bar.n)
        self.sums, self.counts, self.views, self.waited_s = {}, {}, 0, 0.0
        self.since = time.monotonic()

    def close(self) -> None:
        """Flush and release."""
        self.bar.close()
        self.board.close()


def cut_log(file: Path, step: int) -> None:
    """Drop entries after a step, but for incidents, and a half-written last line."""
    if not file.exists():
        return
    kept: list[str] = []
    for line in file.read_text().splitlines():
        try:
            entry = json.loads(line)
            if entry["step"] <= step or "incident" in entry:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            break
    write_atomic(file, "".join(kept))


def cut_figures(folder: Path, step: int) -> None:
    """Delete figures of later steps."""
    for file in folder.glob("step-*.png"):
        number = file.stem.removeprefix("step-")
        if number.isdecimal() and int(number) > step:
            file.unlink()


def memory_gib() -> float:
    """Return the peak memory of this rank, GiB: of its GPU, or without one of its process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
