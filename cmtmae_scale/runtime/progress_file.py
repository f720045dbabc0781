"""Progress of a run in ``RUN_DIR/progress.json``, for processes that run beside it."""

import json
import time
from pathlib import Path
from typing import NamedTuple

from cmtmae_scale.runtime.storage import read_json, warn_unwritten, write_atomic

FILE = "progress.json"
PAUSE_S = 0.2
"""Shortest time between two writes."""


class PublishedProgress(NamedTuple):
    """Positions in the run's stream of views."""

    position: int
    """Views sampled."""
    saved: int
    """Position of the newest checkpoint: if it is intact, no launch continues from before it."""
    end: int
    """Position at which the run is complete."""


class ProgressFile:
    """Publishes a run's progress, at most every ``PAUSE_S``; on rank 0 only."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / FILE
        self.published: PublishedProgress | None = None
        self.since = float("-inf")

    def publish(self, progress: PublishedProgress) -> None:
        """Write the progress if it is due, or at the end; a store error only causes a warning."""
        now = time.monotonic()
        due = now - self.since >= PAUSE_S or progress.position >= progress.end
        if progress == self.published or not due:
            return
        try:
            write_atomic(self.path, json.dumps(progress._asdict()) + "\n", durable=False)
        except OSError as error:
            warn_unwritten(self.path, error)
            return
        self.published, self.since = progress, now


def read_published_progress(run_dir: Path) -> PublishedProgress | None:
    """Return the published progress of a run, or ``None`` before its first launch."""
    try:
        tree = read_json((run_dir / FILE).read_bytes())
        return PublishedProgress(*(int(tree[name]) for name in PublishedProgress._fields))
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return None
