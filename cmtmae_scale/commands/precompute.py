"""``launchers/precompute_teacher.py``: its arguments, and what each form of it does."""

import argparse
import logging
import os
import re
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from cmtmae_scale.cache.beside import run_beside
from cmtmae_scale.cache.build import Builder, build_parts, missing_parts
from cmtmae_scale.cache.builder import find_index, make_builder, my_parts
from cmtmae_scale.cache.codecs import Codec
from cmtmae_scale.cache.format import Manifest, seal_path
from cmtmae_scale.cache.verify import compare, damaged_parts
from cmtmae_scale.commands.cache_plan import add_arguments, check_arguments, plan_text
from cmtmae_scale.config.load import load_config
from cmtmae_scale.config.schema import Config
from cmtmae_scale.errors import (
    EXIT_CONFIG,
    EXIT_DONE,
    EXIT_STOPPED,
    CmtMaeError,
    ConfigError,
)
from cmtmae_scale.runtime.arguments import Parser, at_least_one, share
from cmtmae_scale.runtime.launch import World, find_world
from cmtmae_scale.runtime.collectives import pick_device
from cmtmae_scale.runtime.log import set_up_logging
from cmtmae_scale.runtime.progress_bar import Progress
from dataloading.errors import DataError

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Build, verify or repair a cache, as one of any number of processes.

    Returns:
        Exit code: 0 done; 75 interrupted, run it again; 78 what cannot work as configured, a full
        disk, or a cache that does not verify.
    """
    try:
        world = find_world()
        set_up_logging(world.rank, world.world_size)
        options = parse(arguments)
        with stoppable():
            if options.follow is not None:
                return run_beside(options.follow, options, world)
            config = load_config(options.config, options.overrides)
            return run(config, options, world)
    except (CmtMaeError, DataError) as error:
        logger.error("%s", error)
        return error.exit_code
    except KeyboardInterrupt:
        logger.error("interrupted; the same command goes on")
        return EXIT_STOPPED


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse ``--config FILE [--verify [SHARE] | --repair] ...`` or ``--follow RUN_DIR ...``."""
    parser = Parser(description="Precompute the teacher.", allow_abbrev=False)
    parser.add_argument("--config", help="the recipe of the runs that will read it")
    parser.add_argument(
        "--shard",
        type=shard,
        default=array_share(),
        metavar="i/n",
        help="this job's share of the parts, i from 0; a SLURM array has its own, else all",
    )
    parser.add_argument(
        "--rows-a-part",
        type=at_least_one,
        default=1024,
        help="views in one file; 1024 (some 200 MB)",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--verify",
        type=share,
        nargs="?",
        const=0.01,
        metavar="SHARE",
        help="read everything, and compute a random share (0.01) again",
    )
    what.add_argument("--repair", action="store_true", help="build damaged and missing parts again")
    what.add_argument(
        "--follow",
        type=Path,
        metavar="RUN_DIR",
        help="stay ahead of a run with teacher.mode=sidecar; without --config its recipe is read",
    )
    what.add_argument("--plan", action="store_true", help="say what it costs and whether it pays")
    add_arguments(parser)
    parser.add_argument(
        "--ahead",
        type=at_least_one,
        default=16,
        metavar="PARTS",
        help="with --follow: parts to be ahead of the run; 16",
    )
    # DeepSpeed's launcher adds it; ranks come from the environment.
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the recipe")
    options = parser.parse_intermixed_args(arguments)
    if options.config is None and options.follow is None:
        parser.error("--config FILE is missing")
    check_arguments(parser, options)
    return options


@contextmanager
def stoppable() -> Iterator[None]:
    """Let SIGTERM end the work like an interrupt from the keyboard."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def shard(text: str) -> tuple[int, int]:
    """Read ``i/n``."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None or not int(found[1]) < int(found[2]):
        raise argparse.ArgumentTypeError(f"{text}: expected i/n with 0 <= i < n, such as 0/8")
    return int(found[1]), int(found[2])


