"""``cmtmae precompute``: build, verify, repair or price a teacher cache."""

import argparse
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from cmtmae_scale.commands.alone import run_alone
from cmtmae_scale.config.hints import key_hint
from cmtmae_scale.config.load import load_config
from cmtmae_scale.config.schema import Config
from cmtmae_scale.config.teachers import entry_errors, pick_teacher
from cmtmae_scale.errors import (
    AGAIN,
    EXIT_CONFIG,
    EXIT_DONE,
    EXIT_STOPPED,
    CacheError,
    ConfigError,
    remedy_for,
)
from cmtmae_scale.runtime.arguments import Parser, above_zero, at_least_one, share
from cmtmae_scale.runtime.launch import World, find_world
from cmtmae_scale.runtime.log import progress_bar, set_up_logging
from dataloading.errors import DataError

if TYPE_CHECKING:
    from cmtmae_scale.cache.build import Builder
    from cmtmae_scale.cache.format import Manifest

logger = logging.getLogger(__name__)

PLAN_OPTIONS = ("gpus", "images_s", "gpu_hour", "tb_month")
POLL_S = 0.2
PATIENCE_S = 3600.0
"""Seconds without progress of a run after which its sidecar ends."""
AHEAD = 16
"""Shards that a sidecar computes ahead of its run by default."""


def precompute_teacher(arguments: Sequence[str] | None = None) -> int:
    """Build, verify, repair or price a cache, as one of any number of processes.

    Returns:
        Exit code: 0 done; 75 interrupted, or a store that is full, over quota or fails: run the
        same command again; 78 settings that cannot work, or a cache that does not verify.
    """

    def compute() -> int:
        world = find_world()
        set_up_logging(world.rank, world.world_size)
        options = parse_precompute_options(arguments)
        if options.verify is None and not options.plan:
            options.shard = find_share(options.shard)
        with interrupt_at_sigterm():
            if options.follow is not None:
                return follow_run(options, world)
            config = load_config(options.config, options.overrides)
            config = pick_teacher(config, options.teacher)
            with entry_errors(options.teacher or ""):
                if config.cache.dir is None:
                    raise ConfigError("cache.dir is not set; name the folder of the cache")
                return run_options(config, options, world)

    try:
        return run_alone(compute)
    except KeyboardInterrupt:
        logger.error("interrupted; the same command continues the work")
        return EXIT_STOPPED


def parse_precompute_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse ``--config FILE [--verify [SHARE] | --repair | --plan]`` or ``--follow RUN_DIR``."""
    parser = Parser(
        description="Compute a teacher's attention and features once.",
        allow_abbrev=False,
        hint=key_hint,
    )
    parser.add_argument("--config", help="recipe of the runs that will read the cache")
    parser.add_argument(
        "--teacher", metavar="NAME", help="the teacher, for a recipe with several teachers"
    )
    parser.add_argument(
        "--shard",
        type=parse_share,
        metavar="i/n",
        help="compute every n-th shard, i from 0; default: a SLURM array's share, else all",
    )
    parser.add_argument(
        "--rows-per-shard",
        type=at_least_one,
        metavar="N",
        help="views in one file; default: those of a cache that was begun, else 1024 (some 200 "
        "MB), doubled until there are at most 10,000 files, while a file has at most 1 GiB",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--verify",
        type=parse_fraction,
        nargs="?",
        const=0.01,
        metavar="SHARE",
        help="verify every checksum, and compute a random share (0.01) of the rows again",
    )
    what.add_argument("--repair", action="store_true", help="build damaged and missing shards")
    what.add_argument(
        "--follow",
        type=Path,
        metavar="RUN_DIR",
        help="sidecar: compute the rows that a run with teacher.mode=sidecar needs next; without "
        "--config its own recipe is read",
    )
    what.add_argument("--plan", action="store_true", help="print what a cache costs and saves")
    parser.add_argument(
        "--ahead",
        type=at_least_one,
        metavar="SHARDS",
        help=f"with --follow: shards to be ahead of the run; {AHEAD}",
    )
    pricing = parser.add_argument_group("with --plan")
    pricing.add_argument(
        "--gpus",
        type=at_least_one,
        metavar="N",
        help="GPUs that build and train; default: the number of processes",
    )
    pricing.add_argument(
        "--images-s",
        type=above_zero,
        metavar="RATE",
        help="images per second that one GPU trains on without its teacher (cmtmae benchmark train "
        "with teacher.mode=cached, or a log); default: modelled from the teacher's rate",
    )
    pricing.add_argument("--gpu-hour", type=above_zero, metavar="PRICE", help="price of a GPU-hour")
    pricing.add_argument(
        "--tb-month", type=above_zero, metavar="PRICE", help="price of 10^12 bytes for a month"
    )
    # The deepspeed launcher adds it; ranks are read from the environment.
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the recipe")
    options = parser.parse_intermixed_args(arguments)
    if options.config is None and options.follow is None:
        parser.error("--config FILE is missing")
    for name in PLAN_OPTIONS:
        if getattr(options, name) is not None and not options.plan:
            parser.error(f"--{name.replace('_', '-')} needs --plan")
    if options.ahead is not None and options.follow is None:
        parser.error("--ahead needs --follow")
    if options.shard is not None and (options.verify is not None or options.plan):
        parser.error("--shard does not apply to --verify and --plan, which cover the whole cache")
    if (options.gpu_hour is None) != (options.tb_month is None):
        parser.error("--gpu-hour and --tb-month go together")
    return options


def parse_share(text: str) -> tuple[int, int]:
    """Parse ``i/n``."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None or not int(found[1]) < int(found[2]):
        raise argparse.ArgumentTypeError(f"{text}: expected i/n with 0 <= i < n, such as 0/8")
    return int(found[1]), int(found[2])


