"""Sample the crop of a view with torchvision's distribution, as a pure function.

Only additions, products, quotients, square roots and roundings happen at run time: IEEE 754 fixes
their results everywhere. ``exp`` and ``log`` are not among them, so aspect ratios come from a table
that is computed with the ``decimal`` module.
"""

from decimal import ROUND_HALF_EVEN, Context, Decimal, localcontext
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dataloading.counters import fold, uniforms

Boxes = NDArray[np.int32]
Flips = NDArray[np.bool_]

ASPECTS = 4096
_TRIES = 10
_SALT = 0xC09


@lru_cache(maxsize=8)
def aspect_table(lowest: float, highest: float) -> NDArray[np.float64]:
    """Tabulate aspect ratios that are uniform in their logarithm.

    Args:
        lowest: smallest width / height, > 0.
        highest: largest width / height, >= ``lowest``.

    Returns:
        float64 ``[4096]``, ascending, read-only: the midpoints of equal steps of the logarithm,
        each correctly rounded, hence the same on every machine.
    """
    with localcontext(Context(prec=30, rounding=ROUND_HALF_EVEN)):
        start = Decimal(lowest).ln()
        step = (Decimal(highest).ln() - start) / ASPECTS
        middle = Decimal("0.5")
        table = np.array([float((start + step * (k + middle)).exp()) for k in range(ASPECTS)])
    table.setflags(write=False)
    return table


def crop_boxes(
    seed: int,
    sample_ids: ArrayLike,
    view_numbers: ArrayLike,
    widths: ArrayLike,
    heights: ArrayLike,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[Boxes, Flips]:
    """Choose crop box and flip of views.

    Ten tries at a box whose share of the area is uniform in ``scale`` and whose aspect ratio is
    log-uniform in ``ratio``; the first that fits is put at a uniform place. If none fits, the
    largest centred box with an allowed ratio.

    Args:
        seed: any integer.
        sample_ids: int64 ``[B]``.
        view_numbers: int64 ``[B]`` or a scalar: which view of that sample.
        widths: widths of the images, pixels, ``[B]``.
        heights: heights of the images, pixels, ``[B]``.
        scale: range of the share of the area, within ``(0, 1]``.
        ratio: range of width / height, > 0.

    Returns:
        (boxes ``[B, 4]`` int32 as x, y, w, h in pixels of that size; flips ``[B]`` bool, half of
        them true). A row depends on its own arguments only.

    Raises:
        ValueError: if a range is not as above, or an image has no pixels.

    Source: torchvision ``RandomResizedCrop.get_params``.
    """
    if not 0.0 < scale[0] <= scale[1] <= 1.0:
        raise ValueError(f"scale is {tuple(scale)}; expected 0 < low <= high <= 1")
    if not 0.0 < ratio[0] <= ratio[1]:
        raise ValueError(f"ratio is {tuple(ratio)}; expected 0 < low <= high")
    width = np.asarray(widths).astype(np.int64)  # [B]
    height = np.asarray(heights).astype(np.int64)
    if width.size and min(int(width.min()), int(height.min())) < 1:
        raise ValueError("an image has no pixels: widths and heights must be >= 1")

    base = np.broadcast_to(fold(_SALT, seed, sample_ids, view_numbers), width.shape)
    draws = uniforms(base, 4 * _TRIES + 1)
    shares, aspects, downs, rights = np.split(draws[:, :-1], 4, axis=1)  # [B, tries] each
    share = scale[0] + (scale[1] - scale[0]) * shares
    area = (width * height).astype(np.float64)[:, None] * share
    aspect = aspect_table(float(ratio[0]), float(ratio[1]))[(aspects * ASPECTS).astype(np.int64)]
    wide = np.rint(np.sqrt(area * aspect)).astype(np.int64)
    high = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    fits = (wide > 0) & (wide <= width[:, None]) & (high > 0) & (high <= height[:, None])

    row, first, found = np.arange(width.size), fits.argmax(axis=1), fits.any(axis=1)
    centre_w, centre_h = _largest(width, height, ratio)
    w = np.where(found, wide[row, first], centre_w)
    h = np.where(found, high[row, first], centre_h)
    x = np.floor(rights[row, first] * (width - w + 1)).astype(np.int64)
    y = np.floor(downs[row, first] * (height - h + 1)).astype(np.int64)
    x = np.where(found, x, (width - w) // 2)
    y = np.where(found, y, (height - h) // 2)
    return np.stack([x, y, w, h], axis=1).astype(np.int32), draws[:, -1] < 0.5


def centre_boxes(widths: ArrayLike, heights: ArrayLike, share: float) -> Boxes:
    """Cut the square in the middle: what is left after resizing the shorter side and cropping.

    Args:
        widths: pixels, ``[B]``.
        heights: pixels, ``[B]``.
        share: the square's side by the shorter side, in ``(0, 1]``; 224 / 256 is usual.

    Returns:
        Boxes ``[B, 4]`` int32 as x, y, w, h in pixels of that size.

    Raises:
        ValueError: if the share is not as above, or an image has no pixels.
    """
    if not 0.0 < share <= 1.0:
        raise ValueError(f"share is {share}; expected 0 < share <= 1")
    width = np.asarray(widths).astype(np.int64)
    height = np.asarray(heights).astype(np.int64)
    shorter = np.minimum(width, height)
    if shorter.size and int(shorter.min()) < 1:
        raise ValueError("an image has no pixels: widths and heights must be >= 1")
    side = np.maximum(np.rint(shorter * share).astype(np.int64), 1)
    return np.stack([(width - side) // 2, (height - side) // 2, side, side], 1).astype(np.int32)


def _largest(
    width: NDArray[np.int64], height: NDArray[np.int64], ratio: tuple[float, float]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the sides of the largest box with an allowed aspect ratio, at least one pixel each."""
    shape = width / height
    narrow = np.rint(height * ratio[1]).astype(np.int64)
    flat = np.rint(width / ratio[0]).astype(np.int64)
    w = np.where(shape > ratio[1], narrow, width)
    h = np.where(shape < ratio[0], flat, height)
    return np.clip(w, 1, width), np.clip(h, 1, height)
