"""Turns the loader's views and labels into training examples of a classifier.

Legend: B views in a micro-batch, S their side, C classes, L blocks.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from timm.data.mixup import Mixup, mixup_target
from torch import Tensor

from cmtmae_scale.config.finetune import Augment
from cmtmae_scale.finetuning.draws import (
    RECTANGLES,
    branch_factors,
    noise,
    numpy_seeded,
    per_view,
    positions_of,
)
from cmtmae_scale.finetuning.randaugment import randaugment
from cmtmae_scale.method.images import normalise_images
from dataloading.stream import Batch

AREA = (0.02, 1 / 3)
"""Range of an erased rectangle's fraction of the area."""
ASPECT = (0.3, 1 / 0.3)
"""Range of the rectangle's height / width."""
TRIES = 10


class Examples(NamedTuple):
    """Work of fine-tuning: a micro-batch of views and targets."""

    images: Tensor
    """Normalised, ``[B, 3, S, S]`` float32."""
    keep: Tensor | None
    """Factors for drop path, ``[B, L, 2]``; ``None``: no branch is dropped."""
    targets: Tensor
    """Soft targets, ``[B, C]`` float32; rows sum to 1."""
    valid: Tensor
    """Rows whose images could all be decoded, bool ``[B]``."""

    @property
    def inputs(self) -> tuple[Tensor, Tensor | None]:
        return self.images, self.keep


class Augmenter:
    """Augments micro-batches; a pure function of the settings and of the views' positions.

    Views are cropped and flipped already. Then, as in MAE, follow RandAugment, normalisation,
    random erasing, and mixup or cutmix, which pair the first view of a micro-batch with the last,
    and so on, with one coefficient for all.

    Args:
        settings: the config's group.
        seed: of the run.
        classes: C.
        depth: blocks L.
        drop_path: probability that the last block's branches are dropped.
        mean: mean of the network's input, pixels in [0, 1].
        std: standard deviation of the network's input.
    """

    def __init__(
        self,
        settings: Augment,
        *,
        seed: int,
        classes: int,
        depth: int,
        drop_path: float,
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ) -> None:
        self.settings = settings
        self.seed, self.classes = seed, classes
        self.depth, self.drop_path = depth, drop_path
        self.mean, self.std = mean, std
        self.fill = [round(255 * one) for one in mean]
        self.mixup = None
        if settings.mixup or settings.cutmix:
            self.mixup = Mixup(
                settings.mixup,
                settings.cutmix,
                label_smoothing=settings.smoothing,
                num_classes=classes,
            )

    def __call__(self, batch: Batch, labels: Tensor) -> Examples:
        """Augment a micro-batch.

        Args:
            batch: uint8 views of one size.
            labels: their classes, int64 ``[B]``, on the device.
        """
        settings, views = self.settings, batch.images[0]
        positions = positions_of(batch)
        if settings.magnitude is not None:
            views = randaugment(
                views,
                positions,
                seed=self.seed,
                magnitude=settings.magnitude,
                magnitude_std=settings.magnitude_std,
                fill=self.fill,
            )
        images = normalise_images(views, self.mean, self.std)
        erase(images, positions, self.seed, settings.erase)
        keep = branch_factors(self.seed, batch.position, self.depth, self.drop_path)
        if self.mixup is None:
            targets = mixup_target(labels, self.classes, 1.0, settings.smoothing)
            return Examples(images, keep, targets, batch.valid)
        with numpy_seeded(self.seed, int(positions[0])):
            images, targets = self.mixup(images, labels)
        return Examples(images, keep, targets, batch.valid & batch.valid.flip(0))


def erase(images: Tensor, positions: NDArray[np.int64], seed: int, chance: float) -> None:
    """Fill a rectangle of some views with noise, in place.

    Args:
        images: normalised, ``[B, 3, S, S]``.
        positions: of the views, on the host, ``[B]``.
        seed: of the run.
        chance: probability that a rectangle of a view is filled.

    Source: random erasing (arXiv 1708.04896), timm's rule in mode ``pixel``, as in MAE.
    """
    drawn = per_view(RECTANGLES, seed, positions, 1 + 4 * TRIES)
    height, width = images.shape[-2:]
    for image, position, row in zip(images, positions.tolist(), drawn.tolist(), strict=True):
        box = rectangle(row[1:], height, width) if row[0] < chance else None
        if box is not None:
            top, left, high, wide = box
            filled = noise(seed, position, (3, high, wide), images.device)
            image[:, top : top + high, left : left + wide] = filled


def rectangle(drawn: list[float], height: int, width: int) -> tuple[int, int, int, int] | None:
    """Choose top, left, height and width of a rectangle; ``None`` if no try fits.

    Args:
        drawn: four numbers in [0, 1) per try.
        height: of the image.
        width: of the image.
    """
    low, high = (math.log(one) for one in ASPECT)
    for share, aspect, down, right in zip(*(drawn[k::4] for k in range(4)), strict=True):
        area = height * width * (AREA[0] + (AREA[1] - AREA[0]) * share)
        ratio = math.exp(low + (high - low) * aspect)
        tall, wide = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if tall < height and wide < width:
            top, left = int(down * (height - tall + 1)), int(right * (width - wide + 1))
            return top, left, tall, wide
    return None


def cross_entropy(logits: Tensor, examples: Examples) -> dict[str, Tensor]:
    """Return the cross-entropy of logits ``[B, C]`` and soft targets as ``total``.

    It is a sum over valid rows, 0-dim float32.
    """
    rows = -(examples.targets * torch.log_softmax(logits.float(), -1)).sum(-1)
    return {"total": (rows * examples.valid).sum()}