def run(config: Config, options: argparse.Namespace, world: World) -> int:
    """Do what the options say; returns the exit code."""
    if config.cache.dir is None:
        raise ConfigError("cache.dir is not set; name the folder of the cache")
    folder = Path(config.cache.dir)
    place = Path(config.data.index) if config.data.index else folder / "index"
    if options.plan:
        return plan(config, options, world, place)
    builder = make_builder(config, place, pick_device(world))
    try:
        if options.verify is not None:
            return report(builder, folder, config.cache.codec, options)
        manifest = builder.begin(folder, config.cache.codec, options.rows_a_part)
        if options.repair:
            unseal_damaged(folder, manifest, my_parts(manifest, options.shard, world))
        build(builder, folder, manifest, my_parts(manifest, options.shard, world))
    finally:
        builder.close()
    return EXIT_DONE


def plan(config: Config, options: argparse.Namespace, world: World, place: Path) -> int:
    """Print a plan from one process; returns the exit code."""
    if world.rank:
        return EXIT_DONE
    index = None
    try:
        index = find_index(config, place)
    except DataError as error:
        if config.data.expected_images is None:
            raise
        logger.warning("%s; planning with data.expected_images", error)
    sys.stdout.write(plan_text(config, options, world, index) + "\n")
    return EXIT_DONE


def build(builder: Builder, folder: Path, manifest: Manifest, parts: range) -> None:
    """Build what is missing of some parts, and say how the whole stands."""
    rows = sum(len(manifest.rows_of(part)) for part in parts)
    logger.info(
        "%s: %d rows of %d bytes, %.2f GB in %d parts; this process has %d of them",
        folder,
        manifest.num_rows,
        manifest.row_bytes(),
        manifest.num_rows * manifest.row_bytes() / 1e9,
        manifest.num_parts,
        len(parts),
    )
    with Progress("computing", max(rows, 1)) as progress:
        build_parts(builder, folder, manifest, parts, progress)
    missing = missing_parts(folder, manifest)
    if missing:
        logger.info("%d of %d parts are still missing", len(missing), manifest.num_parts)
    else:
        logger.info("%s is complete; check it with --verify", folder)


def unseal_damaged(folder: Path, manifest: Manifest, parts: range) -> None:
    """Take the seals of damaged parts away, so that they are built again."""
    for part, reason in damaged_parts(folder, manifest, parts):
        logger.warning("part %d: %s; it is built again", part, reason)
        seal_path(folder, part).unlink(missing_ok=True)


def report(builder: Builder, folder: Path, codec: Codec, options: argparse.Namespace) -> int:
    """Verify a cache and print what was found; returns the exit code."""
    manifest = builder.join(folder, codec)
    parts = range(manifest.num_parts)
    with Progress("reading", manifest.num_parts) as progress:
        damaged = list(damaged_parts(folder, manifest, parts, progress))
    for part, reason in damaged:
        sys.stdout.write(f"part {part}: {reason}\n")
    bad = {part for part, _ in damaged}
    found = compare(builder, folder, manifest, [p for p in parts if p not in bad], options.verify)
    sys.stdout.write(f"{found}\n")
    if damaged:
        sys.stdout.write(
            f"{len(damaged)} of {manifest.num_parts} parts are damaged or missing; --repair builds "
            "them again\n"
        )
    good = not damaged and found.good
    sys.stdout.write(f"verdict: {'good' if good else 'not good'}\n")
    return EXIT_DONE if good else EXIT_CONFIG


def array_share(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """A SLURM array task's share of the parts; all of them elsewhere."""
    if "SLURM_ARRAY_TASK_ID" not in environment:
        return 0, 1
    first = int(environment.get("SLURM_ARRAY_TASK_MIN", "0"))
    count = int(environment["SLURM_ARRAY_TASK_COUNT"])
    return int(environment["SLURM_ARRAY_TASK_ID"]) - first, count
