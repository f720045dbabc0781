"""Export of an encoder as one file under timm's names, and the model of timm that it fits."""

from pathlib import Path
from typing import Any, NamedTuple, cast

import timm
from safetensors.torch import load_file
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

from cmtmae_scale.checkpoint.shards import write_encoder
from cmtmae_scale.config.schema import Config
from cmtmae_scale.errors import CheckpointError
from cmtmae_scale.export.origin import Weights, open_origin
from cmtmae_scale.export.place import default_output, publish
from cmtmae_scale.method.build import timm_options
from cmtmae_scale.method.images import IMAGENET_MEAN, IMAGENET_STD
from dataloading.one_pass import CENTRE


class Exported(NamedTuple):
    """A written file."""

    file: Path
    step: int
    """Step of the checkpoint."""
    call: str
    """The Python call that builds the model that the file fits."""
    num_tensors: int
    num_parameters: int


def export_encoder(place: Path, output: Path | None, weights: Weights) -> Exported:
    """Write an encoder with timm's names and load it back strictly.

    Args:
        place: a checkpoint's folder, or a run's for its newest intact checkpoint.
        output: file to write; ``None``: see ``default_output``.
        weights: student or momentum encoder.

    Raises:
        CheckpointError: no checkpoint, a broken one, or one without these weights.
        ConfigError: an output that exists or cannot be written.
    """
    origin = open_origin(place, weights)
    output = output or default_output(origin, "encoder.safetensors")
    with publish(output) as draft:
        write_encoder(origin.folder, draft, weights)
        model, call = build_timm(origin.config)
        tensors = load_strictly(model, draft)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Exported(output, origin.step, call, tensors, parameters)


def build_timm(config: Config) -> tuple[VisionTransformer | Eva, str]:
    """Build timm's own model of a config's student; also return the Python call."""
    options = timm_options(config)
    model = cast(VisionTransformer | Eva, timm.create_model(config.student.arch, **options))
    return model, timm_call(config)


def timm_call(config: Config, **more: str) -> str:
    """Return the Python call that builds timm's model of a config's student, with ``more``.

    The call names the preprocessing, because the architecture's default belongs to other weights.
    """
    overlay = {"pretrained_cfg_overlay": preprocessing(config.views.image_size)}
    options = timm_options(config) | more | overlay
    shown = ", ".join(f"{key}={value!r}" for key, value in options.items())
    return f"timm.create_model({config.student.arch!r}, {shown})"


def preprocessing(size: int) -> dict[str, Any]:
    """Return timm's preprocessing for a student with images of ``size`` pixels."""
    return {
        "input_size": (3, size, size),
        "interpolation": "bicubic",
        "crop_pct": CENTRE,
        "crop_mode": "center",
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
    }


def load_strictly(model: VisionTransformer | Eva, file: Path) -> int:
    """Load a file strictly into a model; returns the number of tensors.

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
