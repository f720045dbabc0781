"""``cmtmae evaluate METHOD``: frozen features, or accuracy of fine-tuned weights."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cmtmae_scale.commands.rank import run_as_rank
from cmtmae_scale.errors import EXIT_DONE, ConfigError, StorageError
from cmtmae_scale.runtime.arguments import (
    Parser,
    add_launcher_options,
    at_least_one,
    not_negative,
    seed_number,
    without_local_rank,
)
from cmtmae_scale.runtime.launch import World, find_world
from cmtmae_scale.runtime.log import escape_controls, set_up_logging

if TYPE_CHECKING:
    import torch

WEIGHTS = ("student", "momentum", "teacher", "random")
DECODERS = ("auto", "dali", "torch")
DENSE = ("segmentation", "representation", "propagation")
"""Methods of ``evaluation/dense.py``."""


def evaluate(arguments: Sequence[str] | None = None) -> int:
    """Run one rank of an evaluation, or of ``finetune ...``; returns the exit code."""
    arguments = without_local_rank(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["finetune"]:
        from cmtmae_scale.commands.finetune import finetune

        return finetune(arguments[1:])
    return run_as_rank(lambda: launch(arguments))


def launch(arguments: Sequence[str]) -> int:
    """Parse the command line, evaluate and print the result; returns the exit code."""
    options = parse_options(arguments)
    world = find_world()
    set_up_logging(world.rank, world.world_size)
    check_weight_options(options)
    check_image_options(options)
    check_output(options)
    from cmtmae_scale.engine.agreement import REMEDY, code_facts, require_equal
    from cmtmae_scale.runtime.collectives import pick_device, process_group

    device = pick_device(world)
    with process_group(world, device):
        given = {f"option {name}": value for name, value in vars(options).items()}
        given.pop("option local_rank", None)  # set by the launcher, different on every rank
        require_equal(given | code_facts(device), REMEDY)
        text = run_method(options, world, device)
    if world.rank == 0:
        sys.stdout.write(escape_controls(text) + "\n")
    return EXIT_DONE


def run_method(options: argparse.Namespace, world: World, device: "torch.device") -> str:
    """Evaluate, and draw a figure beside the result file; returns the report as text."""
    if options.method not in DENSE:
        from cmtmae_scale.evaluation.frozen import evaluate_frozen

        return evaluate_frozen(options, world, device)
    from cmtmae_scale.evaluation.dense import evaluate_dense
    from cmtmae_scale.runtime.collectives import on_all_ranks
    from cmtmae_scale.tools.figures.dense import draw_panels

    text, panels, file = evaluate_dense(options, world, device)

    def draw() -> str:
        if world.rank != 0 or file is None or panels is None:
            return text
        try:
            return f"{text}\nfigure: {draw_panels(panels, file.with_suffix('.png'))}"
        except (OSError, StorageError) as error:  # the result file is whole without it
            return f"{text}\nno figure: {error}"

    return on_all_ranks(draw)


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; a usage error exits with code 78."""
    parser = Parser(description="Evaluate the weights of an encoder.", allow_abbrev=False)
    methods = parser.add_subparsers(dest="method", required=True)
    knn = methods.add_parser("knn", help="k nearest neighbours", allow_abbrev=False)
    linear = methods.add_parser("linear", help="linear classifiers", allow_abbrev=False)
    methods.add_parser("finetune", help="train all weights; see finetune --help")
    for method in (knn, linear):
        add_weight_options(method)
        add_image_options(method)
        add_run_options(method)
        add_decoder(method)
    add_dense_methods(methods)
    knn.add_argument("--k", type=at_least_one, nargs="+", default=[10, 20])
    knn.add_argument(
        "--temperature",
        type=not_negative,
        default=0.07,
        help="T of the votes' weights exp(cosine / T), 0.07; 0: equal votes",
    )
    linear.add_argument(
        "--epochs", type=at_least_one, default=100, help="epochs over the features; 100"
    )
    linear.add_argument(
        "--held-out",
        type=float,
        default=0.1,
        help="fraction of the training images on which the learning rate is chosen; 0.1",
    )
    return parser.parse_args(arguments)


