"""Starts that end without a newer checkpoint: after some of them trying again is no use."""

import json
import logging
from pathlib import Path

from cmtmae_scale.checkpoint.layout import candidates, step_of
from cmtmae_scale.errors import NoProgressError
from cmtmae_scale.runtime.collectives import text_from_first
from cmtmae_scale.runtime.storage import write_text

logger = logging.getLogger(__name__)

FILE = "attempts.json"
LIMIT = 3


def count_attempt(run_dir: Path, rank: int) -> None:
    """Count a start from the newest checkpoint; a collective.

    Args:
        run_dir: the run's folder.
        rank: this rank; rank 0 counts.

    Raises:
        NoProgressError: on every rank, if ``LIMIT`` starts in a row crashed or were killed before
            they wrote a newer checkpoint.
    """
    problem = text_from_first(note_attempt(run_dir) if rank == 0 else "")
    if problem:
        raise NoProgressError(problem)


def note_attempt(run_dir: Path) -> str:
    """Write down one more start; says what is wrong if there were too many, else nothing."""
    newest = next(iter(candidates(run_dir / "checkpoints")), None)
    step = 0 if newest is None else step_of(newest) or 0
    count = 1 + attempts_from(run_dir, step)
    if count > LIMIT:
        return (
            f"{run_dir}: {LIMIT} starts in a row ended at step {step} without a newer checkpoint; "
            "not tried again: find the cause in the logs, lower checkpoint.every if the starts "
            f"were merely short, then delete {run_dir / FILE}"
        )
    try:
        write_text(run_dir / FILE, json.dumps({"step": step, "count": count}) + "\n")
    except OSError as error:
        logger.warning("%s could not be written (%s)", run_dir / FILE, error)
    return ""


def attempts_from(run_dir: Path, step: int) -> int:
    """Number of starts from a step that were not followed by progress."""
    try:
        record = json.loads((run_dir / FILE).read_text())
        return int(record["count"]) if int(record["step"]) == step else 0
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def forget_attempts(run_dir: Path) -> None:
    """Begin to count anew: this start ended as it should, or because somebody has to act."""
    try:
        (run_dir / FILE).unlink(missing_ok=True)
    except OSError as error:
        logger.warning("%s could not be removed (%s)", run_dir / FILE, error)
