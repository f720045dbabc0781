"""A teacher that runs beside the student: one forward pass gives the map and the features."""

import logging
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from cmtmae_scale.config.derive import Needs
from cmtmae_scale.config.schema import Config
from cmtmae_scale.errors import TeacherError
from cmtmae_scale.method.attention import mean_query_row, patch_map, resize_map, resize_tokens
from cmtmae_scale.method.images import normalise_images
from cmtmae_scale.teachers.base import TeacherView, Tower
from cmtmae_scale.teachers.weights import sha256
from dataloading.stream import Batch

logger = logging.getLogger(__name__)


class Reading(NamedTuple):
    """What is read from the tower, blocks counted from 0; an empty tuple is not read."""

    source: str
    attention_layers: tuple[int, ...]
    feature: str
    feature_layers: tuple[int, ...]

    @classmethod
    def from_config(cls, config: Config, needs: Needs, depth: int) -> "Reading":
        """Resolve negative block numbers against a tower of ``depth`` blocks.

        Raises:
            TeacherError: a block that the tower does not have, or layers beside ``source=pool``.
        """
        source, layers = config.attention.source, config.attention.layers
        if needs.teacher_attention and source == "pool" and list(layers) != [-1]:
            raise TeacherError(
                f"attention.layers={list(layers)}: attention.source=pool reads the pooling head, "
                "not a block; set attention.layers=[-1]"
            )
        attention = resolve(layers, depth, "attention.layers") if needs.teacher_attention else ()
        key = "target.teacher.layers"
        features = (
            resolve(config.target.teacher.layers, depth, key) if needs.teacher_features else ()
        )
        return cls(source, attention, config.teacher.feature, features)


def resolve(layers: list[int], depth: int, key: str) -> tuple[int, ...]:
    """Block numbers counted from 0.

    Raises:
        TeacherError: a block outside the tower.
    """
    for layer in layers:
        if not -depth <= layer < depth:
            raise TeacherError(
                f"{key}={list(layers)}: the teacher has {depth} blocks, "
                f"{-depth} to {depth - 1}; found {layer}"
            )
    return tuple(layer % depth for layer in layers)


