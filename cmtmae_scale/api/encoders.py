"""Load an encoder as a timm model."""

from pathlib import Path
from typing import Any, cast

from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from cmtmae_scale.checkpoint import layout
from cmtmae_scale.checkpoint.shards import ENCODERS
from cmtmae_scale.config.needs import needs
from cmtmae_scale.config.schema import Config
from cmtmae_scale.errors import CheckpointError, ConfigError
from cmtmae_scale.evaluation.encoder_file import exported_file, file_config, read_file
from cmtmae_scale.evaluation.saved import (
    check_encoder,
    locate_checkpoint,
    read_tensors,
    saved_config,
)
from cmtmae_scale.export.encoder import build_timm
from cmtmae_scale.export.timm_folder import data_config
from cmtmae_scale.teachers.state_dicts import SAVE_FLOATS, find_other_dtype


def load_encoder(
    place: str | Path, weights: str | None = None, *, arch: str | None = None
) -> VisionTransformer | Eva:
    """Load the encoder of a run or of a file as timm's own model.

    Args:
        place: a run (its newest intact checkpoint), a checkpoint, a folder of
            ``cmtmae export timm``, or a .safetensors file of ``cmtmae export encoder``.
        weights: ``student`` or ``momentum``, of a run or checkpoint; ``None``: the EMA weights
            where the run has them.
        arch: timm's name, for a .safetensors file without ``config.json`` beside it.

    Returns:
        On the CPU, float32, in eval mode and without gradients. ``forward_features`` maps images
        ``[B, 3, S, S]`` to tokens ``[B, P + N, D]`` after the last norm, prefix tokens first; the
        model itself returns ``[B, D]``, the class token, or the mean of the patch tokens if it has
        no class token. ``timm.data.resolve_model_data_config`` returns image size, mean and
        standard deviation.

    Raises:
        CheckpointError: no checkpoint, a damaged one, one without these weights, or a file that is
            not an encoder.
        ConfigError: arguments that do not apply to this kind of path.
    """
    return open_encoder(Path(place), weights, arch)[0]


def open_encoder(
    place: Path, weights: str | None = None, arch: str | None = None
) -> tuple[VisionTransformer | Eva, Config]:
    """Load an encoder, and the settings of its run as far as the file records them.

    Arguments and errors are those of ``load_encoder``.
    """
    file = exported_file(place)
    if file is not None:
        if weights is not None:
            raise ConfigError(f"weights={weights} belongs to a run or a checkpoint; found {file}")
        tensors = read_file(file)
        config = file_config(file, tensors, arch)
        return load_strictly(config, tensors, str(file)), config
    if arch is not None:
        raise ConfigError(f"arch={arch} belongs to a .safetensors file; found {place}")
    folder = locate_checkpoint(place)
    config = saved_config(folder, layout.read_state(folder))
    weights = weights or ("momentum" if needs(config).momentum else "student")
    if weights not in ENCODERS:
        raise ConfigError(f"weights={weights} is not one of {', '.join(ENCODERS)}")
    if weights == "momentum" and not needs(config).momentum:
        raise CheckpointError(f"{folder}: the run has no momentum encoder; use weights=student")
    check_encoder(folder, config, ENCODERS[weights])
    return load_strictly(config, read_tensors(folder, ENCODERS[weights]), str(folder)), config


def load_strictly(
    config: Config, tensors: dict[str, Tensor], place: str
) -> VisionTransformer | Eva:
    """Build timm's model of a config's student and load weights strictly.

    Raises:
        CheckpointError: if names, shapes or kinds of dtypes differ.
    """
    model, call = build_timm(config)
    other = find_other_dtype(model.state_dict(), tensors)
    if other:
        raise CheckpointError(f"{place}: {other[0]}; {SAVE_FLOATS}")
    try:
        model.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        first = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{place}: does not fit {call} ({first})") from error
    cast(Any, model).pretrained_cfg = data_config(config.views.image_size)
    return model.eval().requires_grad_(False)