def add_weight_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that name the evaluated weights."""
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--checkpoint",
        type=Path,
        help="a run, a checkpoint, or a .safetensors file or timm folder of cmtmae export",
    )
    which.add_argument("--timm", metavar="MODEL", help="a ViT of timm: MODEL.TAG, or with --file")
    parser.add_argument(
        "--weights",
        type=parse_weights,
        metavar=f"{{{','.join(WEIGHTS)}}}",
        help="weights of a checkpoint; default: momentum where the run has it, else student; "
        "random: the initial weights of a run that loaded none; of several teachers: teacher:NAME",
    )
    parser.add_argument("--arch", help="timm's name, for a .safetensors file without config.json")
    parser.add_argument("--file", help="weights for --timm")
    parser.add_argument("--size", type=at_least_one, help="side of the images for --timm, pixels")
    add_launcher_options(parser)


def parse_weights(text: str) -> str:
    """Parse one of ``WEIGHTS``, or ``teacher:NAME``."""
    if text not in WEIGHTS and not text.startswith("teacher:"):
        raise argparse.ArgumentTypeError(
            f"invalid choice: {text!r} (choose from {', '.join(WEIGHTS)}, teacher:NAME)"
        )
    return text


def add_image_options(
    parser: argparse.ArgumentParser,
    train: str = "labelled images, folder or tars; default: the run's eval.train_path",
    test: str = "labelled images; default: the run's eval.test_path",
    fraction: str = "of each class",
) -> None:
    """Add the options that name a training and a test set, or a single set that is split."""
    parser.add_argument("--train", help=train)
    parser.add_argument("--test", help=test)
    parser.add_argument(
        "--split",
        type=float,
        metavar="FRACTION",
        help=f"without --test: train on this fraction {fraction} of --train, test on the rest",
    )


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for baselines, batches and the result file."""
    parser.add_argument(
        "--no-baselines", action="store_true", help="skip raw pixels and random weights"
    )
    parser.add_argument(
        "--seed",
        type=seed_number,
        default=0,
        help="seed of splits, of the probe, of timm's baseline; 0",
    )
    parser.add_argument(
        "--batch", type=at_least_one, default=64, help="images per rank and forward"
    )
    parser.add_argument("--threads", type=at_least_one, default=4, help="reader threads per rank")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="result, JSON; default: RUN_DIR/evaluation/..."
    )


def add_decoder(parser: argparse.ArgumentParser) -> None:
    """Add the option that chooses the decoder."""
    parser.add_argument("--decode", choices=DECODERS, default="auto", help="as data.decode")


def add_dense_methods(methods: "argparse._SubParsersAction[Parser]") -> None:
    """Add the methods that need masks or no labels."""
    segmentation = methods.add_parser(
        "segmentation", help="k-NN and linear segmentation of patches", allow_abbrev=False
    )
    representation = methods.add_parser(
        "representation", help="ranks, uniformity, attention on masks", allow_abbrev=False
    )
    propagation = methods.add_parser(
        "propagation", help="masks of clips from their first frame", allow_abbrev=False
    )
    for method in (segmentation, representation, propagation):
        add_weight_options(method)
    masked = "images/ and masks/ in a folder, or Pascal VOC's folder or list"
    add_image_options(
        segmentation,
        f"{masked}; default: the run's eval.segmentation_path",
        "the same; default: val.txt of Pascal VOC's folder, or test/ beside train/ in --train",
        "of the images",
    )
    representation.add_argument(
        "--images",
        help="images, folder or tars, no labels needed; default: the run's eval.test_path",
    )
    representation.add_argument(
        "--masks", help=f"compare attention maps with masks: {masked}; default: not compared"
    )
    add_decoder(representation)
    propagation.add_argument("--clips", required=True, help="a folder in DAVIS's layout")
    for method in (segmentation, representation, propagation):
        add_run_options(method)


def check_weight_options(options: argparse.Namespace) -> None:
    """Refuse weight options that would have no effect.

    Raises:
        ConfigError: naming the option and the option that it belongs to.
    """
    given = vars(options)
    for owner, names in {"checkpoint": ("weights", "arch"), "timm": ("file", "size")}.items():
        for name in names:
            if given[name] is not None and given[owner] is None:
                raise ConfigError(f"--{name} belongs to --{owner}")


def check_image_options(options: argparse.Namespace) -> None:
    """Refuse image options that would have no effect.

    Raises:
        ConfigError: naming the option.
    """
    for name in ("split", "held_out"):
        fraction = getattr(options, name, None)
        if fraction is not None and not 0 < fraction < 1:
            raise ConfigError(f"--{name.replace('_', '-')}={fraction} must be between 0 and 1")
    given = vars(options)
    if given.get("split") is not None and given.get("test") is not None:
        raise ConfigError("--split makes the test set out of --train; drop --split or --test")


def check_output(options: argparse.Namespace) -> None:
    """Refuse a result file that the figure beside it would replace.

    Raises:
        ConfigError: naming the file.
    """
    if options.method in DENSE and options.out is not None and options.out.suffix == ".png":
        raise ConfigError(f"--out={options.out}: the figure is written there; name FILE.json")
