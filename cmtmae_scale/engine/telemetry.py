"""Where numbers and pictures of a run go: files, TensorBoard, and one line or a progress bar."""

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

logger = logging.getLogger(__name__)

LOG_FILE = "log.jsonl"
PICTURES = "pictures"
EVALUATION_SHARE = 0.05
"""Share of a run's time that evaluation should not exceed."""
SHOWN = ("loss/total", "loss/teacher", "loss/student", "loss/pixel", "lr", "grad_norm", "images_s")


class Telemetry:
    """Collects means between log entries and writes them; only rank 0 makes one.

    Args:
        run_dir: the run's folder.
        start: step that the run continues from; later entries of an earlier start are cut.
        end: last step.
        every: steps between entries.
    """

    def __init__(self, run_dir: Path, start: int, end: int, every: int) -> None:
        self.file = run_dir / LOG_FILE
        cut_log(self.file, start)
        self.pictures = run_dir / PICTURES
        cut_pictures(self.pictures, start)
        self.board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start + 1)
        self.every = every
        self.end = end
        self.sums: dict[str, float] = {}
        self.steps = 0
        self.views = 0
        self.waited_s = 0.0
        self.since = self.began = time.monotonic()
        self.evaluating_s = self.drawing_s = 0.0
        self.warned = False
        terminal = sys.stderr.isatty()
        self.bar = tqdm(total=end, initial=start, unit="step", disable=not terminal)

    def record(self, step: int, values: dict[str, float], views: int, waited_s: float) -> None:
        """Add a finished step; writes an entry when one is due.

        Args:
            step: number of the finished step, from 1.
            values: scalars; their mean over the interval is written.
            views: global number of views in the step.
            waited_s: seconds in which this rank waited for data.
        """
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.steps += 1
        self.views += views
        self.waited_s += waited_s
        self.bar.update(1)
        if step % self.every == 0 or step == self.end:
            self.write(step)

    def write(self, step: int) -> None:
        """Write the interval's means, its rates and the memory in use."""
        elapsed_s = max(time.monotonic() - self.since, 1e-9)
        entry = {name: total / self.steps for name, total in self.sums.items()}
        entry["images_s"] = self.views / elapsed_s
        entry["data_wait_share"] = self.waited_s / elapsed_s
        entry["memory_gib"] = memory_gib()
        self.append(step, entry)
        self.board.flush()
        line = "  ".join(f"{name} {entry[name]:.4g}" for name in SHOWN if name in entry)
        if self.bar.disable:
            logger.info("step %d/%d  %s", step, self.end, line)
        else:
            self.bar.set_postfix_str(line)
        self.sums, self.steps, self.views, self.waited_s = {}, 0, 0, 0.0
        self.since = time.monotonic()

    def record_evaluation(self, step: int, values: dict[str, float], took_s: float) -> None:
        """Write what an evaluation found, and the share of the time that evaluations take.

        Args:
            step: number of the finished step.
            values: accuracies.
            took_s: seconds that training stood still for it; they do not count in the rates.
        """
        self.evaluating_s += took_s
        share = self.share_of_time(self.evaluating_s)
        self.record_pause(step, {**values, "eval/time_share": share}, took_s)
        if share > EVALUATION_SHARE and not self.warned:
            self.warned = True
            logger.warning(
                "evaluation has taken %.0f %% of the time since the start, %.1f s for this one; "
                "raise eval.every, or name fewer images in eval.train_path and eval.test_path",
                *(100 * share, took_s),
            )

    def record_pictures(self, step: int, sheet: NDArray[np.uint8], took_s: float) -> None:
        """Write pictures as PNG and to TensorBoard, and the share of the time that they take.

        Args:
            step: number of the finished step.
            sheet: the pictures, ``[height, width, 3]``.
            took_s: seconds that training stood still for them; they do not count in the rates.

        Raises:
            OSError: if the file cannot be written.
        """
        self.since += took_s
        self.drawing_s += took_s
        self.append(step, {"pictures/time_share": self.share_of_time(self.drawing_s)})
        self.board.add_image("pictures", sheet, step, dataformats="HWC")
        self.board.flush()
        self.pictures.mkdir(exist_ok=True)
        draft = self.pictures / "draft.tmp"
        Image.fromarray(sheet).save(draft, "PNG", optimize=True)
        draft.replace(self.pictures / f"step-{step:08d}.png")

    def share_of_time(self, spent_s: float) -> float:
        """Share of the time since the start."""
        return spent_s / max(time.monotonic() - self.began, 1e-9)

    def record_pause(self, step: int, values: dict[str, float], took_s: float) -> None:
        """Write what was found while training stood still for ``took_s`` seconds."""
        self.since += took_s
        self.append(step, values)
        self.board.flush()
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        logger.info("step %d/%d  %s", step, self.end, shown)

    def append(self, step: int, entry: dict[str, float]) -> None:
        """Add a line to the log file and points to TensorBoard."""
        with self.file.open("a") as log:
            log.write(json.dumps({"step": step, **entry}) + "\n")
        for name, value in entry.items():
            self.board.add_scalar(name, value, step)

    def incident(self, step: int, what: str, why: str, **facts: Any) -> None:
        """Add a line that says what went wrong; kept when a later start cuts the log.

        Args:
            step: steps taken.
            what: the kind of incident.
            why: what was found.
            facts: further values.
        """
        logger.warning("step %d: %s: %s", step, what, why)
        line = json.dumps({"step": step, "incident": what, "why": why, **facts})
        with self.file.open("a") as log:
            log.write(line + "\n")

    def go_back(self, step: int) -> None:
        """Drop what was recorded after a step."""
        cut_log(self.file, step)
        self.board.close()
        self.board = SummaryWriter(str(self.file.parent / "tensorboard"), purge_step=step + 1)
        self.bar.update(step - self.bar.n)
        self.sums, self.steps, self.views, self.waited_s = {}, 0, 0, 0.0
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
    draft = file.with_name(file.name + ".tmp")
    draft.write_text("".join(kept))
    draft.replace(file)


def cut_pictures(folder: Path, step: int) -> None:
    """Delete pictures of later steps."""
    for file in folder.glob("step-*.png"):
        number = file.stem.removeprefix("step-")
        if number.isdecimal() and int(number) > step:
            file.unlink()


def memory_gib() -> float:
    """Peak memory of this rank, GiB: the GPU's where there is one, else the process's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
