"""A row of the index, and what makes an image fit for one."""

import logging
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dataloading.headers import HeaderError

logger = logging.getLogger(__name__)

ENTRY = np.dtype(
    [
        ("shard", "<u4"),  # file of the sample; 0 in a folder
        ("offset", "<u8"),  # bytes before it in that file; 0 in a folder
        ("size", "<u4"),  # bytes
        ("width", "<u2"),
        ("height", "<u2"),
        ("label", "<i4"),  # row of Index.labels; -1: none
        ("flags", "u1"),  # 0; unusable files are left out
    ]
)
EXTENSIONS = frozenset(
    (
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib"),
        *(".gif", ".tif", ".tiff", ".jp2", ".avif", ".ppm", ".pgm"),
    )
)
MAX_PIXELS = 100_000_000
PROGRESS_S = 10.0

_READERS = 8

Piece = TypeVar("Piece")
Result = TypeVar("Result")


class File(NamedTuple):
    """A file as it is listed; ``name`` is relative, with ``/``.

    ``fault`` says why it cannot be used whatever it holds: a link to nothing, a pipe, a folder that
    is named as an image.
    """

    name: str
    size: int
    mtime_ns: int
    fault: str | None = None


class Findings(NamedTuple):
    """What the examination of a data set found; the fields are those of ``Index``."""

    entries: NDArray[np.void]
    names: Sequence[str]
    labels: tuple[str, ...]
    left_out: tuple[tuple[str, str], ...]
    digest: str


class Examined(NamedTuple):
    """Pixels of an image, or why it cannot be used."""

    width: int
    height: int
    fault: str | None


def name_bytes(name: str) -> bytes:
    """Return a name as the bytes that digests are taken of; any file name has them."""
    return name.encode("utf-8", "surrogateescape")


def examine(size: int, measure: Callable[[], tuple[int, int]], max_pixels: int) -> Examined:
    """Decide whether an image can be a row of the index.

    Args:
        size: bytes.
        measure: returns (width, height) or raises ``HeaderError``.
        max_pixels: largest allowed width x height.

    Returns:
        Width and height, or zeros and a short reason without a path.

    Raises:
        OSError: if ``measure`` does.
    """
    if size == 0:
        return Examined(0, 0, "empty file")
    if size >= 1 << 32:
        return Examined(0, 0, f"{size} bytes are 4 GiB or more")
    try:
        width, height = measure()
    except HeaderError as error:
        return Examined(0, 0, str(error))
    if max(width, height) >= 1 << 16:
        return Examined(0, 0, f"{width} x {height}: a side is 65536 pixels or more")
    if width * height > max_pixels:
        return Examined(0, 0, f"{width} x {height} has more than {max_pixels} pixels (max_pixels)")
    return Examined(width, height, None)


def in_threads(
    work: Callable[[Piece], Result],
    pieces: Sequence[Piece],
    progress: Callable[[Sequence[Result]], str],
) -> list[Result]:
    """Examine pieces of a data set in threads, and tell the log now and then how far it is.

    Args:
        work: examines one piece.
        pieces: all pieces.
        progress: makes a message of the results so far.

    Returns:
        The results, in the order of ``pieces``.
    """
    Image.init()
    results: list[Result] = []
    told = time.monotonic()
    with warnings.catch_warnings(), ThreadPoolExecutor(_READERS) as pool:
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # max_pixels decides
        for result in pool.map(work, pieces):
            results.append(result)
            if time.monotonic() - told >= PROGRESS_S:
                told = time.monotonic()
                logger.info("%s", progress(results))
    return results
