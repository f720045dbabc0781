"""Source of an export: an intact checkpoint, its settings, and the exported network."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor

from cmtmae_scale.checkpoint import layout
from cmtmae_scale.checkpoint.shards import ENCODERS
from cmtmae_scale.config.needs import needs
from cmtmae_scale.config.schema import Config
from cmtmae_scale.errors import CheckpointError, ConfigError
from cmtmae_scale.evaluation.saved import (
    check_encoder,
    locate_checkpoint,
    read_tensors,
    run_of_checkpoint,
    saved_config,
)
from cmtmae_scale.method.build import build_student, probe_student
from cmtmae_scale.method.student import Student

Weights = Literal["student", "momentum"]


class Origin(NamedTuple):
    """A checkpoint, and which of its weights are exported."""

    folder: Path
    """The checkpoint's folder."""
    state: dict[str, Any]
    """Progress, digest of the images, versions."""
    config: Config
    """Config of the run, but with the exported network's ``views.image_size``."""
    weights: Weights
    trained_size: int | None = None
    """Side of the run's images in pixels; ``None``: that of the exported network."""

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return int(self.state["progress"]["step"])

    @property
    def run_dir(self) -> Path | None:
        """Folder of the run; ``None``: the checkpoint was moved out of it."""
        return run_of_checkpoint(self.folder)

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """Read the tensors under a prefix, without the prefix; float32 on the CPU."""
        return read_tensors(self.folder, prefix)

    def encoder(self) -> Student:
        """Build the encoder as the run computes it, in eval mode.

        For images of another size, positional embeddings are resampled as timm does.
        """
        student = build_student(self.config)
        tensors = self.tensors(ENCODERS[self.weights])
        if (table := tensors.get("pos_embed")) is not None:
            prefix = 0 if student.no_embed_class else student.num_prefix
            tensors["pos_embed"] = resample_abs_pos_embed(
                table, list(student.grid), num_prefix_tokens=prefix
            )
        student.load_state_dict(tensors, strict=True)
        return student.eval().requires_grad_(False)


def open_origin(place: Path, weights: Weights, image_size: int | None = None) -> Origin:
    """Open a checkpoint, or the newest intact one of a run's folder.

    ``image_size`` is the side of the exported network's images in pixels; ``None``: the run's.

    Raises:
        ConfigError: if the patches do not fill images of that size.
        CheckpointError: no checkpoint, a broken one, one without these weights, or one whose
            settings this version refuses.
    """
    folder = locate_checkpoint(place)
    state = layout.read_state(folder)
    config = saved_config(folder, state)
    if weights == "momentum" and not needs(config).momentum:
        raise CheckpointError(
            f"{folder}: the run has no momentum encoder; export --weights student"
        )
    check_encoder(folder, config, ENCODERS[weights])
    trained_size = config.views.image_size
    if image_size is not None:
        config = replace(config, views=replace(config.views, image_size=image_size))
        try:
            probe_student(config)
        except ConfigError as error:
            raise ConfigError(str(error).replace("views.image_size", "--image-size")) from error
    return Origin(folder, state, config, weights, trained_size)
