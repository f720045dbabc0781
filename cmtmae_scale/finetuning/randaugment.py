"""RandAugment on uint8 pictures, on the device: timm's operations by torchvision's functions.

Source: RandAugment (arXiv 1909.13719) as timm's ``rand-m9-mstd0.5-inc1``, MAE's recipe: two of 15
operations, each with chance 1/2, stronger with the level. Deviations: pictures are moved with
bilinear interpolation, for torchvision has no bicubic one for tensors; one bit of each grey level
is left at the highest level, where timm leaves none.
"""

from collections.abc import Callable, Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from cmtmae_scale.finetuning.draws import OPERATIONS, per_view

NUM_OPERATIONS = 2
CHANCE = 0.5
HIGHEST = 10.0
"""Level at which an operation is strongest."""
DRAWS = 4
"""Numbers an operation: which, whether, strength, sign."""

Fill = Sequence[float]
Operation = Callable[[Tensor, float, float, Fill], Tensor]
"""From a uint8 picture ``[3, S, S]``, a level in [0, 10], a sign and a colour for what lies outside
to a picture of the same kind."""


def affine(
    image: Tensor,
    fill: Fill,
    *,
    angle: float = 0.0,
    shift: Sequence[float] = (0, 0),
    shear: Sequence[float] = (0.0, 0.0),
    center: list[float] | None = None,
) -> Tensor:
    """Move a picture."""
    return F.affine(
        image,
        angle=angle,
        translate=list(shift),
        scale=1.0,
        shear=list(shear),
        interpolation=InterpolationMode.BILINEAR,
        fill=list(fill),
        center=center,
    )


def slant(level: float, sign: float) -> float:
    """Angle of a shear, degrees."""
    return float(np.degrees(np.arctan(sign * 0.3 * level / HIGHEST)))


def factor(level: float, sign: float) -> float:
    """Factor of colour, contrast, brightness and sharpness; 1 changes nothing."""
    return max(0.1, 1.0 + sign * 0.9 * level / HIGHEST)


def solarize(image: Tensor, level: float) -> Tensor:
    """Invert what is bright; the higher the level, the more."""
    threshold = 256 - min(256, int(256 * level / HIGHEST))
    return image if threshold > 255 else F.solarize(image, threshold)


def solarize_add(image: Tensor, level: float) -> Tensor:
    """Brighten what is dark."""
    return image.where(image >= 128, image + min(128, int(110 * level / HIGHEST)))


OPERATIONS_BY_NAME: dict[str, Operation] = {
    "AutoContrast": lambda image, level, sign, fill: F.autocontrast(image),
    "Equalize": lambda image, level, sign, fill: F.equalize(image),
    "Invert": lambda image, level, sign, fill: F.invert(image),
    "Rotate": lambda image, level, sign, fill: affine(image, fill, angle=sign * 3.0 * level),
    "Posterize": lambda image, level, sign, fill: F.posterize(
        image, max(1, 4 - int(4 * level / HIGHEST))
    ),
    "Solarize": lambda image, level, sign, fill: solarize(image, level),
    "SolarizeAdd": lambda image, level, sign, fill: solarize_add(image, level),
    "Color": lambda image, level, sign, fill: F.adjust_saturation(image, factor(level, sign)),
    "Contrast": lambda image, level, sign, fill: F.adjust_contrast(image, factor(level, sign)),
    "Brightness": lambda image, level, sign, fill: F.adjust_brightness(image, factor(level, sign)),
    "Sharpness": lambda image, level, sign, fill: F.adjust_sharpness(image, factor(level, sign)),
    "ShearX": lambda image, level, sign, fill: affine(
        image, fill, shear=(slant(level, sign), 0.0), center=[0.0, 0.0]
    ),
    "ShearY": lambda image, level, sign, fill: affine(
        image, fill, shear=(0.0, slant(level, sign)), center=[0.0, 0.0]
    ),
    "TranslateX": lambda image, level, sign, fill: affine(
        image, fill, shift=(sign * 0.45 * level / HIGHEST * image.shape[-1], 0.0)
    ),
    "TranslateY": lambda image, level, sign, fill: affine(
        image, fill, shift=(0.0, sign * 0.45 * level / HIGHEST * image.shape[-2])
    ),
}
NAMES = tuple(OPERATIONS_BY_NAME)


def randaugment(
    images: Tensor,
    positions: NDArray[np.int64],
    *,
    seed: int,
    magnitude: float,
    magnitude_std: float,
    fill: Fill,
) -> Tensor:
    """Apply each view's own operations.

    Args:
        images: uint8 ``[B, S, S, 3]``, as the loader gives them; not changed.
        positions: of the views, on the host, ``[B]``.
        seed: of the run.
        magnitude: mean level, in [0, 10].
        magnitude_std: deviation of the level from operation to operation.
        fill: colour of what comes from outside a picture, 0 to 255.

    Returns:
        uint8 ``[B, S, S, 3]``. A view depends on its own position only.
    """
    drawn = per_view(OPERATIONS, seed, positions, NUM_OPERATIONS * DRAWS)
    changed = images.clone()
    for view, row in zip(changed, drawn.reshape(-1, NUM_OPERATIONS, DRAWS).tolist(), strict=True):
        for which, whether, strength, sign in row:
            if whether < CHANCE:
                level = magnitude
                if magnitude_std:
                    level = NormalDist(magnitude, magnitude_std).inv_cdf(max(strength, 2.0**-54))
                level = min(max(level, 0.0), HIGHEST)
                operation = OPERATIONS_BY_NAME[NAMES[int(which * len(NAMES))]]
                moved = operation(view.permute(2, 0, 1), level, 1.0 if sign < 0.5 else -1.0, fill)
                view.copy_(moved.permute(1, 2, 0))
    return changed
