"""Where an export comes from: an intact checkpoint, its settings, and one of its networks."""

from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor

from cmtmae_scale.checkpoint import layout
from cmtmae_scale.checkpoint.chunks import ChunkReader
from cmtmae_scale.checkpoint.find import require_checkpoint
from cmtmae_scale.checkpoint.shards import ENCODERS
from cmtmae_scale.config.derive import needs
from cmtmae_scale.config.load import config_from_dict
from cmtmae_scale.config.schema import Config
from cmtmae_scale.errors import CheckpointError
from cmtmae_scale.method.student import Student, build_student

Weights = Literal["student", "momentum"]


class Origin(NamedTuple):
    """A checkpoint and whose weights of it are exported."""

    folder: Path
    """The checkpoint's."""
    state: dict[str, Any]
    """Progress, digest of the images, versions."""
    config: Config
    weights: Weights

    @property
    def step(self) -> int:
        """Optimizer steps behind the weights."""
        return int(self.state["progress"]["step"])

    @property
    def run_dir(self) -> Path | None:
        """Folder of the run, where the checkpoint still lies in it."""
        return self.folder.parent.parent if self.folder.parent.name == "checkpoints" else None

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """States of a prefix, without it; float32 on the CPU."""
        with ChunkReader(self.folder) as reader:
            return {
                key.removeprefix(prefix): reader.read_tensor(key)
                for key in reader.index
                if key.startswith(prefix)
            }

    def encoder(self) -> Student:
        """The encoder as the run computes it, in eval mode."""
        student = build_student(self.config)
        student.load_state_dict(self.tensors(ENCODERS[self.weights]), strict=True)
        return student.eval().requires_grad_(False)


def open_origin(place: Path, weights: Weights) -> Origin:
    """Open a checkpoint.

    Args:
        place: a checkpoint's folder, or a run's, of which the newest intact checkpoint is taken.
        weights: the student, or its moving average.

    Raises:
        CheckpointError: no checkpoint, a broken one, or one without these weights.
    """
    folder = locate(place)
    state = layout.read_state(folder)
    config = config_from_dict(state["config"], str(folder / layout.STATE))
    if weights == "momentum" and not needs(config).momentum:
        raise CheckpointError(
            f"{folder}: the run has no momentum student; export --weights student"
        )
    return Origin(folder, state, config, weights)


def locate(place: Path) -> Path:
    """Folder of an intact checkpoint at or under a path.

    Raises:
        CheckpointError: if there is none.
    """
    if (place / "checkpoints").is_dir():
        return require_checkpoint(place / "checkpoints")
    if not (place / layout.MANIFEST).exists():
        raise CheckpointError(
            f"--checkpoint={place} is neither a checkpoint (it has no {layout.MANIFEST}) nor a run "
            "(it has no checkpoints/)"
        )
    problem = layout.find_damage(place)
    if problem is not None:
        raise CheckpointError(f"{place} is broken: {problem}; name an older checkpoint or the run")
    return place.resolve()
