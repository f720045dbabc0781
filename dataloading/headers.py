"""Width and height of an encoded picture without decoding it."""

import io
import struct
from pathlib import Path
from typing import BinaryIO

from PIL import Image

PIL_ERRORS = (
    OSError,  # also UnidentifiedImageError and truncated files
    SyntaxError,  # damaged PNG chunks
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    struct.error,
    Image.DecompressionBombError,
)
"""What Pillow raises for damaged input; anything else is a fault of the program."""

_SOI = b"\xff\xd8"
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_BARE = frozenset(range(0xD0, 0xD8)) | {0x01}
_PREFIXES = (2048, 65536, -1)  # bytes; the size of most JPEGs stands in the first 2 kB


class HeaderError(ValueError):
    """No width and height can be read; the message is a short reason without a path."""


class _Short(HeaderError):
    """The bytes end before the frame header."""


def size_of_file(path: Path) -> tuple[int, int]:
    """Read width and height of an image file.

    Args:
        path: the file.

    Returns:
        (width, height) as stored, in pixels, both >= 1; EXIF orientation is not applied.

    Raises:
        HeaderError: if it is not a readable image.
        OSError: if the file cannot be read.
    """
    with path.open("rb") as file:
        data = b""
        for prefix in _PREFIXES:
            data += file.read(prefix - len(data) if prefix > 0 else -1)
            if not data.startswith(_SOI):
                file.seek(0)
                return _pil_size(file)
            try:
                return _jpeg_size(data)
            except _Short:
                if len(data) < prefix:
                    raise
    raise _Short("JPEG ends before its frame header")


def size_of_bytes(data: bytes) -> tuple[int, int]:
    """Read width and height of an encoded picture in memory.

    Args:
        data: the whole encoded picture.

    Returns:
        (width, height) as in ``size_of_file``.

    Raises:
        HeaderError: if it is not a readable image.
    """
    return _jpeg_size(data) if data.startswith(_SOI) else _pil_size(io.BytesIO(data))


def _pil_size(file: BinaryIO) -> tuple[int, int]:
    try:
        with Image.open(file) as image:
            width, height = image.size
    except Image.DecompressionBombError as error:
        raise HeaderError(f"too many pixels for Pillow: {error}") from error
    except Image.UnidentifiedImageError as error:
        raise HeaderError("not an image of a known format") from error
    except PIL_ERRORS as error:
        raise HeaderError(f"header cannot be read: {error}") from error
    return _checked(width, height)


def _jpeg_size(data: bytes) -> tuple[int, int]:
    """Walk the markers up to the frame header (ITU-T T.81, annex B)."""
    at = len(_SOI)
    while True:
        if at + 2 > len(data):
            raise _Short("JPEG ends before its frame header")
        if data[at] != 0xFF:
            raise HeaderError("JPEG marker expected, other bytes found")
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
        elif marker in _BARE:
            at += 2
        elif marker in _FRAMES:
            if at + 9 > len(data):
                raise _Short("JPEG ends before its frame header")
            height, width = struct.unpack_from(">HH", data, at + 5)
            return _checked(width, height)
        elif marker in (0xD9, 0xDA):
            raise HeaderError("JPEG has no frame header")
        else:
            if at + 4 > len(data):
                raise _Short("JPEG ends before its frame header")
            at += 2 + struct.unpack_from(">H", data, at + 2)[0]


def _checked(width: int, height: int) -> tuple[int, int]:
    if width < 1 or height < 1:
        raise HeaderError(f"header says {width} x {height} pixels")
    return width, height
