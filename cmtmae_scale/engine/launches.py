"""Launches of a run: counted while they make no progress, and recorded each time."""

import json
import logging
import platform
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import torch

from cmtmae_scale import __version__
from cmtmae_scale.checkpoint.layout import find_renaming, list_checkpoints, step_of
from cmtmae_scale.errors import NoProgressError
from cmtmae_scale.runtime.collectives import broadcast_text, on_all_ranks
from cmtmae_scale.runtime.storage import append_line, optional_write, read_json, write_atomic

logger = logging.getLogger(__name__)

COUNT_FILE = "attempts.json"
RECORD_FILE = "starts.jsonl"
LIMIT = 3


def count_launch(run_dir: Path, rank: int) -> None:
    """Count a launch from the newest checkpoint; a collective.

    Args:
        run_dir: the run's folder.
        rank: this rank; rank 0 counts.

    Raises:
        NoProgressError: on every rank, if ``LIMIT`` consecutive launches crashed or were killed
            before they wrote a newer checkpoint.
        StorageError: on every rank, if the store fails.
    """
    problem = broadcast_text(on_all_ranks(lambda: increment_count(run_dir) if rank == 0 else ""))
    if problem:
        raise NoProgressError(problem)


def increment_count(run_dir: Path) -> str:
    """Increment the launch count, or return the problem if the limit is reached, else ``""``."""
    names = checkpoint_names(run_dir / "checkpoints")
    record = {"checkpoints": names, "count": 1 + launches_from(run_dir, names)}
    try:
        refuse_further_launch(run_dir)
    except NoProgressError as error:
        return str(error)
    try:
        write_atomic(run_dir / COUNT_FILE, json.dumps(record) + "\n")
    except OSError as error:
        logger.warning("%s could not be written (%s)", run_dir / COUNT_FILE, error)
    return ""


def refuse_further_launch(run_dir: Path) -> None:
    """Refuse a launch after ``LIMIT`` launches without progress.

    Raises:
        NoProgressError: names the step and the file that counts.
    """
    root = run_dir / "checkpoints"
    if launches_from(run_dir, checkpoint_names(root)) >= LIMIT:
        raise NoProgressError(
            f"{run_dir}: {LIMIT} consecutive launches ended at step {newest_step(root)} without a "
            "new checkpoint; not tried again: find the cause in the logs, lower checkpoint.every "
            f"if the launches were merely short, then delete {run_dir / COUNT_FILE}"
        )


def newest_step(root: Path) -> int:
    """Return the step of the newest checkpoint that is not a renamed copy, or 0, unverified."""
    return next((step_of(root / name) or 0 for name in checkpoint_names(root)), 0)


def checkpoint_names(root: Path) -> list[str]:
    """Return the names of the checkpoints that are not renamed copies, newest first."""
    names: list[str] = []
    for folder in list_checkpoints(root):
        with suppress(OSError, ValueError, TypeError, AttributeError):
            if find_renaming(folder) is not None:
                continue
        names.append(folder.name)
    return names


def launches_from(run_dir: Path, names: Sequence[str]) -> int:
    """Return the number of consecutive launches that wrote none of the present checkpoints.

    A run that skips damaged checkpoints writes checkpoints of earlier steps, so that the newest
    checkpoint may stay the same.
    """
    try:
        record = read_json((run_dir / COUNT_FILE).read_bytes())
        return int(record["count"]) if set(names) <= set(record["checkpoints"]) else 0
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return 0


def reset_launch_count(run_dir: Path) -> None:
    """Delete the count: this launch ended as requested, or a person has to act."""
    try:
        (run_dir / COUNT_FILE).unlink(missing_ok=True)
    except OSError as error:
        logger.warning("%s could not be removed (%s)", run_dir / COUNT_FILE, error)


def take_back_launch(run_dir: Path) -> None:
    """Reduce the count by this launch: it was interrupted before it could make progress."""
    try:
        record = read_json((run_dir / COUNT_FILE).read_bytes())
        record["count"] = int(record["count"]) - 1
        if record["count"] > 0:
            write_atomic(run_dir / COUNT_FILE, json.dumps(record) + "\n")
        else:
            (run_dir / COUNT_FILE).unlink()
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        logger.warning("%s could not be corrected (%s)", run_dir / COUNT_FILE, error)


def record_launch(
    run_dir: Path,
    step: int,
    recipe: str,
    overrides: Sequence[str],
    world_size: int,
    device: torch.device,
) -> None:
    """Append this launch to ``RUN_DIR/starts.jsonl``.

    Args:
        run_dir: the run's folder.
        step: step that the launch continues from.
        recipe: file, as given.
        overrides: overrides of the recipe, as given.
        world_size: number of ranks.
        device: device of rank 0.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    record = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "step": step,
        "recipe": recipe,
        "overrides": list(overrides),
        "world_size": world_size,
        "device": name,
        "versions": {
            "cmtmae_scale": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
    with optional_write(run_dir / RECORD_FILE, at_launch=True):
        append_line(run_dir / RECORD_FILE, json.dumps(record))
