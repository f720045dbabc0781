"""RandAugment on uint8 images, on the device: timm's operations as torchvision computes them.

Images with the same operation are processed together, each at its own level: a GPU runs some
hundred kernels per micro-batch instead of thousands. On a CPU the result is bit for bit that of
torchvision's functions on one image after the other.

Source: RandAugment (arXiv 1909.13719) as timm's ``rand-m9-mstd0.5-inc1``, MAE's recipe: two of 15
operations, each with probability 1/2, stronger with the level. Differences: geometric operations
interpolate bilinearly, because torchvision has no bicubic interpolation for tensors; ``Posterize``
keeps one bit at the highest level, where timm keeps none.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from statistics import NormalDist

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import conv2d, grid_sample
from torchvision.transforms.v2 import functional as F

from cmtmae_scale.finetuning.draws import OPERATIONS, per_view
from dataloading.reading import to_device

NUM_OPERATIONS = 2
CHANCE = 0.5
HIGHEST = 10.0
"""Level at which an operation is strongest."""
DRAWS = 4
"""Numbers per operation: which, whether, strength, sign."""

Fill = Sequence[float]
Moves = Sequence[tuple[float, float]]
"""Level in [0, 10] and sign of each image."""
Operation = Callable[[Tensor, Moves], Tensor]
"""From uint8 images ``[n, 3, S, S]`` with levels and signs to images of the same kind."""


def slant(level: float, sign: float) -> float:
    """Return the angle of a shear, degrees."""
    return float(np.degrees(np.arctan(sign * 0.3 * level / HIGHEST)))


def factor(level: float, sign: float) -> float:
    """Return the factor of colour, contrast, brightness and sharpness; 1 changes nothing."""
    return max(0.1, 1.0 + sign * 0.9 * level / HIGHEST)


def column(values: Iterable[float], images: Tensor) -> Tensor:
    """Return a number per image, float32 ``[n, 1, 1, 1]`` on the images' device."""
    numbers = torch.tensor(list(values), dtype=torch.float32)
    return to_device(numbers, images.device).view(-1, 1, 1, 1)


def add_scaled(base: Tensor, other: Tensor, scale: Tensor) -> Tensor:
    """Return ``base + scale * other``, rounded once as by ``torch.add`` with one scale for all."""
    return (base.double() + scale.double() * other.double()).float()


def to_bytes(images: Tensor) -> Tensor:
    """Clamp to 0 to 255, in place, and return the integer parts as uint8."""
    return images.clamp_(0, 255).to(torch.uint8)


def brightness(images: Tensor, moves: Moves) -> Tensor:
    """Scale pixel values."""
    return to_bytes(images * column((factor(*move) for move in moves), images))


def blend(images: Tensor, other: Tensor, moves: Moves) -> Tensor:
    """Blend images with others, which are float32."""
    factors = [factor(*move) for move in moves]
    rest = column((1.0 - one for one in factors), images)
    return to_bytes(add_scaled(images * column(factors, images), other, rest))


def grey(images: Tensor) -> Tensor:
    """Return the grey levels as whole numbers, float32 ``[n, 1, S, S]``."""
    red, green, blue = images.unbind(-3)
    levels = red.mul(0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114)
    return levels.unsqueeze(-3).floor_()


def contrast(images: Tensor, moves: Moves) -> Tensor:
    """Scale the distance from each image's mean grey level."""
    # Image by image: the order of a sum may depend on the number of images.
    means = torch.stack([one.mean(dim=(-3, -2, -1), keepdim=True) for one in grey(images)])
    return blend(images, means, moves)


def sharpness(images: Tensor, moves: Moves) -> Tensor:
    """Scale the distance from the smoothed image; the border is unchanged."""
    kernel = images.new_full((3, 3), 1 / 13, dtype=torch.float32)
    kernel[1, 1] = 5 / 13
    sharp = images.float()
    inner = sharp[..., 1:-1, 1:-1]
    smooth = conv2d(sharp, kernel.expand(3, 1, 3, 3), groups=3).round_()
    rest = column((1.0 - factor(*move) for move in moves), images)
    inner.copy_(add_scaled(inner, smooth - inner, rest))
    return to_bytes(sharp)


def posterize(images: Tensor, moves: Moves) -> Tensor:
    """Keep the highest bits: the higher the level, the fewer bits."""
    bits = [max(1, 4 - int(4 * level / HIGHEST)) for level, _ in moves]
    return images & column((256 - (256 >> one) for one in bits), images).to(torch.uint8)


def solarize(images: Tensor, moves: Moves) -> Tensor:
    """Invert values at or above a threshold, which falls with the level."""
    thresholds = [256 - min(256, int(256 * level / HIGHEST)) for level, _ in moves]
    return torch.where(images >= column(thresholds, images), ~images, images)


def solarize_add(images: Tensor, moves: Moves) -> Tensor:
    """Brighten dark values by an amount that grows with the level."""
    added = column((min(128, int(110 * level / HIGHEST)) for level, _ in moves), images)
    return images.where(images >= 128, images + added.to(torch.uint8))


def matrix(
    angle: float = 0.0,
    shift: Sequence[float] = (0.0, 0.0),
    shear: Sequence[float] = (0.0, 0.0),
    center: Sequence[float] = (0.0, 0.0),
) -> list[float]:
    """Return the affine map from output to input pixels: two rows of three numbers.

    Coordinates, also those of ``center``, are in pixels from the middle of the image.

    Source: torchvision's ``affine``.
    """
    turn, (x, y) = math.radians(angle), center
    sx, sy = (math.radians(one) for one in shear)
    a, c = math.cos(turn - sy) / math.cos(sy), math.sin(turn - sy) / math.cos(sy)
    b, d = -(a * math.tan(sx) + math.sin(turn)), math.cos(turn) - c * math.tan(sx)
    tx, ty = x + shift[0], y + shift[1]
    return [d, -b, x - d * tx + b * ty, -c, a, y + c * tx - a * ty]


