"""A tiny run and its sidecar, each in a process of its own, either of which may be killed."""

import os
import signal
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

from cmtmae_scale.cache.format import read_seal
from cmtmae_scale.config.derive import cache_folder
from cmtmae_scale.config.load import load_config
from tests.pretraining.cached_run_case import observe

ROWS_A_PART = 4
"""One micro-batch: the sidecar's batches are then the trainer's own, bit by bit."""


def train_beside(
    recipe: Path, run_dir: Path, overrides: list[str], warm_at: int, die_at: int | None
) -> list[float]:
    """Train; returns ``cache/hit`` of each step.

    From step ``warm_at`` on the part of the step after is waited for, so that hits do not depend on
    how fast this machine is today.
    """
    from cmtmae_scale.cache import followed
    from cmtmae_scale.engine import loop
    from cmtmae_scale.runtime import progress_file as standing

    config = load_config(recipe, [f"run.output_dir={run_dir}", *overrides])
    assert config.train.global_batch_size == ROWS_A_PART and config.train.steps is not None
    folder, step, last = cache_folder(config), loop.step, config.train.steps - 1

    def paced(parts: Any, scalars: Any) -> Any:
        progress = parts.progress
        if progress.step == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        limit = time.monotonic() + 20
        wanted = progress.position // ROWS_A_PART + 1
        while warm_at <= progress.step < last and read_seal(folder, wanted) is None:
            time.sleep(0.01)
            if time.monotonic() > limit:
                break
        return step(parts, scalars)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(loop, "step", paced))
        for module in (standing, followed):  # every step is told, and the cache found at once
            stack.enter_context(mock.patch.object(module, "PAUSE_S", 0.0))
        seen = observe(recipe, run_dir, overrides)
    assert not seen.error, seen.error
    return [entry["cache/hit"] for entry in seen.log]


def follow(run_dir: Path, shard: str, ahead: int, die_at: int | None = None) -> int:
    """Follow a run; returns the exit code. ``die_at``: killed when this part has been written."""
    import torch

    from cmtmae_scale.cache import build
    from cmtmae_scale.commands import precompute

    torch.set_num_threads(1)
    write = build.write_part

    def mortal(folder: Path, manifest: Any, part: int, fields: Any) -> None:
        write(folder, manifest, part, fields)
        if die_at is not None and part >= die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    arguments = ["--follow", str(run_dir), "--shard", shard, "--ahead", str(ahead)]
    with mock.patch.object(build, "write_part", mortal):
        return precompute.main([*arguments, "--rows-a-part", str(ROWS_A_PART)])


def parts_on_storage(folder: Path) -> int:
    """Number of parts, whole or not."""
    return len(list(folder.glob("parts/*.safetensors")))
