"""The online teacher: one forward returns the attention map and the features."""

import logging
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from cmtmae_scale.config.teachers import entry_message
from cmtmae_scale.method.attention import resize_map, resize_tokens
from cmtmae_scale.method.images import normalise_images
from cmtmae_scale.runtime.compilation import compiled
from cmtmae_scale.teachers.base import TeacherOutputs, TeacherView, Tower
from cmtmae_scale.teachers.weights import sha256
from dataloading.stream import Batch

logger = logging.getLogger(__name__)


class OnlineTeacher:
    """A frozen tower that runs beside the student.

    Args:
        tower: the network, built for ``image_size``.
        outputs: which attention map and features are computed.
        image_size: S in pixels.
        grid: the student's rows and columns; attention maps and features are resized to it if the
            tower's grid differs, with one warning at construction.

    Raises:
        TeacherError: if the model lacks the attention map or the features.

    Source: docs/method.md, sections "Teacher" and "Grids".
    """

    is_compiled = False

    def __init__(
        self, tower: Tower, outputs: TeacherOutputs, image_size: int, grid: tuple[int, int]
    ) -> None:
        if outputs.attention_layers:
            tower.check_source(outputs.source, outputs.attention_layers)
        if outputs.feature_layers:
            tower.check_feature(outputs.feature)
        self.tower = tower
        self.outputs = outputs
        self.model = tower.model.eval().requires_grad_(False)
        self.image_size = image_size
        self.grid = grid
        self.mean, self.std, self.has_cls = tower.mean, tower.std, tower.has_cls
        self.width = tower.width(outputs.feature if outputs.feature_layers else "block")
        if tower.grid != grid:
            theirs, ours = ("x".join(map(str, each)) for each in (tower.grid, grid))
            text = (
                f"teacher.image_size={image_size} gives a grid of {theirs}, the student has "
                f"{ours}: attention maps and features are resized; remove teacher.image_size to "
                "make the grids equal"
            )
            logger.warning("%s", entry_message(text))

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype: that of the weights."""
        return next(self.model.parameters()).dtype

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "OnlineTeacher":
        """Move the network, and change its compute dtype if one is given; return self."""
        self.model.to(device=device, dtype=dtype)
        return self

    def compile(self) -> None:
        """Compile ``forward_batch``, whose batches have one shape, as one graph."""
        self.tower.fuse_attention()
        self.is_compiled = True

    def forward_batch(self, batch: Batch) -> TeacherView:
        """Return the output for the last images of a batch."""
        return compiled(OnlineTeacher.__call__, self.is_compiled)(self, batch.images[-1])

    @torch.no_grad()
    def __call__(self, images: Tensor) -> TeacherView:
        """Run the tower.

        Args:
            images: uint8, ``[B, S, S, 3]``, on the teacher's device.

        Returns:
            attention: ``[B, N]``, float32, rows sum to 1: softmax in float32 from queries and keys
                of the compute dtype, mean over heads, prefix dropped, renormalised, mean of layers;
                or the activation norm.
            features: ``[B, 1 + N, F]`` or ``[B, N, F]``, registers dropped, in the compute dtype
                (float32 where they were resized), not normalised.

            Outputs that the run does not need are ``None``. No host synchronisation.

        Raises:
            ValueError: for images of another size.

        Source: docs/method.md, sections "Attention maps", "Grids" and "Teacher".
        """
        size = self.image_size
        if images.ndim != 4 or images.shape[1:] != (size, size, 3):
            raise ValueError(
                f"teacher's images have shape {list(images.shape)}; expected [B, {size}, {size}, 3]"
            )
        pixels = normalise_images(images, self.mean, self.std)
        maps, layers = self.tower.forward(pixels.to(self.dtype), self.outputs)
        return TeacherView(self.finish_attention(maps), self.finish_features(layers))

    def finish_attention(self, maps: list[Tensor]) -> Tensor | None:
        """Average over layers and resize to the student's grid."""
        if not maps:
            return None
        mixed = maps[0] if len(maps) == 1 else torch.stack(maps).mean(dim=0)
        return resize_map(mixed, self.tower.grid, self.grid)

    def finish_features(self, layers: list[Tensor]) -> Tensor | None:
        """Norm, project, drop registers and resize to the student's grid."""
        if not layers:
            return None
        tokens = layers[0]
        if len(layers) > 1:
            tokens = torch.stack([one.float() for one in layers]).mean(dim=0).to(self.dtype)
        if self.outputs.feature != "block":
            tokens = self.tower.norm(tokens)
        if self.outputs.feature == "proj":
            tokens = self.tower.project(tokens)
        patches = tokens[:, self.tower.num_prefix :]
        if self.tower.grid != self.grid:
            patches = resize_tokens(patches, self.tower.grid, self.grid)
        if not self.has_cls:
            return patches
        return torch.cat([tokens[:, :1].to(patches.dtype), patches], dim=1)

    @cached_property
    def weights_sha256(self) -> str | None:
        """SHA-256 of the weights file; ``None``: there is none, or it is not on this machine."""
        file = self.tower.source.get("weights_file")
        return sha256(str(file)) if file and Path(str(file)).is_file() else None

    def fingerprint(self) -> dict[str, object]:
        """Return all that the outputs depend on except the images, as JSON values.

        Reads the weights file for its digest if it exists; depends on no path.
        """
        source = {key: value for key, value in self.tower.source.items() if key != "weights_file"}
        outputs = self.outputs
        return source | {
            "weights_sha256": self.weights_sha256,
            "dtype": str(self.dtype).removeprefix("torch."),
            "image_size": self.image_size,
            "teacher_grid": list(self.tower.grid),
            "grid": list(self.grid),
            "mean": list(self.mean),
            "std": list(self.std),
            "depth": len(self.tower.blocks),
            "feature": outputs.feature if outputs.feature_layers else None,
            "layers": list(outputs.feature_layers),
            "attention_source": outputs.source if outputs.attention_layers else None,
            "attention_layers": list(outputs.attention_layers),
        }
