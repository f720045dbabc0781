"""Rows of the index, and the rules for images that get a row."""

import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dataloading.headers import LACKED, Header, HeaderError
from dataloading.progress import progress_bar

ENTRY = np.dtype(
    [
        ("shard", "<u4"),  # file of the sample; 0 in a folder
        ("offset", "<u8"),  # bytes before it in that file; 0 in a folder
        ("size", "<u4"),  # bytes
        ("width", "<u2"),
        ("height", "<u2"),
        ("label", "<i4"),  # row of Index.labels; -1: none
        ("flags", "u1"),  # bits 0 to 2: EXIF orientation - 1; bit 3: pixels are turned by it
    ]
)
EXTENSIONS = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib"}
    | {".gif", ".tif", ".tiff", ".jp2", ".avif", ".ppm", ".pgm"}
)
MAX_PIXELS = 100_000_000
READERS = 8
"""Threads that read the headers of files."""
UNREADABLE = "cannot be read: "
"""Prefix of the reason for a file that the operating system could not read."""
NO_LABEL = "its image has no label"
"""Suffix of the reason for a label that cannot be used."""
SECOND_CLASS = "a second class of its sample; the first is used"
SIDEWAYS = 5
"""First of the EXIF orientations that exchange width and height."""

_ORIENTATION, _TURNED = 7, 8  # of the flags

Piece = TypeVar("Piece")
Result = TypeVar("Result")


class File(NamedTuple):
    """A listed file; ``name`` is relative, with ``/``.

    ``fault`` is why the file cannot be used whatever its content: a dangling link, a pipe, a folder
    with an image's extension.
    """

    name: str
    size: int
    mtime_ns: int
    fault: str | None = None


Kind = Literal[
    "file", "beside", "hidden", "key", "second", "label", "link", "empty", "null", "path"
]
"""file: no known extension; beside: a document, or of the same name as an image; hidden: its name
begins with a dot; key: an image in a tar with a dot in its key; second: the same, beside an image
of its sample; label: a text beside an image in a tar that has no ``.cls`` member; link: in a tar, a
link or a device that is named like an image; empty: an empty folder; null: a row of a Parquet file
whose image is null; path: a row that has the path of an image and not its bytes."""


class Passed(NamedTuple):
    """Files or tar members of one kind and extension that the index passes over.

    Attributes:
        kind: why, see ``Kind``.
        extension: in lower case with its dot; empty where there is none.
        number: of files or members.
        first: the first name in order.
    """

    kind: Kind
    extension: str
    number: int
    first: str


class Findings(NamedTuple):
    """Result of examining a data set; the fields are those of ``Index``, in its order."""

    entries: NDArray[np.void]
    names: Sequence[str]
    labels: tuple[str, ...]
    excluded: tuple[tuple[str, str], ...]
    digest: str
    passed_over: tuple[Passed, ...] = ()
    row_group: tuple[int, str] | None = None


class Examined(NamedTuple):
    """Width, height and flags of an image's row, or the reason why it is excluded."""

    width: int
    height: int
    fault: str | None
    flags: int = 0


def encode_name(name: str) -> bytes:
    """Encode any file name for a digest."""
    return name.encode("utf-8", "surrogateescape")


def orientations(flags: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the EXIF orientations by which pixels are turned, 1 to 8; 1: left as stored."""
    return np.where(flags & _TURNED, (flags & _ORIENTATION) + 1, 1).astype(np.uint8)


def orientation_of(flags: int) -> int:
    """Return the EXIF orientation of one row."""
    return (flags & _ORIENTATION) + 1 if flags & _TURNED else 1


def turns_bytes(entries: NDArray[np.void]) -> bytes:
    """Return the turns of all rows as bytes for a digest; empty where no image is turned."""
    turns = orientations(entries["flags"])
    return b"turned\n" + turns.tobytes() if (turns > 1).any() else b""


def count_turned(flags: NDArray[np.uint8]) -> tuple[int, int]:
    """Count images that are turned, and images whose orientation is recorded and not applied."""
    turned = int(np.count_nonzero(flags & _TURNED))
    return turned, int(np.count_nonzero(flags & _ORIENTATION)) - turned


def examine(
    size: int, measure: Callable[[], Header], max_pixels: int, exif_orientation: bool
) -> Examined:
    """Decide whether an image gets a row of the index.

    Args:
        size: bytes.
        measure: returns the header or raises ``HeaderError``.
        max_pixels: largest allowed width x height.
        exif_orientation: whether the image is turned by its EXIF orientation.

    Returns:
        Width and height as the image is used, or zeros and a short reason without a path.

    Raises:
        OSError: if ``measure`` does.
    """
    if size == 0:
        return Examined(0, 0, "empty file")
    if size >= 1 << 32:
        return Examined(0, 0, f"{size} bytes are 4 GiB or more")
    try:
        width, height, orientation = measure()
    except HeaderError as error:
        return Examined(0, 0, str(error))
    if max(width, height) >= 1 << 16:
        return Examined(0, 0, f"{width} x {height}: a side is 65536 pixels or more")
    if width * height > max_pixels:
        return Examined(0, 0, f"{width} x {height} has more than {max_pixels} pixels (max_pixels)")
    flags = orientation - 1
    if flags and exif_orientation:
        flags |= _TURNED
        width, height = (height, width) if orientation >= SIDEWAYS else (width, height)
    return Examined(width, height, None, flags)


def depends_on_machine(reason: str) -> bool:
    """Return whether an image was excluded because permissions or a decoder are missing.

    A later launch may use it, though name, size and time of its file are unchanged.
    """
    return reason.startswith(UNREADABLE) or LACKED in reason


def concerns_label(reason: str) -> bool:
    """Return whether a reason concerns only a label; its image is used."""
    return reason.endswith(NO_LABEL) or reason == SECOND_CLASS


def map_in_threads(
    work: Callable[[Piece], Result],
    pieces: Sequence[Piece],
    sizes: Sequence[int],
    unit: str,
    threads: int,
) -> list[Result]:
    """Examine pieces of a data set in threads; return the results in the order of the pieces.

    Progress is shown in units; ``sizes`` has the number of units per piece.
    """
    Image.init()
    results: list[Result] = []
    with (
        warnings.catch_warnings(),
        ThreadPoolExecutor(threads) as pool,
        progress_bar("indexing", sum(sizes), unit) as report_done,
    ):
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # max_pixels decides
        done = 0
        for result, size in zip(pool.map(work, pieces), sizes, strict=True):
            results.append(result)
            done += size
            report_done(done)
    return results
