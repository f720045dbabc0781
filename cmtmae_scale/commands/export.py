"""``cmtmae export KIND``: weights for other libraries, verified before publication."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from cmtmae_scale.commands.alone import run_alone
from cmtmae_scale.errors import EXIT_DONE, EXIT_STOPPED
from cmtmae_scale.runtime.arguments import Parser
from cmtmae_scale.runtime.log import escape_controls, set_up_logging

logger = logging.getLogger(__name__)

ON_HUB = ("timm", "hf")
"""Kinds that a library loads from the hub; the config of ``full`` holds paths of the machine."""


def export_weights(arguments: Sequence[str] | None = None) -> int:
    """Export weights and print where they are; returns the exit code."""
    options = parse_options(arguments)
    set_up_logging(0, 1)

    def export() -> int:
        sys.stdout.write(escape_controls(options.run(options)) + "\n")
        return EXIT_DONE

    try:
        return run_alone(export)
    except KeyboardInterrupt:
        logger.warning("stopped; a finished export stays, and the same command may be repeated")
        return EXIT_STOPPED


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; a usage error exits with code 78."""
    parser = Parser(description="Export weights to other libraries.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="what", required=True)
    helps = {
        "encoder": "one file of safetensors under timm's names",
        "dcp": "a folder of torch.distributed.checkpoint under timm's names, as for torchtitan",
        "timm": "a folder for timm.create_model('local-dir:FOLDER', pretrained=True)",
        "hf": "a folder for transformers' AutoModel.from_pretrained",
        "onnx": "a folder with model.onnx, of any batch size",
        "full": "a folder with encoder, decoder and heads, for load_full",
    }
    for what, text in helps.items():
        command = commands.add_parser(what, help=text, allow_abbrev=False)
        place = "a run (its newest intact checkpoint), or a checkpoint"
        command.add_argument("--checkpoint", type=Path, required=True, help=place)
        end = f"{what}.safetensors" if what == "encoder" else what
        default = f"RUN_DIR/export/NAME-WEIGHTS-STEP-{end}, NAME of run.name"
        command.add_argument("--output", type=Path, help=f"what to write; default: {default}")
        if what != "full":
            chosen = "momentum: the EMA weights; default: student"
            command.add_argument(
                "--weights", choices=("student", "momentum"), default="student", help=chosen
            )
        if what not in UNSEEN:
            images = "images to verify on, folder or tars; default: the run's"
            command.add_argument("--images", help=images)  # as text: it may be an address
        if what == "onnx":
            size = (
                "side of the graph's images in pixels; positions are resampled; default: the run's"
            )
            command.add_argument("--image-size", type=int, metavar="PIXELS", help=size)
        if what in ON_HUB:
            hub = "upload the verified folder to this repository of the Hugging Face hub"
            command.add_argument("--push-to-hub", metavar="OWNER/NAME", help=hub)
            private = "the repository must be private; else a new one is public"
            command.add_argument("--private", action="store_true", help=private)
        command.set_defaults(run=UNSEEN.get(what, run_folder))
    options = parser.parse_args(arguments)
    if getattr(options, "private", False) and options.push_to_hub is None:
        parser.error("--private belongs to --push-to-hub")
    size = getattr(options, "image_size", None)
    if size is not None and size < 1:
        parser.error("--image-size is a number of pixels, such as 448")
    return options


def run_encoder(options: argparse.Namespace) -> str:
    """Export one file; returns the text to print."""
    from cmtmae_scale.export.encoder import export_encoder

    done = export_encoder(options.checkpoint, options.output, options.weights)
    return (
        f"{done.file}: {options.weights} encoder at step {done.step}, {done.num_tensors} tensors, "
        f"{done.num_parameters} parameters, loaded back strictly into\n{done.call}"
    )


def run_dcp(options: argparse.Namespace) -> str:
    """Export a folder of torch.distributed.checkpoint; returns the text to print."""
    from cmtmae_scale.export.dcp import export_dcp

    done = export_dcp(options.checkpoint, options.output, options.weights)
    return (
        f"{done.file}: {options.weights} encoder at step {done.step}, {done.num_tensors} tensors, "
        f"{done.num_parameters} parameters, read back equal to the bit; they fit\n{done.call}"
    )


UNSEEN = {"encoder": run_encoder, "dcp": run_dcp}
"""Kinds that are verified without images."""


def run_folder(options: argparse.Namespace) -> str:
    """Export a folder; returns the text to print."""
    from cmtmae_scale.export.formats import export_folder
    from cmtmae_scale.export.hub import Target

    weights = "student" if options.what == "full" else options.weights
    repo = getattr(options, "push_to_hub", None)
    target = None if repo is None else Target(repo, options.private)
    return export_folder(
        options.what,
        options.checkpoint,
        options.output,
        weights,
        options.images,
        target,
        getattr(options, "image_size", None),
    )
