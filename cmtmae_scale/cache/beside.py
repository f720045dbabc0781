"""``launchers/precompute_teacher.py --follow RUN_DIR``: wait for a run, and stay ahead of it."""

import argparse
import logging
import time
from pathlib import Path

from cmtmae_scale.cache.builder import make_builder, my_stripe
from cmtmae_scale.cache.sidecar import PATIENCE_S, PAUSE_S, Follower, follow
from cmtmae_scale.config.derive import cache_folder
from cmtmae_scale.config.load import load_config
from cmtmae_scale.errors import EXIT_DONE, EXIT_STOPPED, ConfigError
from cmtmae_scale.runtime.launch import World
from cmtmae_scale.runtime.collectives import pick_device

logger = logging.getLogger(__name__)


def run_beside(run_dir: Path, options: argparse.Namespace, world: World) -> int:
    """Compute what a run needs next, until it is complete; returns the exit code."""
    recipe = options.config or run_dir / "config.yaml"
    if not await_file(Path(recipe), "the run has not started"):
        return EXIT_STOPPED
    config = load_config(recipe, [*options.overrides, f"run.output_dir={run_dir}"])
    if config.teacher.mode != "sidecar":
        raise ConfigError(
            f"{run_dir}: the run has teacher.mode={config.teacher.mode}; a sidecar needs follow"
        )
    place = Path(config.data.index) if config.data.index else run_dir / "index"
    if not await_file(place / "index.json", "the run has not indexed its images"):
        return EXIT_STOPPED
    folder = cache_folder(config)
    builder = make_builder(config, place, pick_device(world), "positions")
    try:
        manifest = builder.begin(folder, config.cache.codec, options.rows_a_part)
        views = config.checkpoint.every * config.train.global_batch_size
        between = -(-views // manifest.rows_a_part)
        stripe = my_stripe(options.shard, world)
        follower = Follower(folder, manifest, run_dir, stripe, options.ahead, between)
        logger.info(
            "following %s in %s: at most %d parts, %.2f GB",
            run_dir,
            folder,
            follower.most,
            follower.most * manifest.rows_a_part * manifest.row_bytes() / 1e9,
        )
        return EXIT_DONE if follow(builder, follower) else EXIT_STOPPED
    finally:
        builder.close()


def await_file(path: Path, lacking: str) -> bool:
    """Wait for a file that a run writes; whether it came."""
    began = time.monotonic()
    if not path.exists():
        logger.info("waiting for %s: %s", path, lacking)
    while not path.exists():
        if time.monotonic() - began > PATIENCE_S:
            logger.error("%s did not appear within %.0f s: %s", path, PATIENCE_S, lacking)
            return False
        time.sleep(PAUSE_S)
    return True
