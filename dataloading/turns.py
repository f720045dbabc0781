"""EXIF orientation: from the stored image to the upright one.

An orientation is 1 to 8 (EXIF 2.3, tag 274): the place of the stored image's first row and column
in the upright image. From 5 on rows become columns. Every decoder returns pixels as stored; a view
is cut there, and the crop is turned, which gives the same pixels as cutting the turned image.
"""

from collections.abc import Sequence

from torch import Tensor

from dataloading.entries import SIDEWAYS

Box = tuple[int, int, int, int]
"""x, y, w, h in pixels."""

_FROM_RIGHT = frozenset({2, 3, 7, 8})
"""Orientations whose stored columns run from the end, seen in the upright image."""
_FROM_BOTTOM = frozenset({3, 4, 6, 7})
"""Orientations whose stored rows run from the end."""


def turn_pixels(image: Tensor, orientation: int) -> Tensor:
    """Turn stored pixels ``[..., height, width]`` upright; a view, not a copy."""
    if orientation in _FROM_BOTTOM:
        image = image.flip(-2)
    if orientation in _FROM_RIGHT:
        image = image.flip(-1)
    return image.mT if orientation >= SIDEWAYS else image


def turn_box(box: Sequence[int], width: int, height: int, orientation: int) -> Box:
    """Return a box of the upright image as a box of the stored image.

    Args:
        box: x, y, w, h in pixels of the upright image.
        width: of the stored image, pixels.
        height: of the stored image, pixels.
        orientation: 1 to 8.

    Returns:
        x, y, w, h in stored pixels.
    """
    x, y, w, h = box
    if orientation >= SIDEWAYS:
        x, y, w, h = y, x, h, w
    if orientation in _FROM_RIGHT:
        x = width - x - w
    if orientation in _FROM_BOTTOM:
        y = height - y - h
    return x, y, w, h
