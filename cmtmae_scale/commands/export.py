"""``cmtmae export KIND``: weights for other libraries, verified before publication."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cmtmae_scale.commands.alone import run_alone
from cmtmae_scale.errors import EXIT_DONE
from cmtmae_scale.runtime.arguments import Parser
from cmtmae_scale.runtime.log import set_up_logging


def export_weights(arguments: Sequence[str] | None = None) -> int:
    """Export weights and print where they are; returns the exit code."""
    options = parse_options(arguments)
    set_up_logging(0, 1)

    def export() -> int:
        sys.stdout.write(options.run(options) + "\n")
        return EXIT_DONE

    return run_alone(export)


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; a usage error exits with code 78."""
    parser = Parser(description="Export weights to other libraries.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="what", required=True)
    helps = {
        "encoder": "one file of safetensors under timm's names",
        "timm": "a folder for timm.create_model('local-dir:FOLDER', pretrained=True)",
        "hf": "a folder for transformers' AutoModel.from_pretrained",
        "full": "a folder with encoder, decoder and heads, for load_full",
    }
    for what, text in helps.items():
        command = commands.add_parser(what, help=text, allow_abbrev=False)
        place = "a checkpoint, or a run: its newest intact"
        command.add_argument("--checkpoint", type=Path, required=True, help=place)
        default = f"WEIGHTS-{what}-STEP" + (".safetensors" if what == "encoder" else "")
        command.add_argument("--output", type=Path, help=f"what to write; default: {default} here")
        if what != "full":
            command.add_argument("--weights", choices=("student", "momentum"), default="student")
        if what != "encoder":
            images = "images to verify on, folder or tars; default: the run's"
            command.add_argument("--images", type=Path, help=images)
        command.set_defaults(run=run_encoder if what == "encoder" else run_folder)
    return parser.parse_args(arguments)


def run_encoder(options: argparse.Namespace) -> str:
    """Export one file; returns the text to print."""
    from cmtmae_scale.export.encoder import export_encoder

    done = export_encoder(options.checkpoint, options.output, options.weights)
    return (
        f"{done.file}: {options.weights} encoder at step {done.step}, {done.num_tensors} tensors, "
        f"{done.num_parameters} parameters, loaded back strictly into\n{done.call}"
    )


def run_folder(options: argparse.Namespace) -> str:
    """Export a folder; returns the text to print."""
    from cmtmae_scale.export.formats import export_folder

    weights = "student" if options.what == "full" else options.weights
    return export_folder(options.what, options.checkpoint, options.output, weights, options.images)
