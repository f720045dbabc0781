"""``cmtmae check-data PATH [--pack OUT]``: decode, report and pack a data set."""

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from cmtmae_scale.commands.alone import run_alone
from cmtmae_scale.config.schema import Data, Views
from cmtmae_scale.errors import EXIT_CONFIG, EXIT_DONE, EXIT_STOPPED, remedy_for
from cmtmae_scale.runtime.arguments import Parser, at_least_one, seed_number, share
from cmtmae_scale.runtime.log import escape_controls, progress_bar, set_up_logging
from cmtmae_scale.runtime.storage import write_atomic
from dataloading.errors import DataError

if TYPE_CHECKING:
    from dataloading.check import Fault
    from dataloading.data_set import Listing
    from dataloading.index import Index
    from dataloading.values import Survey

logger = logging.getLogger(__name__)

SOURCES = ("auto", "folder", "webdataset", "parquet")

_EXITS = """exit code: 0 usable; 78 unusable: too many bad images, damaged files, or no image;
75 stopped by Ctrl-C or a full store, the same command restarts and a pack resumes"""


def check_data(arguments: Sequence[str] | None = None) -> int:
    """Decode a data set and report whether it is usable; returns the exit code."""
    options = parse_options(arguments)
    set_up_logging(0, 1)
    try:
        return run_alone(lambda: check_images(options))
    except KeyboardInterrupt:
        logger.warning("stopped; no partial file is used, and the same command may be repeated")
        return EXIT_STOPPED


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; a usage error exits with 78."""
    parser = Parser(
        description="Decode every image of a data set, report faults, and pack it.",
        epilog=_EXITS,
        allow_abbrev=False,
    )
    parser.add_argument("path", nargs="+", help="as data.path: images, tars or Parquet files")
    parser.add_argument("--source", choices=SOURCES, default="auto", help="layout of the data")
    parser.add_argument(
        "--max-pixels", type=at_least_one, default=Data.max_pixels, help="as data.max_pixels"
    )
    bad_help = "fraction of bad images above which the exit code is 78"
    parser.add_argument(
        "--max-bad-fraction", type=share, default=Data.max_bad_fraction, help=bad_help
    )
    parser.add_argument(
        "--exif-orientation",
        action=argparse.BooleanOptionalAction,
        default=Data.exif_orientation,
        help="as data.exif_orientation",
    )
    cores = len(os.sched_getaffinity(0))
    threads_help = "reader and decoder threads; one per core"
    parser.add_argument("--threads", type=at_least_one, default=cores, help=threads_help)
    parser.add_argument(
        "--sheet", type=image_path, metavar="FILE", help="random views in a grid, .jpg or .png"
    )
    parser.add_argument("--report", type=Path, metavar="FILE", help="also write it as JSON")
    parser.add_argument(
        "--index", type=Path, metavar="FOLDER", help="keep the index there, for data.index"
    )
    parser.add_argument(
        "--write-index",
        type=Path,
        nargs="?",
        const=True,
        metavar="FOLDER",
        help="publish the index of usable tars (of --pack: of the packed ones) beside them, or "
        "write it into a folder to be copied there: runs then read no headers",
    )
    parser.add_argument(
        "--pack", type=Path, metavar="OUT", help="then write shuffled tars into this folder"
    )
    parser.add_argument(
        "--shard-mb", type=at_least_one, default=1000, help="approximate size of a packed tar; 1000"
    )
    parser.add_argument(
        "--seed", type=seed_number, default=0, help="seed of the packed order and the views"
    )
    options = parser.parse_args(arguments)
    if len(options.path) > 1:
        parser.error(
            f"{len(options.path)} paths ({options.path[0]} ...), expected one; put a pattern in "
            "quotes: 'train-*.tar'"
        )
    options.path = options.path[0]
    return options


def check_images(options: argparse.Namespace) -> int:
    """Index, draw, decode, report and pack; returns the exit code.

    Raises:
        DataError: no usable image, or a file that cannot be read or written.
    """
    from dataloading.data_set import Request, list_data, warn_of_many_files
    from dataloading.index import build_listed
    from dataloading.kept_index import build_kept, require_publishable
    from dataloading.sheet import draw_sheet
    from dataloading.stores import as_root

    root = as_root(options.path)
    request = Request(root, options.source, options.max_pixels, options.exif_orientation)
    listing = list_data(request)
    if options.pack is None:
        warn_of_many_files(listing)
        if options.write_index is not None:
            require_publishable(listing, options.write_index is not True)
    if options.index is None:
        index = build_listed(listing)
    else:
        index = build_kept(listing, options.index)
        logger.info("%s: the index is kept there; data.index=%s", options.index, options.index)
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
        logger.info("%s: views as sampled with run.seed=%d", options.sheet, options.seed)
    if options.pack is None:
        usable = report_data(index, *decode_all(index, options.threads), options)
        if usable:
            publish(listing, index, options)
        return EXIT_DONE if usable else EXIT_CONFIG
    return pack_images(index, options)


def publish(listing: "Listing", index: "Index", options: argparse.Namespace) -> None:
    """Write the index beside its tars, if requested.

    Raises:
        DataError: if it cannot be written.
    """
    from dataloading.kept_index import write_index
    from dataloading.passed_over import format_count

    if options.write_index is not None:
        folder = None if options.write_index is True else options.write_index
        images = format_count(len(index), "image")
        logger.info("%s: the index of %s", write_index(listing, index, folder), images)


def decode_all(index: "Index", threads: int) -> "tuple[list[Fault], Survey]":
    """Return the images that cannot be decoded, and remarks on the others; shows progress."""
    from dataloading.check import check_samples

    with progress_bar("decoding", len(index), "images") as progress:
        return check_samples(index, threads, progress)


def report_data(
    index: "Index",
    undecodable: "Sequence[Fault]",
    survey: "Survey | None",
    options: argparse.Namespace,
) -> bool:
    """Print and write the report; returns whether the data set is usable.

    Raises:
        DataError: if the report cannot be written.
    """
    from cmtmae_scale.tools.data_report import render_data_report, summarise_data

    found = summarise_data(index, undecodable, options.max_bad_fraction, survey)
    sys.stdout.write(escape_controls(render_data_report(found)) + "\n")
    sys.stdout.flush()
    if options.report is not None:
        try:
            options.report.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(options.report, json.dumps(found.to_dict(), indent=1) + "\n")
        except OSError as error:
            raise DataError(
                f"{options.report}: cannot be written ({error.strerror}); "
                f"{remedy_for(error, 'name another file')}"
            ) from error
    return found.is_usable


def pack_images(index: "Index", options: argparse.Namespace) -> int:
    """Report, and pack the decodable images; returns the exit code."""
    from dataloading.data_set import Request, list_data
    from dataloading.mixing import class_mixing
    from dataloading.pack import Pack
    from dataloading.passed_over import format_count

    job = Pack(index, options.pack, seed=options.seed, shard_bytes=options.shard_mb * 1_000_000)
    with ExitStack() as stack:
        stack.enter_context(job.locked())
        record = job.load_record()
        if record is None:
            undecodable, survey = decode_all(index, options.threads)
        else:
            undecodable, survey = record.excluded, None
            logger.info("%s: all images were decoded before; the pack resumes", options.pack)
        if not report_data(index, undecodable, survey, options):
            return EXIT_CONFIG
        record = record or job.create_record(undecodable)
        count = len(index) - len(undecodable)
        progress = stack.enter_context(progress_bar("packing", count, "images"))
        job.write(
            record, threads=options.threads, max_pixels=options.max_pixels, report_done=progress
        )
    settings = options.max_pixels, options.exif_orientation
    packed = job.verify_index(record, *settings)
    publish(list_data(Request(options.pack, "webdataset", *settings)), packed, options)
    mixing = class_mixing(packed.entries["label"])
    sys.stdout.write(
        f"\npacked and read back: {format_count(len(packed), 'image')} in "
        f"{format_count(len(packed.shards), 'tar')}, "
        f"{len(undecodable)} excluded; {mixing or 'no labels'}\n"
        f"data.path={options.pack} data.shuffle=window data.expected_images={len(packed)}\n"
    )
    return EXIT_DONE


def image_path(text: str) -> Path:
    """Parse the path of a .jpg or .png file."""
    path = Path(text)
    if path.suffix.lower() not in (".jpg", ".jpeg", ".png"):
        raise argparse.ArgumentTypeError(f"{text} must end in .jpg or .png")
    return path
