"""``RUN_DIR/starts.jsonl``: when, how and with what a run was started, each time."""

import json
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

from cmtmae_scale import __version__

STARTS_FILE = "starts.jsonl"


def note_start(
    run_dir: Path,
    step: int,
    recipe: str,
    overrides: Sequence[str],
    world_size: int,
    device: torch.device,
) -> None:
    """Add a line about this start.

    Args:
        run_dir: the run's folder.
        step: from which it continues.
        recipe: file, as given.
        overrides: of the recipe, as given.
        world_size: number of ranks.
        device: rank 0's.
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
    with (run_dir / STARTS_FILE).open("a") as file:
        file.write(json.dumps(record) + "\n")