Matrix = Callable[[float, float, int], list[float]]
"""From level, sign and side of an image to its ``matrix``."""
MOVES: dict[str, Matrix] = {
    "Rotate": lambda level, sign, side: matrix(angle=sign * 3.0 * level),
    "ShearX": lambda level, sign, side: matrix(
        shear=(slant(level, sign), 0.0), center=(-side / 2, -side / 2)
    ),
    "ShearY": lambda level, sign, side: matrix(
        shear=(0.0, slant(level, sign)), center=(-side / 2, -side / 2)
    ),
    "TranslateX": lambda level, sign, side: matrix(
        shift=(sign * 0.45 * level / HIGHEST * side, 0.0)
    ),
    "TranslateY": lambda level, sign, side: matrix(
        shift=(0.0, sign * 0.45 * level / HIGHEST * side)
    ),
}


def move(images: Tensor, matrices: Sequence[list[float]], fill: Fill) -> Tensor:
    """Transform images, each by its own ``matrix``, with bilinear interpolation."""
    side, device = images.shape[-1], images.device
    theta = to_device(torch.tensor(matrices, dtype=torch.float32), device).view(-1, 2, 3)
    line = torch.linspace((1.0 - side) * 0.5, (side - 1.0) * 0.5, steps=side, device=device)
    across, down = line.expand(side, side), line[:, None].expand(side, side)
    place = torch.stack([across, down, torch.ones_like(across)], dim=-1).view(1, -1, 3)
    grid = place.expand(len(images), -1, -1).bmm(theta.mT / (0.5 * side))
    framed = torch.cat([images.float(), torch.ones_like(images[:, :1]).float()], dim=1)
    moved = grid_sample(framed, grid.view(-1, side, side, 2), align_corners=False)
    inside, colour = moved[:, 3:], column(fill, images).view(1, 3, 1, 1)
    return moved[:, :3].sub(colour).mul_(inside).add_(colour).round_().to(torch.uint8)


COLOURS: dict[str, Operation] = {
    "AutoContrast": lambda images, moves: F.autocontrast(images),
    "Equalize": lambda images, moves: F.equalize(images),
    "Invert": lambda images, moves: ~images,
    "Posterize": posterize,
    "Solarize": solarize,
    "SolarizeAdd": solarize_add,
    "Color": lambda images, moves: blend(images, grey(images), moves),
    "Contrast": contrast,
    "Brightness": brightness,
    "Sharpness": sharpness,
}
NAMES = (
    *("AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd"),
    *("Color", "Contrast", "Brightness", "Sharpness", "ShearX", "ShearY"),
    *("TranslateX", "TranslateY"),
)
"""Operations in timm's order, which numbers them in draws."""


def operate(images: Tensor, names: Sequence[str], moves: Moves, fill: Fill) -> Tensor:
    """Apply to each image its own operation.

    Args:
        images: uint8 ``[n, 3, S, S]``; not changed.
        names: names of the n operations.
        moves: level and sign of each.
        fill: colour of pixels from outside an image, 0 to 255.
    """
    groups: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        groups.setdefault("move" if name in MOVES else name, []).append(place)
    order = torch.tensor([place for places in groups.values() for place in places])
    parts = to_device(order, images.device).split([len(places) for places in groups.values()])
    changed = images.clone()
    for (group, places), part in zip(groups.items(), parts, strict=True):
        some, theirs = images[part], [moves[place] for place in places]
        if group == "move":
            side = images.shape[-1]
            matrices = [MOVES[names[k]](*moves[k], side) for k in places]
            changed[part] = move(some, matrices, fill)
        else:
            changed[part] = COLOURS[group](some, theirs)
    return changed


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
        images: uint8 ``[B, S, S, 3]``, as the loader returns them; not changed.
        positions: of the views, on the host, ``[B]``.
        seed: of the run.
        magnitude: mean level, in [0, 10].
        magnitude_std: standard deviation of the level over operations.
        fill: colour of pixels from outside an image, 0 to 255.

    Returns:
        uint8 ``[B, S, S, 3]``. A view depends on its own position only.
    """
    drawn = per_view(OPERATIONS, seed, positions, NUM_OPERATIONS * DRAWS)
    changed = images.permute(0, 3, 1, 2).contiguous()
    for number in range(NUM_OPERATIONS):
        rows: list[list[float]] = drawn[:, number * DRAWS : (number + 1) * DRAWS].tolist()
        chosen = [place for place, row in enumerate(rows) if row[1] < CHANCE]
        if not chosen:
            continue
        names = [NAMES[int(rows[place][0] * len(NAMES))] for place in chosen]
        moves = [
            (
                level_of(rows[place][2], magnitude, magnitude_std),
                1.0 if rows[place][3] < 0.5 else -1.0,
            )
            for place in chosen
        ]
        where = to_device(torch.tensor(chosen), images.device)
        changed[where] = operate(changed[where], names, moves, fill)
    return changed.permute(0, 2, 3, 1).contiguous()


def level_of(drawn: float, magnitude: float, magnitude_std: float) -> float:
    """Return the level of an operation from its draw in [0, 1)."""
    if magnitude_std:
        magnitude = NormalDist(magnitude, magnitude_std).inv_cdf(max(drawn, 2.0**-54))
    return min(max(magnitude, 0.0), HIGHEST)