class OnlineTeacher:
    """A frozen tower and what is read from it.

    Args:
        tower: the network, already of the size that ``image_size`` asks for.
        reading: which maps and features.
        image_size: S, pixels.
        grid: the student's rows and columns; maps and features are resized to it where the tower's
            own grid differs (method.md 4.3), with one warning here.

    Raises:
        TeacherError: if the model lacks the map or the features.
    """

    def __init__(
        self, tower: Tower, reading: Reading, image_size: int, grid: tuple[int, int]
    ) -> None:
        if reading.attention_layers:
            tower.check_source(reading.source, reading.attention_layers)
        if reading.feature_layers:
            tower.check_feature(reading.feature)
        self.tower = tower
        self.reading = reading
        self.model = tower.model.eval().requires_grad_(False)
        self.image_size = image_size
        self.grid = grid
        self.mean = tower.mean
        self.std = tower.std
        self.has_cls = tower.has_cls
        self.width = tower.width(reading.feature if reading.feature_layers else "block")
        if tower.grid != grid:
            logger.warning(
                "teacher.image_size=%d gives a grid of %s, the student has %s: maps and features "
                "are resized; leave teacher.image_size out to make the grids equal",
                image_size,
                "x".join(map(str, tower.grid)),
                "x".join(map(str, grid)),
            )

    @property
    def dtype(self) -> torch.dtype:
        """Compute type: that of the weights."""
        return next(self.model.parameters()).dtype

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "OnlineTeacher":
        """Move the network, and change its compute type if one is given; returns itself."""
        self.model.to(device=device, dtype=dtype)
        return self

    def forward_batch(self, batch: Batch) -> TeacherView:
        """See ``TeacherSource.look``."""
        return self(batch.images[-1])

    @torch.no_grad()
    def __call__(self, images: Tensor) -> TeacherView:
        """Look at a batch.

        Args:
            images: uint8, ``[B, S, S, 3]``, on the teacher's device.

        Returns:
            attention: ``[B, N]``, float32, rows sum to 1: softmax in float32 from queries and keys
                of the compute type, mean over heads, prefix dropped, renormalised, mean of layers.
            features: ``[B, 1 + N, F]`` or ``[B, N, F]``, registers dropped, in the compute type
                (float32 where they were resized), not normalised.

            What the run does not need is ``None`` and is not computed. No host synchronisation.

        Raises:
            ValueError: for pictures of another size.

        Source: method.md 4.1, 4.3, 4.8, 6.1, 6.2.
        """
        size = self.image_size
        if images.ndim != 4 or images.shape[1:] != (size, size, 3):
            raise ValueError(
                f"teacher's images have shape {list(images.shape)}; expected [B, {size}, {size}, 3]"
            )
        pixels = normalise_images(images, self.mean, self.std)
        tokens = self.tower.embed(pixels.to(self.dtype))
        maps: list[Tensor] = []
        outputs: list[Tensor] = []
        for number, block in enumerate(self.tower.blocks):
            if self.reading.source != "pool" and number in self.reading.attention_layers:
                maps.append(self.block_map(number, tokens))
            if self.done(number):
                break
            tokens = block(tokens)
            if number in self.reading.feature_layers:
                outputs.append(tokens)
        if self.reading.source == "pool" and self.reading.attention_layers:
            (query, key, scale), prefix = self.tower.pool_query_key(self.tower.norm(tokens))
            maps.append(patch_map(mean_query_row(query, key, scale), prefix))
        return TeacherView(self.finish_maps(maps), self.finish_features(outputs))

    def done(self, number: int) -> bool:
        """Whether nothing that is read depends on block ``number`` or a later one."""
        reading = self.reading
        if reading.source == "pool" and reading.attention_layers:
            return False
        maps_left = any(layer > number for layer in reading.attention_layers)
        features_left = any(layer >= number for layer in reading.feature_layers)
        return not maps_left and not features_left

    def block_map(self, number: int, tokens: Tensor) -> Tensor:
        """Map of one block from its input, ``[B, N]`` on the tower's own grid."""
        prefix = self.tower.num_prefix
        queries = slice(0, 1) if self.reading.source == "cls" else slice(prefix, None)
        query, key, scale = self.tower.query_key(number, tokens, queries)
        return patch_map(mean_query_row(query, key, scale), prefix)

    def finish_maps(self, maps: list[Tensor]) -> Tensor | None:
        """Mean over layers, on the student's grid."""
        if not maps:
            return None
        mixed = maps[0] if len(maps) == 1 else torch.stack(maps).mean(dim=0)
        return resize_map(mixed, self.tower.grid, self.grid)

    def finish_features(self, outputs: list[Tensor]) -> Tensor | None:
        """Norm and projection as asked, class token and patches only, on the student's grid."""
        if not outputs:
            return None
        tokens = outputs[0]
        if len(outputs) > 1:
            tokens = torch.stack([one.float() for one in outputs]).mean(dim=0).to(self.dtype)
        if self.reading.feature != "block":
            tokens = self.tower.norm(tokens)
        if self.reading.feature == "proj":
            tokens = self.tower.project(tokens)
        patches = tokens[:, self.tower.num_prefix :]
        if self.tower.grid != self.grid:
            patches = resize_tokens(patches, self.tower.grid, self.grid)
        if not self.has_cls:
            return patches
        return torch.cat([tokens[:, :1].to(patches.dtype), patches], dim=1)

    def fingerprint(self) -> dict[str, object]:
        """Everything that the outputs depend on but the pictures, as JSON values.

        Reads the weights file to digest it, if it is at hand; depends on no path.
        """
        source = dict(self.tower.source)
        file = source.pop("weights_file", None)
        reading = self.reading
        return source | {
            "weights_sha256": sha256(str(file)) if file and Path(str(file)).is_file() else None,
            "dtype": str(self.dtype).removeprefix("torch."),
            "image_size": self.image_size,
            "teacher_grid": list(self.tower.grid),
            "grid": list(self.grid),
            "mean": list(self.mean),
            "std": list(self.std),
            "depth": len(self.tower.blocks),
            "feature": reading.feature if reading.feature_layers else None,
            "layers": list(reading.feature_layers),
            "attention_source": reading.source if reading.attention_layers else None,
            "attention_layers": list(reading.attention_layers),
        }
