"""A tiny run and its sidecar, each in its own process; either may be killed."""

import os
import signal
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

from cmtmae_scale.cache.format import list_shard_folders, list_shards
from cmtmae_scale.config.load import load_config
from cmtmae_scale.config.teachers import cache_folder
from tests.pretraining.cached_run_case import observe

ROWS_PER_SHARD = 4
"""One micro-batch: the sidecar's batches are then the trainer's own, bit by bit."""


def train_beside(
    recipe: Path, run_dir: Path, overrides: list[str], warm_at: int, die_at: int | None
) -> list[float]:
    """Train; return ``cache/hit`` of each step.

    From step ``warm_at`` on each step waits for the shard of the next step, so that hits do not
    depend on the speed of this machine.
    """
    from cmtmae_scale.cache import reader, teacher
    from cmtmae_scale.engine import loop
    from cmtmae_scale.runtime import progress_file

    config = load_config(recipe, [f"run.output_dir={run_dir}", *overrides])
    assert config.train.global_batch_size == ROWS_PER_SHARD and config.train.steps is not None
    folder, step, last = cache_folder(config), loop.take_step, config.train.steps - 1

    def paced(run: Any, scalars: Any) -> Any:
        progress = run.progress
        run.writer.wait()  # slow storage would skip saves, which hold the sidecar back
        if progress.step == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        limit = time.monotonic() + 20
        wanted = progress.position // ROWS_PER_SHARD + 1
        while warm_at <= progress.step < last and wanted not in shards_on_storage(folder):
            time.sleep(0.01)
            if time.monotonic() > limit:
                break
        return step(run, scalars)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(loop, "take_step", paced))
        # Every step publishes its progress, and finds cache and shards at once.
        stack.enter_context(mock.patch.object(progress_file, "PAUSE_S", 0.0))
        stack.enter_context(mock.patch.object(teacher, "POLL_S", 0.0))
        stack.enter_context(mock.patch.object(reader, "SIDECAR_POLL_S", 0.0))
        seen = observe(recipe, run_dir, overrides)
    assert not seen.error, seen.error
    return [entry["cache/hit"] for entry in seen.log]


def follow_run(run_dir: Path, share: str, ahead: int, die_at: int | None = None) -> int:
    """Follow a run; return the exit code. ``die_at``: killed when this shard has been written."""
    import torch

    from cmtmae_scale.cache import build
    from cmtmae_scale.commands import precompute

    torch.set_num_threads(1)
    write = build.write_shard

    def mortal(folder: Path, manifest: Any, shard: int, fields: Any) -> None:
        write(folder, manifest, shard, fields)
        if die_at is not None and shard >= die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    arguments = ["--follow", str(run_dir), "--shard", share, "--ahead", str(ahead)]
    with mock.patch.object(build, "write_shard", mortal):
        return precompute.precompute_teacher([*arguments, "--rows-per-shard", str(ROWS_PER_SHARD)])


def shards_on_storage(folder: Path) -> set[int]:
    return set[int]().union(*map(list_shards, list_shard_folders(folder)))
