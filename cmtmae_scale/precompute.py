"""The command that builds, checks and mends a teacher's cache."""

import argparse
import logging
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from cmtmae_scale.cache.build import Builder, build_parts, missing_parts
from cmtmae_scale.cache.codecs import Codec
from cmtmae_scale.cache.format import Manifest, seal_path
from cmtmae_scale.cache.verify import compare, damaged_parts
from cmtmae_scale.config.derive import Needs, needs
from cmtmae_scale.config.load import load_config
from cmtmae_scale.config.schema import Config
from cmtmae_scale.errors import (
    EXIT_CONFIG,
    EXIT_DONE,
    EXIT_STOPPED,
    CacheError,
    CmtMaeError,
    ConfigError,
)
from cmtmae_scale.estimate import compute_dtype
from cmtmae_scale.runtime.arguments import Parser, at_least_one, share
from cmtmae_scale.runtime.claim import once
from cmtmae_scale.runtime.launch import World, find_world, pick_device
from cmtmae_scale.runtime.log import set_up_logging
from cmtmae_scale.runtime.progress import Progress
from cmtmae_scale.teachers.build import assemble
from dataloading.errors import DataError
from dataloading.index import Index, load_or_build

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
        config = load_config(options.config, options.overrides)
        return run(config, options, world)
    except (CmtMaeError, DataError) as error:
        logger.error("%s", error)
        return error.exit_code
    except KeyboardInterrupt:
        logger.error("interrupted; the same command goes on")
        return EXIT_STOPPED


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse ``--config FILE [--shard i/n] [--verify [SHARE] | --repair] [key=value ...]``."""
    parser = Parser(description="Precompute the teacher.", allow_abbrev=False)
    parser.add_argument("--config", required=True, help="the recipe of the runs that will read it")
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
    # DeepSpeed's launcher adds it; ranks come from the environment.
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the recipe")
    return parser.parse_intermixed_args(arguments)


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
    builder = make_builder(config, folder, pick_device(world))
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


def make_builder(config: Config, folder: Path, device: torch.device) -> Builder:
    """Index and teacher of a run; the index is built by one process, the others wait.

    Raises:
        CacheError: if nothing can be written where the index belongs.
    """
    teacher = assemble(config, stored_needs(config), load=True).to(device, compute_dtype(config))
    place = Path(config.data.index) if config.data.index else folder / "index"
    try:
        index = open_index(config, place)
    except OSError as error:
        raise CacheError(
            f"{place}: cannot be written ({error.strerror}); correct cache.dir or data.index"
        ) from error
    return Builder(config, index, teacher, device)


def stored_needs(config: Config) -> Needs:
    """What of the teacher a cache stores: maps alone where the codec says so."""
    found = needs(config)
    if config.cache.codec == "attention":
        return found._replace(teacher_features=False)
    return found


def open_index(config: Config, folder: Path) -> Index:
    """Build the index or read it."""
    folder.mkdir(mode=0o755, parents=True, exist_ok=True)

    def find() -> Index | None:
        return read() if (folder / "index.json").exists() else None

    def read() -> Index:
        return load_or_build(
            config.data.path,
            folder,
            source=config.data.source,
            max_pixels=config.data.max_pixels,
        )

    return once(folder / ".indexing", find, lambda live: read())


def my_parts(manifest: Manifest, share: tuple[int, int], world: World) -> range:
    """This process's parts: every n-th, without a word to the others."""
    number, of = share
    step = of * world.world_size
    return range(number * world.world_size + world.rank, manifest.num_parts, step)


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
