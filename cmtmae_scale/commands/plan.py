"""``cmtmae plan``: memory, time, cost and traffic of a run on N GPUs, before any is rented."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cmtmae_scale.commands.alone import run_alone
from cmtmae_scale.config.hints import key_hint
from cmtmae_scale.config.load import load_config
from cmtmae_scale.errors import EXIT_CONFIG, EXIT_DONE, ConfigError
from cmtmae_scale.runtime.arguments import (
    RECIPE_HELP,
    Parser,
    above_zero,
    at_least_one,
    not_negative,
)
from cmtmae_scale.tools.plan.devices import DEVICES, Device, find_device

if TYPE_CHECKING:
    from cmtmae_scale.config.schema import Config
    from cmtmae_scale.tools.plan.plan import Images

FRACTION = 0.5
"""Fraction of a data sheet's rates, assumed where nothing is measured."""
IMAGE_KB = 115.0
"""Mean of ImageNet-1K's training images, 147.9 GB as tar."""
SUITE = Path("runs/suite.json")


def plan_run(arguments: Sequence[str] | None = None) -> int:
    """Print the plan; returns the exit code: 78 for a run that cannot work."""
    options = parse_options(arguments)
    return run_alone(lambda: show_plan(options), show_error)


def show_error(text: str) -> None:
    """Write the line of an error."""
    sys.stderr.write(f"{text}\n")


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse ``--config RECIPE --gpus N [key=value ...]``; a usage error exits with 78."""
    parser = Parser(
        description="Plan a run: memory, time, cost and traffic, counted or modelled; no GPU.",
        allow_abbrev=False,
        hint=key_hint,
    )
    parser.add_argument("--config", required=True, help=RECIPE_HELP)
    parser.add_argument(
        "--gpus",
        required=True,
        type=at_least_one,
        metavar="N",
        help="number of GPUs, one rank each",
    )
    parser.add_argument(
        "--gpus-per-node",
        type=at_least_one,
        default=8,
        metavar="N",
        help="GPUs per node; default: 8",
    )
    parser.add_argument(
        "--device", default="h100", help=f"kind of GPU: {', '.join(DEVICES)}; default: h100"
    )
    parser.add_argument("--price", type=not_negative, help="price of a GPU-hour, in any currency")
    parser.add_argument(
        "--network-gbit",
        type=above_zero,
        default=400.0,
        help="network rate per GPU and direction, Gbit/s; default: 400",
    )
    parser.add_argument(
        "--fraction",
        type=fraction,
        help=f"fraction of the data sheet's rates that kernels reach; default: measured, else "
        f"{FRACTION:g}",
    )
    parser.add_argument(
        "--image-kb", type=above_zero, help=f"mean size of an image file, kB; default: {IMAGE_KB:g}"
    )
    parser.add_argument(
        "--suite", type=Path, help=f"results of cmtmae benchmark suite; default: {SUITE}"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the recipe")
    return parser.parse_intermixed_args(arguments)


def fraction(text: str) -> float:
    """Parse a number in (0, 1]."""
    number = above_zero(text)
    if number > 1:
        raise argparse.ArgumentTypeError(f"{text} must be at most 1")
    return number


def show_plan(options: argparse.Namespace) -> int:
    """Make and print the plan; returns the exit code."""
    config = load_config(options.config, options.overrides)
    device = find_device(options.device)
    # Imported here so that --help and errors of the recipe do not import torch.
    from cmtmae_scale.tools.plan.plan import Cluster, check_split, count_work, make_plan
    from cmtmae_scale.tools.plan.remedies import refuse_memory
    from cmtmae_scale.tools.plan.render import render_plan

    check_split(config, options.gpus, options.gpus_per_node)
    images = count_run_images(config, options.image_kb)
    reached, origin = choose_fraction(options, config, device)
    network_bytes_s = options.network_gbit * 1e9 / 8
    cluster = Cluster(
        options.gpus,
        options.gpus_per_node,
        device,
        reached,
        origin,
        FRACTION,
        network_bytes_s,
        options.price,
    )
    counted = count_work(config)
    plan = make_plan(config, counted, cluster, images)
    sys.stdout.write(render_plan(config, plan))
    refusal = refuse_memory(config, counted, cluster, plan.chosen)
    if refusal is None:
        return EXIT_DONE
    show_error(f"{options.config} cannot work: {refusal}")
    return EXIT_CONFIG


def choose_fraction(
    options: argparse.Namespace, config: "Config", device: Device
) -> tuple[float, str]:
    """Return the fraction of the device's rates that kernels reach, and its origin.

    Raises:
        ConfigError: if the results that ``--suite`` names cannot be read.
    """
    if options.fraction is not None:
        return options.fraction, "given by --fraction"
    file = options.suite or SUITE
    if options.suite is not None or file.exists():
        from cmtmae_scale.tools.plan.kernels import count_kernels
        from cmtmae_scale.tools.plan.measured import find_step, reached_fraction
        from dataloading.passed_over import format_count

        try:
            step, outdated = find_step(file, config, device)
        except ConfigError as error:
            if options.suite is not None:
                raise
            show_error(f"{error}; planning without it")
            step, outdated = None, []
        if outdated:
            count, names = format_count(len(outdated), "row"), ", ".join(outdated)
            show_error(f"{file}: skipped {count} with settings of another version: {names}")
        if step is not None:
            reached = reached_fraction(step, count_kernels(step.config), device)
            speed = f"{step.images_s:,.0f} images/s measured on {step.device}"
            return reached, f"row {step.row} of {file}, {speed}"
    return FRACTION, "assumed (--fraction); no measured row of this student and device"


def count_run_images(config: "Config", image_kb: float | None) -> "Images":
    """Return number and size of the images; an index is built only if the recipe has no number.

    Raises:
        ConfigError: if the number is unknown, and the length of the run depends on it.
    """
    from cmtmae_scale.tools.plan.plan import Images

    size, origin = 1e3 * (image_kb or IMAGE_KB), "given" if image_kb else "ImageNet-1K's"
    if config.data.expected_images is not None:
        return Images(
            config.data.expected_images, "data.expected_images; not counted", size, origin
        )
    from cmtmae_scale.commands.dry_run import count_images

    reasons: list[str] = []
    index, images, source = count_images(config, reasons)
    if images is None and config.train.steps is None:
        raise ConfigError(f"{reasons[-1]}; or give data.expected_images=N or train.steps=N")
    if index is not None and image_kb is None and len(index) > 0:
        size, origin = float(index.entries["size"].mean()), f"counted in {config.data.path}"
    return Images(images, source, size, origin)