def parse_fraction(text: str) -> float:
    """Parse the share of ``--verify``; an override behind the option is parsed as its share."""
    if "=" in text:
        raise argparse.ArgumentTypeError(f"{text} is not a share; give --verify after the settings")
    return share(text)


def find_share(
    given: tuple[int, int] | None, environment: Mapping[str, str] = os.environ
) -> tuple[int, int]:
    """Return number and count of this job: those of ``--shard``, else of a SLURM array, else 0, 1.

    Raises:
        ConfigError: if the array has gaps, which would leave shards without a task, or its
            variables are incomplete.
    """
    if given is not None or "SLURM_ARRAY_TASK_ID" not in environment:
        return given or (0, 1)
    names = [f"SLURM_ARRAY_TASK_{name}" for name in ("ID", "MIN", "MAX", "COUNT")]
    try:
        task, first, last, count = (int(environment[name]) for name in names)
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"SLURM array: {', '.join(names)} are not all numbers ({error}); export them all as "
            "SLURM sets them, or give the share with --shard i/count"
        ) from error
    if last - first + 1 != count:
        raise ConfigError(
            f"SLURM array: {count} tasks with numbers from {first} to {last} would leave shards "
            f"without a task; use an array without gaps, such as --array=0-{count - 1}, or give "
            f"each task its share with --shard i/{count}"
        )
    return task - first, count


