"""``launchers/export.py encoder``: an encoder from a checkpoint, proven to load into timm."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import timm
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer

from cmtmae_scale.checkpoint import layout
from cmtmae_scale.checkpoint.find import newest_intact
from cmtmae_scale.checkpoint.publish import write_encoder
from cmtmae_scale.config.derive import needs
from cmtmae_scale.config.load import config_from_dict
from cmtmae_scale.config.schema import Config
from cmtmae_scale.errors import EXIT_DONE, CheckpointError, CmtMaeError, ConfigError
from cmtmae_scale.runtime.arguments import Parser
from cmtmae_scale.runtime.log import set_up_logging

logger = logging.getLogger(__name__)

Weights = Literal["student", "momentum"]


class Exported(NamedTuple):
    """What was written."""

    file: Path
    step: int
    """Step of the checkpoint."""
    call: str
    """The Python call that builds the model that the file fits."""
    num_tensors: int
    num_parameters: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Export and tell; returns the exit code."""
    options = parse(arguments)
    set_up_logging(0, 1)
    try:
        done = export_encoder(options.checkpoint, options.output, options.weights)
    except CmtMaeError as error:
        logger.error("%s", error)
        return error.exit_code
    sys.stdout.write(
        f"{done.file}: {options.weights} encoder at step {done.step}, {done.num_tensors} tensors, "
        f"{done.num_parameters} parameters, loaded back strictly into\n{done.call}\n"
    )
    return EXIT_DONE


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; a usage error exits with 78."""
    parser = Parser(description="Export from a checkpoint.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="what", required=True)
    encoder = commands.add_parser("encoder", help="timm's names, safetensors", allow_abbrev=False)
    encoder.add_argument(
        "--checkpoint", type=Path, required=True, help="a checkpoint, or a run: its newest intact"
    )
    encoder.add_argument(
        "--output", type=Path, help="file to write; default: WEIGHTS-encoder-STEP.safetensors here"
    )
    encoder.add_argument("--weights", choices=("student", "momentum"), default="student")
    return parser.parse_args(arguments)


def export_encoder(place: Path, output: Path | None, weights: Weights) -> Exported:
    """Write an encoder with timm's names and load it back strictly.

    Args:
        place: a checkpoint's folder, or a run's, of which the newest intact checkpoint is taken.
        output: file to write; ``None``: named after weights and step, in the working folder.
        weights: the student, or its moving average.

    Returns:
        The file and what it holds.

    Raises:
        CheckpointError: no checkpoint, a broken one, or one without these weights.
        ConfigError: an output that exists or cannot be written.
    """
    folder = locate(place)
    state = layout.read_state(folder)
    config = config_from_dict(state["config"], str(folder / layout.STATE))
    if weights == "momentum" and not needs(config).momentum:
        raise CheckpointError(
            f"{folder}: the run has no momentum student; export --weights student"
        )
    output = output or Path(f"{weights}-encoder-{folder.name}.safetensors")
    if output.exists():
        raise ConfigError(f"--output={output} exists; delete it or name another file")
    draft = output.with_name(f"{output.name}.tmp")
    try:
        write_encoder(folder, draft, weights)
        model, call = build_timm(config)
        tensors = load_strictly(model, draft)
        draft.rename(output)
    except OSError as error:
        raise ConfigError(f"--output={output} cannot be written ({error})") from error
    finally:
        draft.unlink(missing_ok=True)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Exported(output, state["progress"]["step"], call, tensors, parameters)


def locate(place: Path) -> Path:
    """Folder of an intact checkpoint at or under a path.

    Raises:
        CheckpointError: if there is none.
    """
    if (place / "checkpoints").is_dir():
        return newest_intact(place / "checkpoints")
    if not (place / layout.MANIFEST).exists():
        raise CheckpointError(
            f"--checkpoint={place} is neither a checkpoint (it has no {layout.MANIFEST}) nor a run "
            "(it has no checkpoints/)"
        )
    problem = layout.fault(place)
    if problem is not None:
        raise CheckpointError(f"{place} is broken: {problem}; name an older checkpoint or the run")
    return place


def build_timm(config: Config) -> tuple[VisionTransformer, str]:
    """Build timm's own model of a config's student; also the call that does it."""
    options: dict[str, Any] = {"num_classes": 0, "img_size": config.views.size}
    if config.student.patch_size is not None:
        options["patch_size"] = config.student.patch_size
    with torch.device("meta"):
        probe = cast(VisionTransformer, timm.create_model(config.student.arch, **options))
    options |= {"global_pool": "token" if probe.has_class_token else "avg", "fc_norm": False}
    model = cast(VisionTransformer, timm.create_model(config.student.arch, **options))
    shown = ", ".join(f"{key}={value!r}" for key, value in options.items())
    return model, f"timm.create_model({config.student.arch!r}, {shown})"


def load_strictly(model: VisionTransformer, file: Path) -> int:
    """Load all of a file into all of a model; returns the number of tensors.

    Raises:
        CheckpointError: if names or shapes differ.
    """
    tensors = load_file(file)
    try:
        model.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise CheckpointError(
            f"the encoder does not fit timm {timm.__version__}'s model: "
            f"{' '.join(str(error).split())}"
        ) from error
    return len(tensors)
