"""The corpus of bad tars; see ``bad_data_case``. Every tar has one good image too."""

import gzip
from pathlib import Path

import numpy as np

from tests.dataloading.bad_data_case import (
    COLOUR,
    GREY,
    LEFT_OUT,
    OTHER,
    PASSED,
    PNG,
    REFUSED,
    RIGHT,
    STOPS,
    Case,
    Change,
    encode,
)
from tests.dataloading.tar_case import reference, write_tar

SAMPLE = PNG.ljust(8000, b"\0")  # a size that other images can have, too
GOOD = ("good.png", SAMPLE)


def tar(*list_members: tuple[str, bytes]) -> Change:
    def make(path: Path) -> None:
        write_tar(path, [GOOD, *list_members])

    return make


TWO = tar(("bad.png", SAMPLE))


def then(make: Change, *more: Change) -> Change:
    def both(path: Path) -> None:
        for one in (make, *more):
            one(path)

    return both


def cut(before: int) -> Change:
    """Keep the bytes before a byte, counted from the second member's first."""

    def change(path: Path) -> None:
        path.write_bytes(path.read_bytes()[: reference(path)[1][1] + before])

    return change


def overwrite(offset: int, data: bytes) -> Change:
    """Write at a byte, counted from the second member's first."""

    def change(path: Path) -> None:
        at = reference(path)[1][1] + offset
        whole = path.read_bytes()
        path.write_bytes(whole[:at] + data + whole[at + len(data) :])

    return change


def pictures_of(pixels: np.ndarray) -> Change:
    return tar(("bad.png", encode(pixels, "PNG").ljust(len(SAMPLE), b"\0")))


TARS = [
    Case("truncated-member.tar", tar(("bad.png", PNG[: len(PNG) // 2])), GREY, "cannot be decoded"),
    Case("empty-member.tar", tar(("bad.png", b"")), LEFT_OUT, "empty file"),
    Case(
        "parent-names.tar",
        tar(("../bad.png", SAMPLE), ("/etc/bad.png", SAMPLE)),
        RIGHT,
        "names are never paths",
        COLOUR,
    ),
    Case(
        "duplicate-keys.tar",
        tar(("good.png", encode(OTHER, "PNG"))),
        LEFT_OUT,
        "a second image of its sample; the first is used",
    ),
    Case("cut-in-member.tar", then(TWO, cut(1000)), LEFT_OUT, "the tar is cut short"),
    Case("cut-in-header.tar", then(TWO, cut(-100)), LEFT_OUT, "the tar is cut short within"),
    Case("cut-between.tar", then(TWO, cut(-512)), LEFT_OUT, "no end-of-archive mark"),
    Case(
        "damaged-header.tar",
        then(TWO, overwrite(-510, b"\xff")),
        LEFT_OUT,
        "damaged header: its checksum is wrong",
    ),
    Case("folder.tar", Path.mkdir, PASSED),
    Case("cut-later.tar", TWO, GREY, "bytes, the index says 8000", change=cut(1000)),
    Case(
        "overwritten-later.tar",
        TWO,
        GREY,
        "not an image of a known format",
        change=overwrite(0, bytes(8000)),
    ),
    Case(
        "turned-to-other-images.tar", TWO, RIGHT, "the new image", OTHER, change=pictures_of(OTHER)
    ),
    Case("vanished.tar", TWO, STOPS, "No such file or directory", change=Path.unlink),
    Case(
        "compressed.tar",
        lambda path: path.write_bytes(gzip.compress(b"a tar" * 500)) and None,
        REFUSED,
        "is compressed (gzip) and cannot be read in place; decompress it",
    ),
]
