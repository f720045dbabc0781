"""``launchers/export.py KIND``: weights for other libraries, proven before they are published."""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from cmtmae_scale.errors import EXIT_DONE, CmtMaeError
from cmtmae_scale.evaluation.encoders import weights_digest
from cmtmae_scale.export import full, hugging_face, timm_folder
from cmtmae_scale.export.card import Card, model_card
from cmtmae_scale.export.compare import TOLERANCE, Agreement
from cmtmae_scale.export.encoder import export_encoder
from cmtmae_scale.export.folder import published
from cmtmae_scale.export.origin import Origin, Weights, open_origin
from cmtmae_scale.export.views import open_views
from cmtmae_scale.runtime.arguments import Parser
from cmtmae_scale.runtime.log import set_up_logging
from cmtmae_scale.runtime.storage import write_text
from dataloading.errors import DataError

logger = logging.getLogger(__name__)


class Format(NamedTuple):
    """A kind of folder."""

    library: Callable[[], str]
    """Program that loads it, with its version; raises ``ConfigError`` where it is missing."""
    hub_name: str
    title: str
    write: Callable[[Path, Origin], None]
    check: Callable[[Path, Origin, Tensor], Agreement]
    snippet: Callable[[Origin], str]


FORMATS = {
    "timm": Format(
        timm_folder.described,
        "timm",
        "an encoder for timm",
        timm_folder.write_timm,
        timm_folder.check_timm,
        timm_folder.snippet,
    ),
    "hf": Format(
        lambda: f"transformers {hugging_face.require_transformers().__version__}",
        "transformers",
        "an encoder for transformers",
        hugging_face.write_hf,
        hugging_face.check_hf,
        lambda origin: hugging_face.snippet(),
    ),
    "full": Format(
        lambda: "CollaborativeMAE",
        "cmtmae_scale",
        "encoder, decoder and prediction heads",
        full.write_full,
        full.check_full,
        lambda origin: full.snippet(),
    ),
}


def export_weights(arguments: Sequence[str] | None = None) -> int:
    """Export and tell; returns the exit code."""
    options = parse(arguments)
    set_up_logging(0, 1)
    try:
        text = options.run(options)
    except (CmtMaeError, DataError) as error:
        logger.error("%s", error)
        return error.exit_code
    sys.stdout.write(text + "\n")
    return EXIT_DONE


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; a usage error exits with 78."""
    parser = Parser(description="Weights for other libraries.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="what", required=True)
    helps = {
        "encoder": "one file of safetensors under timm's names",
        "timm": "a folder for timm.create_model('local-dir:FOLDER', pretrained=True)",
        "hf": "a folder for transformers' AutoModel.from_pretrained",
        "full": "a folder with encoder, decoder and heads, for load_full",
    }
    for what, text in helps.items():
        command = commands.add_parser(what, help=text, allow_abbrev=False)
        command.add_argument(
            "--checkpoint",
            type=Path,
            required=True,
            help="a checkpoint, or a run: its newest intact",
        )
        named = "WEIGHTS-encoder-STEP.safetensors" if what == "encoder" else f"WEIGHTS-{what}-STEP"
        command.add_argument("--output", type=Path, help=f"what to write; default: {named} here")
        if what != "full":
            command.add_argument("--weights", choices=("student", "momentum"), default="student")
        if what != "encoder":
            command.add_argument(
                "--images",
                type=Path,
                help="photographs to compare on, folder or tars; default: the run's",
            )
        command.set_defaults(run=run_encoder if what == "encoder" else run_folder)
    return parser.parse_args(arguments)


def run_encoder(options: argparse.Namespace) -> str:
    """Export one file; returns what is to be said."""
    done = export_encoder(options.checkpoint, options.output, options.weights)
    return (
        f"{done.file}: {options.weights} encoder at step {done.step}, {done.num_tensors} tensors, "
        f"{done.num_parameters} parameters, loaded back strictly into\n{done.call}"
    )


def run_folder(options: argparse.Namespace) -> str:
    """Export a folder; returns what is to be said."""
    weights: Weights = "student" if options.what == "full" else options.weights
    return export_folder(options.what, options.checkpoint, options.output, weights, options.images)


def export_folder(
    what: str, place: Path, output: Path | None, weights: Weights, images: Path | None
) -> str:
    """Write a folder, load it back, compare on photographs, and only then give it its name.

    Args:
        what: one of ``FORMATS``.
        place: a checkpoint's folder, or a run's, of which the newest intact checkpoint is taken.
        output: folder to make; ``None``: named after weights, format and step, in the working one.
        weights: the student, or its moving average.
        images: photographs to compare on; ``None``: the run's own.

    Returns:
        Where it is and how it was checked.

    Raises:
        CheckpointError: no checkpoint, a broken one, one without these weights, or an export that
            computes something else.
        ConfigError: an output that exists or cannot be written, no photographs, a library that is
            missing, or an architecture that it does not know.
        DataError: unusable photographs.
    """
    kind = FORMATS[what]
    library = kind.library()
    origin = open_origin(place, weights)
    output = output or Path(f"{weights}-{what}-{origin.folder.name}")
    with published(output) as draft:
        kind.write(draft, origin)
        views = open_views(images, origin)
        found = kind.check(draft, origin, views.images)
        checked = (
            f"loaded back by {library}; largest difference on {len(views.images)} photographs "
            f"{found} (at most {TOLERANCE:g} of that is allowed)"
        )
        card = Card(
            kind.hub_name,
            kind.title,
            kind.snippet(origin),
            f"Checked when exported: {checked}.",
            weights_digest(origin.encoder().state_dict()),
            views.num_images,
        )
        write_text(draft / "README.md", model_card(origin, card))
    return (
        f"{output}: {kind.title}, {weights} at step {origin.step}, {checked}\n"
        f"photographs: {views.place}"
    )