@contextmanager
def interrupt_at_sigterm() -> Iterator[None]:
    """Raise ``KeyboardInterrupt`` also at SIGTERM."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run_options(config: Config, options: argparse.Namespace, world: World) -> int:
    """Build, verify, repair or price the cache of a config; return the exit code."""
    # Imported here so that --help and config errors do not import torch.
    from cmtmae_scale.cache.build import make_builder, stripe_of
    from cmtmae_scale.cache.format import shard_path
    from cmtmae_scale.cache.verify import damaged_shards
    from cmtmae_scale.runtime.collectives import pick_device

    folder = Path(str(config.cache.dir))
    index_folder = Path(config.data.index) if config.data.index else folder / "index"
    if options.plan:
        if world.rank == 0:
            print_cost_plan(config, options, world, index_folder)
        return EXIT_DONE
    builder = make_builder(config, index_folder, pick_device(world))
    try:
        if options.verify is not None:
            return verify_cache(builder, folder, options.verify)
        manifest = builder.begin_cache(folder, config.cache.codec, options.rows_per_shard)
        first, step = stripe_of(options.shard, world)
        shards = range(first, manifest.num_shards, step)
        if options.repair:
            with progress_bar("reading", len(shards), "shards") as report_shards:
                for shard, reason in damaged_shards(folder, manifest, shards, report_shards):
                    logger.warning("shard %d: %s; it is built again", shard, reason)
                    delete_shard(shard_path(folder, manifest, shard))
        build_assigned(builder, folder, manifest, shards)
    finally:
        builder.close()
    return EXIT_DONE


def delete_shard(path: Path) -> None:
    """Delete a damaged shard.

    Raises:
        CacheError: if the store refuses.
    """
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise CacheError(
            f"{path}: cannot be deleted ({error.strerror}); "
            f"{remedy_for(error, f'delete it yourself, and {AGAIN}')}"
        ) from error


def build_assigned(builder: "Builder", folder: Path, manifest: "Manifest", shards: range) -> None:
    """Build the missing shards of this process, and log the missing shards of the cache.

    Drafts that killed processes left behind are deleted first.
    """
    from cmtmae_scale.cache.build import build_shards
    from cmtmae_scale.cache.format import delete_abandoned_drafts, missing_shards

    delete_abandoned_drafts(folder)
    missing = set(missing_shards(folder, manifest))
    own = [shard for shard in shards if shard in missing]
    rows = sum(len(manifest.shard_rows(shard)) for shard in own)
    size = f"{manifest.num_rows} rows, {manifest.num_rows * manifest.row_bytes() / 1e9:.2f} GB"
    count = f"{manifest.num_shards} shards; this process has {len(shards)}, {len(own)} to compute"
    logger.info("%s: %s in %s", folder, size, count)
    with progress_bar("computing", rows, "rows") as report_rows:
        build_shards(builder, folder, manifest, own, report_rows)
    left = missing_shards(folder, manifest)
    if left:
        logger.info("%d of %d shards are still missing", len(left), manifest.num_shards)
    else:
        logger.info("%s is complete; check it with --verify", folder)


def verify_cache(builder: "Builder", folder: Path, fraction: float) -> int:
    """Verify a cache and print the verdict; return the exit code."""
    from cmtmae_scale.cache.verify import compare_rows, damaged_shards

    manifest = builder.join_cache(folder, builder.config.cache.codec)
    shards = range(manifest.num_shards)
    with progress_bar("reading", manifest.num_shards, "shards") as report_shards:
        damaged = dict(damaged_shards(folder, manifest, shards, report_shards))
    for shard, reason in damaged.items():
        sys.stdout.write(f"shard {shard}: {reason}\n")
    intact = [shard for shard in shards if shard not in damaged]
    found = compare_rows(builder, folder, manifest, intact, fraction)
    sys.stdout.write(f"{found}\n")
    if damaged:
        counts = f"{len(damaged)} of {manifest.num_shards} shards"
        sys.stdout.write(f"{counts} are damaged or missing; --repair builds them again\n")
    good = not damaged and found.good
    sys.stdout.write(f"verdict: {'good' if good else 'not good'}\n")
    return EXIT_DONE if good else EXIT_CONFIG


def print_cost_plan(
    config: Config, options: argparse.Namespace, world: World, index_folder: Path
) -> None:
    """Print the costs and savings of caches."""
    from cmtmae_scale.cache.build import open_or_build_index
    from cmtmae_scale.runtime.collectives import pick_device
    from cmtmae_scale.tools.cache_plan import Prices, cost_plan

    index = None
    try:
        index = open_or_build_index(config, index_folder)
    except DataError as error:
        if config.data.expected_images is None:
            raise
        logger.warning("%s; planning with data.expected_images", error)
    prices = Prices(options.gpu_hour, options.tb_month) if options.gpu_hour else None
    gpus = options.gpus or world.world_size
    text = cost_plan(config, index, pick_device(world), gpus, options.images_s, prices)
    sys.stdout.write(text + "\n")


def follow_run(options: argparse.Namespace, world: World) -> int:
    """Compute the rows that a run needs next until it is complete; return the exit code."""
    run_dir: Path = options.follow
    recipe = Path(options.config or run_dir / "config.yaml")
    if not await_file(recipe, "the run has not started"):
        return EXIT_STOPPED
    config = load_config(recipe, [*options.overrides, f"run.output_dir={run_dir}"])
    config = pick_teacher(config, options.teacher)
    with entry_errors(options.teacher or ""):
        return follow_teacher(config, options, world)


def follow_teacher(config: Config, options: argparse.Namespace, world: World) -> int:
    """Compute the rows that a run needs next of its only teacher; return the exit code."""
    run_dir: Path = options.follow
    if config.teacher.mode != "sidecar":
        raise ConfigError(
            f"{run_dir}: the run has teacher.mode={config.teacher.mode}; --follow needs "
            "teacher.mode=sidecar"
        )
    index_folder = Path(config.data.index) if config.data.index else run_dir / "index"
    if not await_file(index_folder / "index.json", "the run has not indexed its images"):
        return EXIT_STOPPED
    from cmtmae_scale.cache.build import stripe_of
    from cmtmae_scale.cache.sidecar import run_sidecar
    from cmtmae_scale.runtime.collectives import pick_device

    sizes = options.ahead or AHEAD, options.rows_per_shard, PATIENCE_S
    stripe = stripe_of(options.shard, world)
    complete = run_sidecar(config, run_dir, index_folder, stripe, pick_device(world), *sizes)
    return EXIT_DONE if complete else EXIT_STOPPED


def await_file(path: Path, reason: str) -> bool:
    """Wait for a file that a run writes; return whether it appeared."""
    began = time.monotonic()
    if not os.path.exists(path):
        logger.info("waiting for %s: %s", path, reason)
    while not os.path.exists(path):  # also false while the store fails
        if time.monotonic() - began > PATIENCE_S:
            logger.error("%s did not appear within %.0f s: %s", path, PATIENCE_S, reason)
            return False
        time.sleep(POLL_S)
    return True
