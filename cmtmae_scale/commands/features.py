"""``cmtmae features``: features of a folder of images, as a file."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from cmtmae_scale.commands.alone import run_alone
from cmtmae_scale.errors import EXIT_DONE, EXIT_STOPPED
from cmtmae_scale.runtime.arguments import Parser, at_least_one
from cmtmae_scale.runtime.log import escape_controls, set_up_logging

logger = logging.getLogger(__name__)


def write_features(arguments: Sequence[str] | None = None) -> int:
    """Write features and print a summary; returns the exit code."""
    options = parse_options(arguments)
    set_up_logging(0, 1)
    try:
        return run_alone(lambda: compute_features(options))
    except KeyboardInterrupt:
        logger.warning("stopped; nothing was written, and the same command may be repeated")
        return EXIT_STOPPED


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; a usage error exits with 78."""
    parser = Parser(
        description="Write the features of all images of a folder or of tars.",
        epilog="arrays: patches and cls [n, D] float32, names, ids, labels, classes, excluded; "
        "see docs/python_api.md",
        allow_abbrev=False,
    )
    place = "a run, a checkpoint, or an export of cmtmae export timm or encoder"
    parser.add_argument("--checkpoint", type=Path, required=True, help=place)
    parser.add_argument("--images", required=True, help="folder or tars, as data.path")
    output = "FILE.npz, or a new folder of .npy files, which numpy.load can map"
    parser.add_argument("--output", type=Path, required=True, help=output)
    default = "weights of a run; default: momentum where the run has it, else student"
    parser.add_argument("--weights", choices=("student", "momentum"), help=default)
    parser.add_argument("--arch", help="timm's name, for a .safetensors file without config.json")
    parser.add_argument("--batch", type=at_least_one, default=64, help="images per forward; 64")
    parser.add_argument("--threads", type=at_least_one, default=4, help="reader threads; 4")
    return parser.parse_args(arguments)


def compute_features(options: argparse.Namespace) -> int:
    """Compute and write the features; returns the exit code."""
    from cmtmae_scale.api.encoders import open_encoder
    from cmtmae_scale.api.features import refuse_output, save_features
    from dataloading.index import build_index

    refuse_output(options.output)
    encoder, config = open_encoder(options.checkpoint, options.weights, options.arch)
    images = build_index(options.images, exif_orientation=config.data.exif_orientation)
    features = save_features(
        options.output, encoder, images, batch_size=options.batch, threads=options.threads
    )
    kinds = "patches" if features.cls is None else "patches and cls"
    text = (
        f"{options.output}: {len(features.ids)} images x {features.patches.shape[1]} ({kinds}), "
        f"{len(features.excluded)} images excluded"
    )
    sys.stdout.write(escape_controls(text) + "\n")
    return EXIT_DONE
