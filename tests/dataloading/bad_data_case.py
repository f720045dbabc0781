"""The corpus of bad data: how each case is made, and its expected outcome.

``docs/bad_data.md`` shows the same list; a test compares both.
"""

import base64
import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

LEFT_OUT = "excluded"
RIGHT = "right"
SOME = "some image"
GREY = "grey"
STOPS = "stops, 75"
REFUSED = "refused, 78"
PASSED = "skipped"

Pixels = NDArray[np.uint8]
Change = Callable[[Path], None]
RNG = np.random.default_rng(3)


def smooth(channels: int = 3) -> Pixels:
    coarse = RNG.integers(0, 256, (5, 6, channels), dtype=np.uint8)
    planes = [Image.fromarray(coarse[..., k]) for k in range(channels)]
    return np.dstack([plane.resize((80, 64), Image.Resampling.BICUBIC) for plane in planes])


def encode(pixels: Any, form: str, mode: str | None = None, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    (image if mode is None else image.convert(mode)).save(buffer, form, **options)
    return buffer.getvalue()


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    """Write a PNG chunk by chunk; ``rows`` begin with a zero each."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    return start + chunk(b"IDAT", zlib.compress(rows, 1)) + chunk(b"IEND", b"")


def sixteen_bits(pixels: Pixels, colour: int) -> bytes:
    rows = b"".join(b"\0" + (row.astype(">u2") * 257).astype(">u2").tobytes() for row in pixels)
    return png(pixels.shape[1], pixels.shape[0], 16, colour, rows)


def tiff(
    data: bytes, width: int, height: int, bits: int, sample_format: int = 1, photometric: int = 1
) -> bytes:
    """A TIFF of one channel, little-endian, of a type that Pillow does not write."""
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1}
    tags |= {278: height, 279: len(data), 339: sample_format}
    data += bytes(len(data) % 2)
    return tiff_of(data, {tag: (value,) for tag, value in tags.items()})


def planar_tiff(levels: Pixels, photometric: int = 2, extra: int | None = None) -> bytes:
    """A TIFF of planes of 16 bits, ``[H, W, channels]``; ``extra``: type of the last."""
    height, width, channels = levels.shape
    planes = [levels[..., channel].astype("<u2").tobytes() for channel in range(channels)]
    size = len(planes[0])
    tags = {256: (width,), 257: (height,), 258: (16,) * channels, 259: (1,), 262: (photometric,)}
    tags |= {273: tuple(8 + k * size for k in range(channels)), 277: (channels,), 278: (height,)}
    tags |= {279: (size,) * channels, 284: (2,)} | ({} if extra is None else {338: (extra,)})
    return tiff_of(b"".join(planes), tags)


def tiff_of(data: bytes, tags: dict[int, tuple[int, ...]]) -> bytes:
    """A little-endian TIFF of pixels at byte 8, with 32-bit tags; several values follow them."""
    behind = 8 + len(data) + 2 + 12 * len(tags) + 4
    entries = values = b""
    for tag, some in tags.items():
        value = some[0] if len(some) == 1 else behind + len(values)
        entries += struct.pack("<HHII", tag, 4, len(some), value)
        values += struct.pack(f"<{len(some)}I", *some) if len(some) > 1 else b""
    start = b"II" + struct.pack("<HI", 42, 8 + len(data))
    return start + data + struct.pack("<H", len(tags)) + entries + bytes(4) + values


def black(width: int, height: int) -> bytes:
    """One bit per pixel: cheap to write, whatever it would cost to decode."""
    return png(width, height, 1, 0, bytes(1 + (width + 7) // 8) * height)


def with_size(data: bytes, width: int, height: int) -> bytes:
    """A JPEG whose header has another size."""
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def twelve_bits(pixels: Pixels) -> bytes:
    """Levels of 255 as packed integers of 12 bits; rows have an even number of pixels."""
    levels = np.rint(pixels.astype(np.float64) * 4095 / 255).astype(np.uint32)
    pairs = levels[:, ::2] << 12 | levels[:, 1::2]
    return pairs.astype(">u4").view(np.uint8).reshape(-1, 4)[:, 1:].tobytes()


def grey_of(pixels: Pixels) -> Pixels:
    return pixels[..., :1].repeat(3, axis=2)


COLOUR, ALPHA = smooth(), smooth(1)
CMYK = smooth(4)
CMYK_RGB = (255 - CMYK[..., :3].astype(int)) * (255 - CMYK[..., 3:].astype(int)) // 255
PALETTE = Image.fromarray(COLOUR).quantize(64)
PALETTE_RGB = np.array(PALETTE.convert("RGB"))
BITS = np.where(COLOUR[..., :1] > 127, 255, 0).astype(np.uint8)
JPEG = encode(COLOUR, "JPEG", quality=95, subsampling=0)
PNG = encode(COLOUR, "PNG")
WEBP = encode(COLOUR, "WEBP", lossless=True)
MIDDLE = len(JPEG) * 3 // 5
UPRIGHT = np.rot90(COLOUR, -1).copy()
OTHER = COLOUR[::-1, ::-1].copy()
AVIF = base64.b64decode(
    "AAAAIGZ0eXBhdmlmAAAAAGF2aWZtaWYxbWlhZk1BMUIAAADrbWV0YQAAAAAAAAAhaGRscgAAAAAAAAAAcGljdAAA"
    "AAAAAAAAAAAAAAAAAAAOcGl0bQAAAAAAAQAAAB5pbG9jAAAAAEQAAAEAAQAAAAEAAAETAAAAMAAAAChpaW5mAAAA"
    "AAABAAAAGmluZmUCAAAAAAEAAGF2MDFDb2xvcgAAAABqaXBycAAAAEtpcGNvAAAAFGlzcGUAAAAAAAAAEAAAAAwA"
    "AAAQcGl4aQAAAAADCAgIAAAADGF2MUOBAAwAAAAAE2NvbHJuY2x4AAEADQAGgAAAABdpcG1hAAAAAAAAAAEAAQQB"
    "AoMEAAAAOG1kYXQSAAoJGAz+2iAhoNCAMiESB/f2qQCCCD5AAADJY/8sVHDaDGYh7fsp0TGj90Atkbw="
)
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 80 64\n%%EndComments\nshowpage\n"


class Case(NamedTuple):
    """One file ``name`` of a folder, or one tar of a folder of tars."""

    name: str
    make: Change
    outcome: str
    detail: str = ""
    """Part of the reason of what is excluded or grey; else a remark."""
    expected: Pixels | None = None
    """Expected RGB pixels, from before the encoding."""
    tolerance: float = 0.6
    """Largest mean difference, levels of 255; rounding alone gives up to half a level."""
    change: Change | None = None
    """What happens after indexing."""
    inside: str = ""
    """The sample's file under a folder of that name."""


def write(data: bytes) -> Change:
    def make(path: Path) -> None:
        path.write_bytes(data)

    return make


def good(name: str, data: bytes, expected: Any, remark: str = "", tolerance: float = 0.6) -> Case:
    return Case(name, write(data), RIGHT, remark, np.asarray(expected), tolerance)


def excluded(name: str, data: bytes, reason: str) -> Case:
    return Case(name, write(data), LEFT_OUT, reason)


def grey(name: str, data: bytes, reason: str = "cannot be decoded") -> Case:
    return Case(name, write(data), GREY, reason)


def damaged(name: str, data: bytes) -> Case:
    return Case(name, write(data), SOME, "not noticed by every decoder")


def changed(name: str, change: Change, reason: str, outcome: str = GREY) -> Case:
    return Case(name, write(JPEG), outcome, reason, change=change)


def float_colour_tiff() -> bytes:
    """Three channels of 32 bits, which Pillow does not write either: the tags of a small file."""
    data = bytearray(encode(COLOUR, "TIFF"))
    at = data.index(struct.pack("<HHI", 258, 3, 3)) + 8  # BitsPerSample, three shorts
    (place,) = struct.unpack_from("<I", data, at)
    struct.pack_into("<3H", data, place, 32, 32, 32)
    return bytes(data)


FILES = [
    excluded("empty.jpg", b"", "empty file"),
    excluded("text.jpg", b"<html>404 Not Found</html>", "not an image of a known format"),
    excluded("random.jpg", RNG.bytes(3000), "not an image of a known format"),
    excluded("eps.jpg", EPS, "not an image of a known format"),
    excluded("heic.jpg", b"\0\0\0\x18ftypheic" + bytes(500), "HEIC: convert it to JPEG"),
    excluded("pointer.jpg", b"version https://git-lfs.github.com/spec/v1\n", "a Git-LFS pointer"),
    excluded("float-colour.tiff", float_colour_tiff(), "a TIFF whose channels or bits"),
    excluded("junk-before.jpg", b"junk" + JPEG, "not an image of a known format"),
    good("junk-after.jpg", JPEG + RNG.bytes(500), COLOUR, "", 3),
    good("junk-within.jpg", JPEG.replace(b"\xff\xdb", b"junk\xff\x00\xff\xdb", 1), COLOUR, "", 3),
    excluded("junk-within-cut.jpg", JPEG[:20] + b"junk" + JPEG[:20], "JPEG marker expected"),
    excluded("cut-in-header.jpg", JPEG[:30], "JPEG ends before its frame header"),
    grey("cut-after-header.jpg", JPEG[: JPEG.index(b"\xff\xda") + 20]),
    grey("cut-half.jpg", JPEG[: len(JPEG) // 2]),
    grey("cut-last-percent.jpg", JPEG[: len(JPEG) * 99 // 100]),
    grey("cut-two-bytes.jpg", JPEG[:-2]),
    excluded("cut-in-header.png", PNG[:20], "header cannot be read"),
    grey("cut-half.png", PNG[: len(PNG) // 2]),
    excluded("cut-half.webp", WEBP[: len(WEBP) // 2], "header cannot be read"),
    damaged("random-middle.jpg", JPEG[:MIDDLE] + RNG.bytes(40) + JPEG[MIDDLE + 40 :]),
    damaged("zero-middle.jpg", JPEG[:MIDDLE] + bytes(40) + JPEG[MIDDLE + 40 :]),
    grey("random-middle.png", PNG[: len(PNG) // 2] + RNG.bytes(40) + PNG[len(PNG) // 2 + 40 :]),
    good("cmyk.jpg", encode(Image.fromarray(CMYK, "CMYK"), "JPEG", quality=95), CMYK_RGB, "", 3),
    good("grey.jpg", encode(COLOUR[..., 0], "JPEG", quality=95), grey_of(COLOUR), "", 3),
    good("progressive.jpg", encode(COLOUR, "JPEG", quality=95, progressive=True), COLOUR, "", 3),
    good(
        "turned.jpg",
        encode(COLOUR, "JPEG", quality=95, exif=turned()),
        UPRIGHT,
        "turned upright",
        3,
    ),
    good("turned.png", encode(COLOUR, "PNG", exif=turned()), UPRIGHT, "turned upright"),
    good(
        "turned.webp",
        encode(COLOUR, "WEBP", lossless=True, exif=turned()),
        UPRIGHT,
        "turned upright",
    ),
    good("turned.tiff", encode(COLOUR, "TIFF", exif=turned()), UPRIGHT, "turned upright"),
    good("palette.png", encode(PALETTE, "PNG"), PALETTE_RGB),
    good(
        "palette-alpha.png",
        encode(PALETTE, "PNG", transparency=bytes(range(64))),
        PALETTE_RGB,
        "alpha dropped",
    ),
    good("alpha.png", encode(np.dstack([COLOUR, ALPHA]), "PNG"), COLOUR, "alpha dropped"),
    good(
        "grey-alpha.png",
        encode(np.dstack([COLOUR[..., 0], ALPHA]), "PNG"),
        grey_of(COLOUR),
        "alpha dropped",
    ),
    good("bits.png", encode(BITS[..., 0], "PNG", "1"), grey_of(BITS)),
    good("grey16.png", sixteen_bits(COLOUR[..., :1], 0), grey_of(COLOUR), "scaled to 8 bits"),
    good("colour16.png", sixteen_bits(COLOUR, 2), COLOUR, "scaled to 8 bits"),
    good(
        "grey16.tiff",
        encode(COLOUR[..., 0].astype(np.uint16) * 257, "TIFF"),
        grey_of(COLOUR),
        "scaled to 8 bits",
    ),
    good(
        "grey12.tiff",
        tiff(twelve_bits(COLOUR[..., 0]), 80, 64, 12),
        grey_of(COLOUR),
        "scaled to 8 bits",
    ),
    grey(
        "float.tiff",
        encode(COLOUR[..., 0] / np.float32(255), "TIFF"),
        "floating-point values have no range",
    ),
    grey(
        "integers32.tiff",
        encode(COLOUR[..., 0].astype(np.int32), "TIFF"),
        "signed integers of 32 bits have no range",
    ),
    grey(
        "signed16.tiff",
        tiff(COLOUR[..., 0].astype("<i2").tobytes(), 80, 64, 16, 2),
        "signed integers of 16 bits have no range",
    ),
    good("lossless.webp", WEBP, COLOUR),
    good(
        "alpha.webp",
        encode(np.dstack([COLOUR, ALPHA]), "WEBP", lossless=True, exact=True),
        COLOUR,
        "alpha dropped",
    ),
    good("colour.jp2", encode(COLOUR, "JPEG2000"), COLOUR),
    good("palette.gif", encode(PALETTE, "GIF"), PALETTE_RGB),
    good("colour.avif", AVIF, np.full((12, 16, 3), (200, 90, 40)), "with Pillow 11.3 or later", 3),
    good("png-named.jpg", PNG, COLOUR),
    good("one-pixel.png", encode(COLOUR[:1, :1], "PNG"), COLOUR[:1, :1]),
    good("wide.png", black(20_000, 30), np.zeros((30, 20_000, 3), np.uint8)),
    excluded("bomb.png", black(14_000, 14_000), "too many pixels for Pillow"),
    excluded("header-65535.jpg", with_size(JPEG, 65535, 65535), "65535 x 65535 has more than"),
    excluded("header-0.jpg", with_size(JPEG, 80, 0), "header says 80 x 0 pixels"),
]


def folder_with_picture(path: Path) -> None:
    path.mkdir()
    (path / "a.png").write_bytes(PNG)


def link_out(path: Path) -> None:
    store = path.parent.parent / "store"
    store.mkdir(exist_ok=True)
    (store / "b.png").write_bytes(PNG)
    path.symlink_to(store / "b.png")


def link_out_to_folder(path: Path) -> None:
    store = path.parent.parent / "store-of-folders"
    store.mkdir()
    (store / "a.png").write_bytes(PNG)
    path.symlink_to(store)


def unreadable(path: Path) -> None:
    path.write_bytes(JPEG)
    path.chmod(0)


PLACES = [
    Case("folder.jpg", folder_with_picture, LEFT_OUT, "a folder; the files in it are listed"),
    Case("dangling.jpg", lambda path: path.symlink_to("nowhere.jpg"), LEFT_OUT, "No such file"),
    Case("dangling-folder", lambda path: path.symlink_to("nowhere"), LEFT_OUT, "No such file"),
    Case(
        "link-to-itself.jpg", lambda path: path.symlink_to(path.name), LEFT_OUT, "Too many levels"
    ),
    Case("link-back", lambda path: path.symlink_to("."), LEFT_OUT, "a link to a folder above it"),
    Case("link-out.png", link_out, RIGHT, "links are followed", COLOUR),
    Case("link-out", link_out_to_folder, RIGHT, "links are followed", COLOUR, inside="a.png"),
    Case("no-permission.jpg", unreadable, LEFT_OUT, "cannot be read: Permission denied"),
    Case("pipe.jpg", os.mkfifo, LEFT_OUT, "not a regular file"),
    Case(".hidden.jpg", write(JPEG), PASSED),
]


def rewrite(data: bytes) -> Change:
    """Replace the content by bytes of the same number."""
    return write(data[: len(JPEG)].ljust(len(JPEG), b"\0"))


def swap(make: Change) -> Change:
    def change(path: Path) -> None:
        path.unlink()
        make(path)

    return change


CHANGES = [
    changed("emptied.jpg", write(b""), "0 bytes, the index says"),
    changed("shortened.jpg", write(JPEG[:-100]), "bytes, the index says"),
    changed("grown.jpg", write(JPEG + b"more"), "more bytes, the index says"),
    changed("turned-to-text.jpg", rewrite(b"text"), "not an image of a known format"),
    changed(
        "turned-to-another-size.jpg",
        rewrite(encode(COLOUR[:32, :40], "JPEG")),
        "40 x 32 pixels, the index says 80 x 64",
    ),
    changed(
        "turned-to-a-bomb.jpg",
        rewrite(with_size(JPEG, 65535, 65535)),
        "65535 x 65535 pixels, the index says 80 x 64",
    ),
    Case(
        "damaged-later.png",
        write(PNG),
        GREY,
        "cannot be decoded",
        change=write(PNG[: len(PNG) // 2] + bytes(40) + PNG[len(PNG) // 2 + 40 :]),
    ),
    Case(
        "turned-to-another-image.png",
        write(png(80, 64, 8, 2, b"".join(b"\0" + row.tobytes() for row in COLOUR)).ljust(30_000)),
        RIGHT,
        "the new image",
        OTHER,
        change=write(
            png(80, 64, 8, 2, b"".join(b"\0" + row.tobytes() for row in OTHER)).ljust(30_000)
        ),
    ),
    changed("vanished.jpg", Path.unlink, "No such file or directory", STOPS),
    changed("no-permission-later.jpg", lambda path: path.chmod(0), "Permission denied", STOPS),
    changed("turned-to-a-folder.jpg", swap(Path.mkdir), "Is a directory", STOPS),
    changed("turned-to-a-pipe.jpg", swap(os.mkfifo), "Not a regular file", STOPS),
]
FOLDER = [*FILES, *PLACES, *CHANGES]
FORMATS = {
    "a.jpg": JPEG,
    "progressive.jpg": encode(COLOUR, "JPEG", progressive=True),
    "cmyk.jpg": encode(Image.fromarray(CMYK, "CMYK"), "JPEG"),
    "a.png": PNG,
    "palette.png": encode(PALETTE, "PNG", transparency=bytes(range(64))),
    "lossless.webp": WEBP,
    "lossy.webp": encode(COLOUR, "WEBP"),
    "a.gif": encode(PALETTE, "GIF"),
    "a.bmp": encode(COLOUR, "BMP"),
    "a.tiff": encode(COLOUR, "TIFF"),
    "lzw.tiff": encode(COLOUR, "TIFF", compression="tiff_lzw"),
    "a.jp2": encode(COLOUR, "JPEG2000"),
    "a.ppm": encode(COLOUR, "PPM"),
    "a.avif": AVIF,
}
"""Whole files of every format, to be damaged at random."""
