"""Width, height and orientation of an encoded image without decoding it."""

import contextlib
import io
import os
import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from PIL import Image, TiffImagePlugin, features

from dataloading.files import Readable, open_regular, read_at

_FORMATS = ["JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "JPEG2000", "PPM", "AVIF"]
"""Formats that Pillow may try. Its other formats include documents, some of which run a program."""
PIL_ERRORS = (
    OSError,  # also UnidentifiedImageError and truncated files
    SyntaxError,  # damaged PNG chunks
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    AttributeError,
    OverflowError,
    ZeroDivisionError,
    RuntimeError,  # of AVIF
    struct.error,
    Image.DecompressionBombError,
)
"""What Pillow raises for damaged input; anything else is a fault of the program."""

LACKED = "which this Pillow lacks"
"""Part of the message of a ``HeaderError`` that another version of Pillow would not raise."""

_SOI = b"\xff\xd8"
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_SEQUENTIAL = frozenset({0xC0, 0xC1})
_APP1 = 0xE1
_BARE = frozenset(range(0xD0, 0xD8)) | {0x01}
_EXIF = b"Exif\0\0"
_ORIENTATION = 274  # a tag of TIFF, and so of EXIF
_SOS = b"\xff\xda"
MAX_SCANS = 100
"""Most scans of a JPEG that is decoded; programs write about a dozen at most."""
_PREFIXES = (2048, 65536, -1)  # bytes; most JPEGs have their size in the first 2 kB


class Header(NamedTuple):
    """Width and height as stored, in pixels, both >= 1, and the EXIF orientation, 1 to 8."""

    width: int
    height: int
    orientation: int


class HeaderError(ValueError):
    """Width and height cannot be read; the message is a short reason without a path."""


class _Short(HeaderError):
    """The bytes end before the frame header."""


class _Stray(HeaderError):
    """Bytes between two segments belong to no segment; decoders skip them with a warning."""


def header_of_file(path: Path) -> Header:
    """Read the header of an image file.

    Raises:
        HeaderError: if it is not a readable image.
        OSError: if the file cannot be read.
    """
    with open(open_regular(path), "rb") as file:
        return _header(file)


def size_of_bytes(data: bytes) -> tuple[int, int]:
    """Read width and height of a whole encoded image in memory.

    Returns:
        (width, height) as stored, in pixels, both >= 1; EXIF orientation is not applied.

    Raises:
        HeaderError: if it is not a readable image.
    """
    return header_of_bytes(data)[:2]


def header_of_bytes(data: bytes) -> Header:
    """Read the header of a whole encoded image in memory.

    Raises:
        HeaderError: if it is not a readable image.
    """
    return _header(io.BytesIO(data))


def header_of_range(source: int | Readable, offset: int, size: int) -> Header:
    """Read the header of an image of ``size`` bytes within an open file.

    Reads at given places only: the file's own position does not move.

    Raises:
        HeaderError: if it is not a readable image.
        OSError: if the file cannot be read.
    """
    with io.BufferedReader(_Range(source, offset, size), _PREFIXES[0]) as file:
        return _header(file)


def open_image(file: BinaryIO | io.BufferedReader) -> Image.Image:
    """Open an image with Pillow; nothing is decoded yet.

    Raises:
        PIL_ERRORS: if it is not a readable image of a known format.
    """
    Image.init()
    return Image.open(file, formats=[name for name in _FORMATS if name in Image.OPEN])


def has_avif() -> bool:
    """Return whether Pillow reads AVIF here."""
    return "avif" in features.modules and features.check_module("avif")


def is_common(data: bytes) -> bool:
    """Return whether encoded bytes are JPEG, PNG, WebP or BMP, which all libraries decode alike.

    The libraries read TIFF differently, and damaged JPEG 2000 ends the process in nvImageCodec 0.9:
    Pillow decodes these and all other formats.
    """
    return data.startswith((b"\xff\xd8", b"\x89PNG", b"RIFF", b"BM"))


class _Range(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, source: int | Readable, offset: int, size: int) -> None:
        self._source, self._offset, self._size, self._at = source, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        length = min(len(buffer), self._size - self._at)
        data = read_at(self._source, length, self._offset + self._at) if length > 0 else b""
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError("seek before the start")
        self._at = base + offset
        return self._at


def _header(file: BinaryIO | io.BufferedReader) -> Header:
    data = b""
    for prefix in _PREFIXES:
        data += file.read(prefix - len(data) if prefix > 0 else -1)
        if not data.startswith(_SOI):
            file.seek(0)
            return _pil_header(file)
        try:
            return _jpeg_header(data)
        except _Short:
            if len(data) < prefix:
                raise
        except _Stray as stray:
            file.seek(0)
            try:
                return _pil_header(file)
            except HeaderError:
                raise stray from None
    raise _Short("JPEG ends before its frame header")


def _pil_header(file: BinaryIO | io.BufferedReader) -> Header:
    try:
        with open_image(file) as image:
            width, height = image.size
            exif = image.info.get("exif") or _raw_profile(image.info)
            orientation = exif_orientation(exif) if isinstance(exif, bytes) else 1
            if isinstance(image, TiffImagePlugin.TiffImageFile):  # Pillow applies its tag
                width, height = image.tag_v2[256], image.tag_v2[257]
                orientation = _legal_orientation(image.tag_v2.get(_ORIENTATION))
    except Image.DecompressionBombError as error:
        raise HeaderError(f"too many pixels for Pillow: {error}") from error
    except Image.UnidentifiedImageError as error:
        raise HeaderError(f"not an image of a known format{_explain(file)}") from error
    except PIL_ERRORS as error:
        if isinstance(error, OSError) and error.errno is not None:  # storage's, not Pillow's
            raise
        raise HeaderError(f"header cannot be read: {error}") from error
    return _checked(width, height, orientation)


def _raw_profile(info: dict[Any, Any]) -> bytes | None:
    """Return the EXIF block that ImageMagick before version 7 writes as text into a PNG."""
    text = info.get("Raw profile type exif")
    with contextlib.suppress(ValueError):
        return bytes.fromhex("".join(text.split("\n")[3:])) if isinstance(text, str) else None
    return None


def explain_other_file(start: bytes) -> str:
    """Return what was downloaded in place of data, by its first bytes; empty if unknown."""
    start = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"version https://git-lfs", b"version https://hawser")):
        return " but a Git-LFS pointer: run git lfs pull where the data were cloned"
    if start.startswith((b"/annex/objects", b"../.git/annex", b".git/annex")):
        return " but a git-annex pointer: run git annex get where the data were cloned"
    if start.startswith((b"<!doctype html", b"<html")):
        return " but a web page: download the file itself"
    return ""


