"""Detect duplicates, and pixel values that suggest that an image was written incorrectly."""

import hashlib
import io
from collections.abc import Sequence
from math import isqrt
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor

from dataloading.headers import PIL_ERRORS, is_common, open_image

Digests = NDArray[np.uint64]

_SAMPLED = 1 << 16  # pixels per image that are counted
_TAIL = 0.005  # of the pixels at either end do not count for the spread
_NEAR = 20  # levels of 255
_SATURATED = 0.9  # of the values
_BITS = 258  # a tag of TIFF


class Survey(NamedTuple):
    """Findings of decoding a data set, beside its faults.

    Attributes:
        suspect: (row of the index, reason) of constant, near-constant and saturated images.
        duplicates: rows of the same bytes, ascending; one tuple per group.
        scaled: number of images of more than 8 bits per channel, which are scaled to 8.
    """

    suspect: list[tuple[int, str]]
    duplicates: list[tuple[int, ...]]
    scaled: int


def find_suspect_values(image: Tensor) -> str | None:
    """Return why the values of an image are suspect, ``None`` if they are not.

    Args:
        image: uint8 ``[3, height, width]``.
    """
    stride = max(1, isqrt(image[0].numel() // _SAMPLED))
    sampled = image[:, ::stride, ::stride].reshape(3, -1).numpy()
    counts = np.stack([np.bincount(channel, minlength=256) for channel in sampled])
    shares = np.cumsum(counts, axis=1) / sampled.shape[1]
    spread = int(((shares < 1 - _TAIL).sum(1) - (shares <= _TAIL).sum(1)).max())
    if spread <= _NEAR:
        lowest, highest = image.amin((1, 2)), image.amax((1, 2))
        if lowest.equal(highest):
            red, green, blue = (int(value) for value in lowest)
            return f"constant: every pixel is ({red}, {green}, {blue})"
        return f"near-constant: 99 % of the pixels lie within {spread} levels of 255"
    saturated = counts[:, [0, 255]].sum() / counts.sum()
    if saturated >= _SATURATED:
        return f"saturated: {saturated:.0%} of the values are 0 or 255"
    return None


def is_scaled(data: bytes) -> bool:
    """Return whether a decodable image has more than 8 bits per channel, which are scaled to 8."""
    if data.startswith(b"\x89PNG"):
        return data[24] == 16
    if is_common(data):
        return False
    try:
        with open_image(io.BytesIO(data)) as image:
            if isinstance(image, TiffImageFile):
                return max(image.tag_v2.get(_BITS, (1,))) > 8
            return image.mode.startswith("I")
    except PIL_ERRORS:
        return False


def digest_bytes(data: bytes) -> Digests:
    """Hash bytes to two numbers; different bytes have different numbers."""
    return np.frombuffer(hashlib.blake2b(data, digest_size=16).digest(), dtype=np.uint64)


def find_duplicates(rows: Sequence[int], digests: Digests) -> list[tuple[int, ...]]:
    """Group rows of equal digests ``[n, 2]``; rows are ascending."""
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable
    ordered = digests[order]
    starts = np.flatnonzero(np.r_[True, (ordered[1:] != ordered[:-1]).any(1)])
    ends = np.r_[starts[1:], len(order)]
    repeated = [(a, b) for a, b in zip(starts.tolist(), ends.tolist(), strict=True) if b > a + 1]
    return sorted(tuple(rows[int(i)] for i in order[a:b]) for a, b in repeated)
