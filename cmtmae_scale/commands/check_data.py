"""``launchers/check_data.py PATH [--pack OUT]``."""

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import get_args

from cmtmae_scale.config.schema import Data, Views
from cmtmae_scale.errors import EXIT_CONFIG, EXIT_DONE, EXIT_STOPPED
from cmtmae_scale.runtime.arguments import Parser, at_least_one, share
from cmtmae_scale.runtime.log import set_up_logging
from cmtmae_scale.runtime.progress_bar import Progress
from cmtmae_scale.tools.data_report import describe, survey
from dataloading.check import Fault, find_undecodable
from dataloading.errors import DataError
from dataloading.index import Index, SourceName, build_index
from dataloading.mixing import class_mixing
from dataloading.pack import Pack
from dataloading.sheet import draw_sheet

logger = logging.getLogger(__name__)

_EXITS = """exit code: 0 go on; 78 do not: too many bad images, a damaged tar, or nothing usable;
75 stopped by Ctrl-C, the same command starts again and a pack goes on"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Look through a data set and say whether to go on; returns the exit code."""
    options = parse(arguments)
    set_up_logging(0, 1)
    try:
        return check(options)
    except DataError as error:
        logger.error("%s", error)
        return error.exit_code
    except KeyboardInterrupt:
        logger.warning("stopped; nothing half-written counts, and the same command may be repeated")
        return EXIT_STOPPED


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; a usage error exits with 78."""
    parser = Parser(
        description="Decode every image of a data set, say what is wrong and where, and pack it.",
        epilog=_EXITS,
        allow_abbrev=False,
    )
    parser.add_argument("path", help="as data.path: folder of images, or tars")
    parser.add_argument("--source", choices=get_args(SourceName), default="auto", help="its layout")
    parser.add_argument(
        "--max-pixels", type=at_least_one, default=Data.max_pixels, help="as data.max_pixels"
    )
    parser.add_argument(
        "--max-bad-share",
        type=share,
        default=Data.max_bad_fraction,
        help="share of bad images above which the exit code is 78",
    )
    parser.add_argument(
        "--threads",
        type=at_least_one,
        default=len(os.sched_getaffinity(0)),
        help="reader and decoder threads; one for each core",
    )
    parser.add_argument(
        "--sheet", type=_picture, metavar="FILE", help="random views in a grid, .jpg or .png"
    )
    parser.add_argument("--report", type=Path, metavar="FILE", help="also write all as JSON")
    parser.add_argument(
        "--pack", type=Path, metavar="OUT", help="then write it as shuffled tars into this folder"
    )
    parser.add_argument(
        "--shard-mb", type=at_least_one, default=1000, help="size of a packed tar, about; 1000"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the packed order and the views")
    return parser.parse_args(arguments)


def check(options: argparse.Namespace) -> int:
    """Index, draw, decode, report, pack; returns the exit code.

    Raises:
        DataError: nothing usable, or something that cannot be read or written.
    """
    index = build_index(options.path, options.source, options.max_pixels)
    if options.sheet is not None:
        views = Views()
        draw_sheet(
            index,
            options.sheet,
            seed=options.seed,
            scale=views.crop_scale,
            ratio=views.aspect_ratio,
            flip=views.hflip,
            threads=options.threads,
        )
        logger.info("%s: views as a run with run.seed=%d cuts them", options.sheet, options.seed)
    if options.pack is None:
        go_on = report(index, decode_all(index, options.threads), options)
        return EXIT_DONE if go_on else EXIT_CONFIG
    return pack(index, options)


def decode_all(index: Index, threads: int) -> list[Fault]:
    """Decode everything, with progress."""
    with Progress("decoding", len(index)) as progress:
        return find_undecodable(index, threads, progress)


def report(index: Index, undecodable: Sequence[Fault], options: argparse.Namespace) -> bool:
    """Print and write the report; returns whether to go on.

    Raises:
        DataError: if the report cannot be written.
    """
    found = survey(index, undecodable, options.max_bad_fraction)
    sys.stdout.write(describe(found) + "\n")
    sys.stdout.flush()
    if options.report is not None:
        try:
            options.report.parent.mkdir(parents=True, exist_ok=True)
            options.report.write_text(json.dumps(found.to_dict(), indent=1) + "\n")
        except OSError as error:
            raise DataError(
                f"{options.report}: cannot be written ({error.strerror}); name another file"
            ) from error
    return found.go_on


def pack(index: Index, options: argparse.Namespace) -> int:
    """Report, and pack what can be decoded; returns the exit code."""
    job = Pack(index, options.pack, seed=options.seed, shard_bytes=options.shard_mb * 1_000_000)
    with ExitStack() as stack:
        stack.enter_context(job.locked())
        record = job.load_record()
        if record is None:
            undecodable = decode_all(index, options.threads)
        else:
            undecodable = record.excluded
            logger.info("%s: all was decoded before this pack began; it goes on", options.pack)
        if not report(index, undecodable, options):
            return EXIT_CONFIG
        record = record or job.create_record(undecodable)
        progress = stack.enter_context(Progress("packing", len(index) - len(undecodable)))
        job.write(
            record, threads=options.threads, max_pixels=options.max_pixels, report_done=progress
        )
    packed = job.verify_index(record, options.max_pixels)
    mixing = class_mixing(packed.entries["label"])
    sys.stdout.write(
        f"\npacked and read back: {len(packed)} images in {len(packed.shards)} tars, "
        f"{len(undecodable)} left out; {mixing or 'no labels'}\n"
        f"data.path={options.pack} data.shuffle=window data.expected_images={len(packed)}\n"
    )
    return EXIT_DONE


def _picture(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() not in (".jpg", ".jpeg", ".png"):
        raise argparse.ArgumentTypeError(f"{text} must end in .jpg or .png")
    return path