def _explain(file: BinaryIO | io.BufferedReader) -> str:
    """Name a format that Pillow may lack, or a file that is not an image; empty if unknown."""
    file.seek(0)
    start = file.read(256)
    if start.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return " (a TIFF whose channels or bits Pillow does not read: convert it to 8 bits)"
    if start[4:8] != b"ftyp":
        return explain_other_file(start)
    if start[8:12] in (b"avif", b"avis") and not has_avif():
        return f" (AVIF, {LACKED}: install Pillow 11.3 or later)"
    is_heic = start[8:12] in (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")
    return " (HEIC: convert it to JPEG)" if is_heic else ""


def _jpeg_header(data: bytes) -> Header:
    """Walk the markers up to the frame header (ITU-T T.81, annex B)."""
    at = len(_SOI)
    exif: bytes | None = None
    while True:
        if at + 2 > len(data):
            raise _Short("JPEG ends before its frame header")
        marker = data[at + 1]
        if data[at] != 0xFF or marker == 0:
            raise _Stray("JPEG marker expected, other bytes found")
        if marker == 0xFF:  # fill byte
            at += 1
        elif marker in _BARE:
            at += 2
        elif marker in _FRAMES:
            if at + 9 > len(data):
                raise _Short("JPEG ends before its frame header")
            height, width = struct.unpack_from(">HH", data, at + 5)
            return _checked(width, height, 1 if exif is None else exif_orientation(exif))
        elif marker in (0xD9, 0xDA):
            raise HeaderError("JPEG has no frame header")
        else:
            if at + 4 > len(data):
                raise _Short("JPEG ends before its frame header")
            end = at + 2 + struct.unpack_from(">H", data, at + 2)[0]
            if marker == _APP1 and exif is None and data.startswith(_EXIF, at + 4):
                exif = data[at + 4 : end]
            at = end


def exif_orientation(exif: bytes) -> int:
    """Return the orientation of an EXIF block, 1 to 8; 1 where it has none or is damaged.

    Source: TIFF 6.0, section 2; only the first directory counts, the second is the thumbnail's.
    """
    tiff = exif.removeprefix(_EXIF)
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return 1
    try:
        (at,) = struct.unpack_from(f"{order}I", tiff, 4)
        (entries,) = struct.unpack_from(f"{order}H", tiff, at)
        for entry in range(at + 2, at + 2 + 12 * entries, 12):
            tag, kind = struct.unpack_from(f"{order}HH", tiff, entry)
            if tag == _ORIENTATION:
                form = {1: "B", 3: "H", 4: "I"}.get(kind)  # a byte, a short, a long
                value = form and struct.unpack_from(f"{order}{form}", tiff, entry + 8)[0]
                return _legal_orientation(value)
    except struct.error:  # the block ends before an entry that it announces
        pass
    return 1


def _legal_orientation(value: Any) -> int:
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _has_one_scan(data: bytes) -> bool:
    """Return whether decoders read one scan only: that of a sequential frame with all components.

    Only headers are read: searching all bytes takes a twentieth of the decoding time.
    """
    at, components = len(_SOI), None
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == _SOS[1]:
            return components is not None and data[at + 4] >= components
        if marker in _FRAMES:
            if marker not in _SEQUENTIAL:
                return False
            components = data[at + 9]
        if marker == 0xFF or marker in _BARE:
            at += 1 if marker == 0xFF else 2
        else:
            at += 2 + struct.unpack_from(">H", data, at + 2)[0]
    return False


def has_many_scans(data: bytes) -> bool:
    """Return whether a JPEG has more than ``MAX_SCANS`` scans; each costs a pass over the image."""
    if not data.startswith(_SOI) or _has_one_scan(data) or data.count(_SOS) <= MAX_SCANS:
        return False
    at, scans = len(_SOI), 0  # thumbnails within segments hold the marker too: skip segments
    while 0 <= (at := data.find(b"\xff", at)) < len(data) - 3:
        marker = data[at + 1]
        scans += marker == _SOS[1]
        if marker == 0xFF or marker == 0 or marker in _BARE:
            at += 1 if marker == 0xFF else 2
        elif marker == 0xD9:
            break
        else:
            at += 2 + struct.unpack_from(">H", data, at + 2)[0]
    return scans > MAX_SCANS


def _checked(width: int, height: int, orientation: int) -> Header:
    if width < 1 or height < 1:
        raise HeaderError(f"header says {width} x {height} pixels")
    return Header(width, height, orientation)
