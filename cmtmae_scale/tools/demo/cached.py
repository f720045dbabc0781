"""The demo's second act: the teacher computed once, verified, and a run that reads it."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

STEPS = 20
ROWS_A_PART = 64


def train_from_cache(
    recipe: str, overrides: Sequence[str], run_dir: Path, steps: int, tell: Callable[[str], None]
) -> int:
    """Build a cache of one view an image, verify it, and train a few steps from it.

    Args:
        recipe: the demo's.
        overrides: as its run had them.
        run_dir: the demo's run; cache and run are made beside it.
        steps: of that run.
        tell: says something to the person at the terminal.

    Returns:
        0, or the exit code of the command that failed.
    """
    cached = run_dir.with_name(f"{run_dir.name}-cached")
    if (cached / "cache").is_dir():
        shutil.rmtree(cached)
    steps = min(steps, STEPS)
    own = [
        *overrides,
        "views.views_per_image=1",
        f"cache.dir={cached / 'cache'}",
        f"run.output_dir={cached}",
    ]
    build = ["launchers/precompute_teacher.py", "--config", recipe]
    build += ["--rows-a-part", str(ROWS_A_PART)]
    reading = ["teacher.mode=cached", "cache.on_miss=stop", f"train.steps={steps}", "log.every=1"]
    reading += ["log.images_every=null"]  # nobody is there to say where the teacher looks
    tell("the same with the teacher computed once: build a cache, verify it, train from it ...")
    for command in (
        [*build, *own],
        [*build, "--verify", "0.05", *own],
        ["launchers/pretrain.py", "--config", recipe, *own, *reading],
    ):
        code = subprocess.run([sys.executable, *command], stdin=subprocess.DEVNULL).returncode
        if code:
            tell(f"{' '.join(command)}: ended with exit code {code}")
            return code
    last = json.loads((cached / "log.jsonl").read_text().splitlines()[-1])
    tell(
        f"{steps} steps without a teacher in memory: {last['cache/hit']:.0%} of the micro-batches "
        f"came from the cache; loss {last['loss/total']:.4g}"
    )
    return 0
