"""Sinks of a run's metrics, figures and incidents: ``log.jsonl``, TensorBoard, trackers."""

import json
import logging
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cmtmae_scale.engine.event_file import EventFile
from cmtmae_scale.runtime.storage import append_line, optional_write, warn_unwritten, write_atomic

logger = logging.getLogger(__name__)

LOG_FILE = "log.jsonl"
TENSORBOARD = "tensorboard"
LOST = "log lines lost"
"""Kind of the incident that counts lines which could not be written."""


class Sink(Protocol):
    """Receives what rank 0 records; never raises, and never waits for a network."""

    def add_scalars(self, step: int, values: dict[str, float]) -> None:
        """Add one point to each curve."""
        ...

    def add_figure(self, step: int, name: str, pixels: NDArray[np.uint8], file: Path) -> None:
        """Add an image ``[height, width, 3]``, which is also in a PNG file."""
        ...

    def add_incident(self, step: int, kind: str, why: str, facts: dict[str, Any]) -> None:
        """Add a text about a fault."""
        ...

    def roll_back(self, step: int) -> None:
        """Drop the records after a step, where the sink can drop records."""
        ...


class JsonLines:
    """``RUN_DIR/log.jsonl``: a line per record; figures are files of their own.

    A line that cannot be written is lost with a warning; an incident before the next line that can
    be written counts the lost lines.

    Args:
        file: the log.
        step: entries of an earlier launch after this step are removed.

    Raises:
        OSError: if the store is full or fails at the launch.
    """

    def __init__(self, file: Path, step: int) -> None:
        self.file = file
        self.step = step
        self.lost_lines = 0
        with optional_write(file, at_launch=True):
            cut_log(file, step)

    def add_scalars(self, step: int, values: dict[str, float]) -> None:
        self.append(step, {"step": step, **values})

    def add_figure(self, step: int, name: str, pixels: NDArray[np.uint8], file: Path) -> None:
        pass

    def add_incident(self, step: int, kind: str, why: str, facts: dict[str, Any]) -> None:
        self.append(step, {"step": step, "incident": kind, "why": why, **facts})

    def roll_back(self, step: int) -> None:
        with optional_write(self.file):
            cut_log(self.file, step)

    def close(self) -> None:
        """Record the number of the lines lost last, if it can be written now."""
        if self.lost_lines:
            self.append(self.step, None)

    def append(self, step: int, record: dict[str, Any] | None) -> None:
        """Append a line, after an incident that counts the lines lost before it."""
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


class TensorBoard:
    """``RUN_DIR/tensorboard``; points that cannot be written are lost with a warning.

    Args:
        folder: TensorBoard's folder of the run.
        step: points of an earlier launch after this step are not shown.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self.folder = folder
        self.events = EventFile(folder, purge_step=step + 1)

    def add_scalars(self, step: int, values: dict[str, float]) -> None:
        with optional_write(self.events.path):
            self.events.add_scalars(step, values)

    def add_figure(self, step: int, name: str, pixels: NDArray[np.uint8], file: Path) -> None:
        with optional_write(self.events.path):
            self.events.add_image(step, name, pixels)

    def add_incident(self, step: int, kind: str, why: str, facts: dict[str, Any]) -> None:
        with optional_write(self.events.path):
            self.events.add_text(step, "incidents", f"{kind}: {why}")

    def roll_back(self, step: int) -> None:
        self.events = EventFile(self.folder, purge_step=step + 1)


def cut_log(file: Path, step: int) -> None:
    """Drop unreadable lines and, except for incidents, the entries after a step.

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
