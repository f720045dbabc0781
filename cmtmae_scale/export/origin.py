"""Source of an export: an intact checkpoint, its settings, and the exported network."""

from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor

from cmtmae_scale.checkpoint import layout
from cmtmae_scale.checkpoint.shards import ENCODERS
from cmtmae_scale.config.derive import needs
from cmtmae_scale.config.schema import Config
from cmtmae_scale.errors import CheckpointError
from cmtmae_scale.evaluation.subject import (
    check_encoder,
    locate_checkpoint,
    read_tensors,
    run_of_checkpoint,
    saved_config,
)
from cmtmae_scale.method.build import build_student
from cmtmae_scale.method.student import Student

Weights = Literal["student", "momentum"]


class Origin(NamedTuple):
    """A checkpoint and the weights of it that are exported."""

    folder: Path
    """The checkpoint's folder."""
    state: dict[str, Any]
    """Progress, digest of the images, versions."""
    config: Config
    weights: Weights

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
        """Build the encoder as the run computes it, in eval mode."""
        student = build_student(self.config)
        student.load_state_dict(self.tensors(ENCODERS[self.weights]), strict=True)
        return student.eval().requires_grad_(False)


def open_origin(place: Path, weights: Weights) -> Origin:
    """Open a checkpoint, or the newest intact one of a run's folder.

    Raises:
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
    return Origin(folder, state, config, weights)
