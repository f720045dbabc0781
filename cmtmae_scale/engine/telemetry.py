"""Values of a run: averaged per interval, shown as a log line, and handed to the sinks."""

import logging
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from cmtmae_scale.checkpoint.layout import is_finite
from cmtmae_scale.engine.sinks import LOG_FILE, TENSORBOARD, JsonLines, Sink, TensorBoard
from cmtmae_scale.engine.trackers import FAILED, LOST, Tracker, close_trackers
from cmtmae_scale.runtime.storage import atomic_path, optional_write

logger = logging.getLogger(__name__)

FIGURES = "figures"
SHOWN = {
    "loss/total": ("loss", 4),
    "loss/teacher": ("teacher", 4),
    "loss/student": ("student", 4),
    "loss/pixel": ("pixel", 4),
    "lr": ("lr", 3),
    "grad_norm": ("grad", 3),
    "images_s": ("views/s", 3),
}
"""Values of a log line: their names there, and significant digits."""


class Telemetry:
    """Averages values between log entries and hands them to the sinks; only rank 0 has one.

    Args:
        run_dir: the run's folder.
        start: step that the run continues from; later records of an earlier launch are removed.
        end: last step.
        every: steps between entries.
        position: views sampled before that step, over all ranks.
        trackers: further sinks, which may fail.

    Raises:
        OSError: if the store is full or fails at the launch.
    """

    def __init__(
        self,
        run_dir: Path,
        start: int,
        end: int,
        every: int,
        position: int = 0,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        self.figures = run_dir / FIGURES
        self.log = JsonLines(run_dir / LOG_FILE, start)
        self.trackers = trackers
        board = TensorBoard(run_dir / TENSORBOARD, start)
        self.sinks: list[Sink] = [self.log, board, *trackers]
        with optional_write(self.figures, at_launch=True):
            cut_figures(self.figures, start)
        self.step = start
        self.position = position
        self.every = every
        self.end = end
        self.began = time.monotonic()
        self.side_task_s: dict[str, float] = {}
        self.start_interval()
        self.step_s: float | None = None
        """Seconds per step, side tasks included, of this launch without its first interval."""
        self.timed_from = start, self.began
        self.is_first_interval = True
        self.bar = tqdm(
            total=end,
            initial=start,
            unit="step",
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
        )

    def start_interval(self) -> None:
        """Clear the values since the last entry."""
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}
        self.views = 0
        self.waited_s = 0.0
        self.since = time.monotonic()

    def open_interval(self) -> dict[str, Any]:
        """Return the finite values since the last entry, which a checkpoint holds."""
        sums = {name: total for name, total in self.sums.items() if is_finite(total)}
        return {"sums": sums, "counts": {name: self.counts[name] for name in sums}}

    def restore(self, saved: dict[str, Any] | None) -> None:
        """Continue the interval that ``open_interval`` returned; rates are of this launch alone.

        ``None``: the checkpoint of an earlier version.
        """
        if saved is not None:
            self.sums, self.counts = dict(saved["sums"]), dict(saved["counts"])

    def record(
        self, step: int, values: dict[str, float], views: int, waited_s: float, position: int
    ) -> None:
        """Add a finished step, and write an entry if it is due.

        Args:
            step: number of the finished step, from 1.
            values: scalars; their mean over the steps of the interval that have them is written.
                A skipped step has none.
            views: views of the step, over all ranks.
            waited_s: seconds in which this rank waited for data.
            position: views sampled in the whole run, over all ranks.
        """
        self.step, self.position = step, position
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1
        self.views += views
        self.waited_s += waited_s
        self.bar.update(step - self.bar.n)
        if step % self.every == 0 or step == self.end:
            self.write()

    def write(self) -> None:
        """Write the interval's means, its rates and the memory in use."""
        elapsed_s = max(time.monotonic() - self.since, 1e-9)
        entry = {name: total / self.counts[name] for name, total in self.sums.items()}
        entry["images_s"] = self.views / elapsed_s
        entry["data_wait_fraction"] = self.waited_s / elapsed_s
        entry["memory_gib"] = memory_gib()
        entry["views"] = self.position
        self.add_scalars(entry)
        self.estimate_rate()
        shown = {name: what for name, what in SHOWN.items() if name in entry}
        self.log_line(
            [f"{label} {format_value(entry[name], n)}" for name, (label, n) in shown.items()]
        )
        self.start_interval()

    def estimate_rate(self) -> None:
        """Estimate the time per step; later estimates exclude the first interval, which is slow."""
        step, began = self.timed_from
        now = time.monotonic()
        self.step_s = (now - began) / max(self.step - step, 1)
        if self.is_first_interval:
            self.is_first_interval = False
            self.timed_from = self.step, now

    def log_line(self, shown: list[str]) -> None:
        """Log values of the present step, after its number, the views so far and the ETA."""
        views = self.position if self.position < 1000 else tqdm.format_sizeof(self.position)
        progress = f"step {self.step}/{self.end}", f"{views} views", f"ETA {self.remaining()}"
        logger.info("%s", "  ".join([*progress, *shown]))

    def remaining(self) -> str:
        """Return the time until the last step, side tasks included, as text."""
        if self.step_s is None:
            return "?"
        return tqdm.format_interval(self.step_s * (self.end - self.step))

    def record_side_task(
        self, stage: str, step: int, values: dict[str, float], took_s: float
    ) -> float:
        """Write the results of a side task; return the fraction of the time that its kind takes.

        Args:
            stage: kind of the side task; names the fraction.
            step: number of the finished step.
            values: results by name.
            took_s: seconds that training waited for it; excluded from the rates.
        """
        self.step = step
        self.since += took_s
        spent_s = self.side_task_s[stage] = self.side_task_s.get(stage, 0.0) + took_s
        fraction = spent_s / max(time.monotonic() - self.began, 1e-9)
        self.add_scalars({**values, f"{stage}/time_fraction": fraction})
        if values:
            self.log_line([f"{name} {format_value(value)}" for name, value in values.items()])
        return fraction

    def record_figures(self, step: int, sheet: NDArray[np.uint8], took_s: float) -> None:
        """Write a sheet of figures as PNG, and hand it to the sinks.

        Args:
            step: number of the finished step.
            sheet: the figures, ``[height, width, 3]``.
            took_s: seconds that training waited for them.

        Raises:
            OSError: if the PNG cannot be written.
        """
        self.record_side_task(FIGURES, step, {}, took_s)
        self.figures.mkdir(exist_ok=True)
        file = self.figures / f"step-{step:08d}.png"
        with atomic_path(file) as draft:
            Image.fromarray(sheet).save(draft, "PNG", optimize=True)
        for sink in self.sinks:
            sink.add_figure(step, FIGURES, sheet, file)

    def add_scalars(self, values: dict[str, float]) -> None:
        """Add values of the present step to every sink."""
        for sink in self.sinks:
            sink.add_scalars(self.step, values)
        self.report_trackers()

    def report_trackers(self) -> None:
        """Record trackers that failed for the first time."""
        for tracker in self.trackers:
            problem = tracker.take_problem()
            if problem is not None:
                self.record_incident(self.step, FAILED, problem)

    def record_incident(self, step: int, kind: str, why: str, **facts: Any) -> None:
        """Record a fault; ``log.jsonl`` keeps it when a later launch truncates the log.

        Args:
            step: number of steps taken.
            kind: kind of incident.
            why: what was found.
            facts: further values.
        """
        self.step = step
        logger.warning("step %d: %s: %s", step, kind, why)
        for sink in self.sinks:
            sink.add_incident(step, kind, why, facts)

    def roll_back(self, step: int) -> None:
        """Drop the records after a step."""
        for sink in self.sinks:
            sink.roll_back(step)
        self.step = step
        self.bar.update(step - self.bar.n)
        self.start_interval()
        self.timed_from = step, time.monotonic()

    def close(self) -> None:
        """Close the progress bar, the trackers and the log."""
        self.bar.close()
        close_trackers(self.trackers, is_complete=self.step >= self.end)
        self.report_trackers()
        for tracker in self.trackers:
            if tracker.lost_entries:
                why = f"{tracker.name} did not accept {tracker.lost_entries} entries of this launch"
                self.record_incident(self.step, LOST, why, lost_entries=tracker.lost_entries)
        self.log.close()


def format_value(value: float, digits: int = 4) -> str:
    """Format a number with ``digits`` significant digits, but with all digits before the point.

    >>> [format_value(value) for value in (0.000123456, 0.52, 12.0, 1234567.0)]
    ['1.235e-04', '0.5200', '12.00', '1,234,567']
    """
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    if 0 < abs(value) < 0.001:
        return f"{value:.{digits - 1}e}"
    return f"{value:#.{digits}g}"


def cut_figures(folder: Path, step: int) -> None:
    """Delete figures of later steps."""
    for file in folder.glob("step-*.png"):
        number = file.stem.removeprefix("step-")
        if number.isdecimal() and int(number) > step:
            file.unlink()


def memory_gib() -> float:
    """Return the peak memory of this rank in GiB: of its GPU, or without a GPU of its process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
