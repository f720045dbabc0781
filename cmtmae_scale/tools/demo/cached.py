"""Second part of the demo: build and verify a teacher cache, then train from it."""

import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

STEPS = 20
ROWS_PER_SHARD = 64


def train_from_cache(
    recipe: str, overrides: Sequence[str], run_dir: Path, steps: int, show: Callable[[str], None]
) -> int:
    """Build a cache of one view per image, verify it, and train a few steps from it.

    Recipe, overrides and steps are those of the demo's run; ``show`` prints a line. The new cache
    and run are created beside the run's folder.

    Returns:
        0, or the exit code of the command that failed.
    """
    cached = run_dir.with_name(f"{run_dir.name}-cached")
    if (cached / "cache").is_dir():
        shutil.rmtree(cached)
    steps = min(steps, STEPS)
    own = [*overrides, "views.views_per_image=1"]
    own += [f"cache.dir={cached / 'cache'}", f"run.output_dir={cached}"]
    build = ["precompute", "--config", recipe]
    build += ["--rows-per-shard", str(ROWS_PER_SHARD)]
    cache = ["teacher.mode=cached", "cache.on_miss=stop", f"train.steps={steps}", "log.every=1"]
    cache += ["log.images_every=null"]  # no teacher is in memory that could draw its attention
    show("the same with a precomputed teacher: build a cache, verify it, train from it ...")
    for command in (
        [*build, *own],
        [*build, "--verify", "0.05", *own],
        ["pretrain", "--config", recipe, *own, *cache],
    ):
        words = [sys.executable, "-m", "cmtmae_scale", *command]
        code = subprocess.run(words, stdin=subprocess.DEVNULL).returncode
        if code:
            show(f"cmtmae {' '.join(command)}: ended with exit code {code}")
            return code
    from cmtmae_scale.engine.summary import read_entries  # which imports torch

    (*_, last) = [entry for entry in read_entries(cached / "log.jsonl") if "cache/hit" in entry]
    show(
        f"{steps} steps without a teacher in memory: {last['cache/hit']:.0%} of the micro-batches "
        f"came from the cache; loss {last['loss/total']:.4g}"
    )
    return 0
