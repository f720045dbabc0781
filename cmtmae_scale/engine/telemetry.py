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
from tqdm import tqdm

from cmtmae_scale.engine.event_file import EventFile
from cmtmae_scale.runtime.storage import (
    append_line,
    atomic_path,
    optional_write,
    warn_unwritten,
    write_atomic,
)

logger = logging.getLogger(__name__)

LOG_FILE = "log.jsonl"
FIGURES = "figures"
TENSORBOARD = "tensorboard"
LOST = "log lines lost"
"""Kind of the incident that counts lines which could not be written."""
SHOWN = ("loss/total", "loss/teacher", "loss/student", "loss/pixel", "lr", "grad_norm", "images_s")


class Telemetry:
    """Averages values between log entries and writes them; only rank 0 has one.

    What the store refuses during the run is lost with a warning, and the next line of the log that
    fits counts the lost lines.

    Args:
        run_dir: the run's folder.
        start: step that the run continues from; later entries of an earlier launch are cut.
        end: last step.
        every: steps between entries.

    Raises:
        OSError: if the store is full or fails at the launch.
    """

    def __init__(self, run_dir: Path, start: int, end: int, every: int) -> None:
        self.file = run_dir / LOG_FILE
        self.step = start
        self.lost_lines = 0
        self.figures = run_dir / FIGURES
        with optional_write(self.file, at_launch=True):
            cut_log(self.file, start)
        with optional_write(self.figures, at_launch=True):
            cut_figures(self.figures, start)
        self.board = EventFile(run_dir / TENSORBOARD, purge_step=start + 1)
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
            OSError: if the PNG cannot be written.
        """
        self.record_side_task(FIGURES, step, {}, took_s)
        with optional_write(self.board.path):
            self.board.add_image(step, FIGURES, sheet)
        self.figures.mkdir(exist_ok=True)
        with atomic_path(self.figures / f"step-{step:08d}.png") as draft:
            Image.fromarray(sheet).save(draft, "PNG", optimize=True)

    def append(self, step: int, entry: dict[str, float]) -> None:
        """Add a line to the log file and points to TensorBoard."""
        self.append_line(step, {"step": step, **entry})
        with optional_write(self.board.path):
            self.board.add_scalars(step, entry)

    def append_line(self, step: int, record: dict[str, Any] | None) -> None:
        """Append a line to the log, after an incident that counts the lines lost before it."""
        self.step = step
        records = [] if record is None else [record]
        if self.lost_lines:
            why = f"{self.lost_lines} lines of {LOG_FILE} could not be written"
            lost = {"step": step, "incident": LOST, "why": why, "lost_lines": self.lost_lines}
            records.insert(0, lost)
        try:
            append_line(self.file, "\n".join(map(json.dumps, records)))
        except OSError as error:
            self.lost_lines += record is not None
            warn_unwritten(self.file, error)
        else:
            self.lost_lines = 0

    def record_incident(self, step: int, kind: str, why: str, **facts: Any) -> None:
        """Write a line about a fault; later launches keep it when they cut the log.

        Args:
            step: number of steps taken.
            kind: kind of incident.
            why: what was found.
            facts: further values.
        """
        logger.warning("step %d: %s: %s", step, kind, why)
        self.append_line(step, {"step": step, "incident": kind, "why": why, **facts})

    def roll_back(self, step: int) -> None:
        """Drop the records after a step."""
        with optional_write(self.file):
            cut_log(self.file, step)
        self.board = EventFile(self.file.parent / TENSORBOARD, purge_step=step + 1)
        self.bar.update(step - self.bar.n)
        self.sums, self.counts, self.views, self.waited_s = {}, {}, 0, 0.0
        self.since = time.monotonic()

    def close(self) -> None:
        """Count the lines lost last, if the count fits now, and release."""
        self.bar.close()
        if self.lost_lines:
            self.append_line(self.step, None)


def cut_log(file: Path, step: int) -> None:
    """Drop entries after a step, but for incidents, and lines that cannot be read.

    Raises:
        OSError: if the file cannot be read or replaced.
    """
    if not file.exists():
        return
    text = file.read_bytes()
    kept: list[bytes] = []
    unreadable: list[int] = []
    for number, line in enumerate(text.split(b"\n"), 1):
        try:
            entry = json.loads(line) if line.strip() else None
            if entry is not None and (entry["step"] <= step or "incident" in entry):
                kept.append(line + b"\n")
        except (ValueError, KeyError, TypeError, RecursionError):
            unreadable.append(number)
    if unreadable:
        shown = ", ".join(map(str, unreadable[:8])) + (", ..." if len(unreadable) > 8 else "")
        count = len(unreadable)
        logger.warning("%s: %d unreadable lines were dropped (line %s)", file, count, shown)
    if b"".join(kept) != text:
        write_atomic(file, b"".join(kept))


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
