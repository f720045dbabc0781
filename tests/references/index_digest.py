"""Digests of an index of images, row by row.

Checkpoints and published indexes compare them, so they stay as they were in the first version.
"""

import hashlib
import os
import struct
from collections.abc import Sequence

import numpy as np


def folder_digest(names: Sequence[str], entries: np.ndarray) -> str:
    """Name, bytes, width and height of each row, then the turns."""
    text = b"dataloading index 1\n"
    for name, row in zip(names, entries, strict=True):
        text += os.fsencode(name) + b"\0%d %d %d\n" % (row["size"], row["width"], row["height"])
    return hashlib.sha256(text + turns(entries)).hexdigest()


def tars_digest(names: Sequence[str], sizes: Sequence[int], entries: np.ndarray) -> str:
    """Name and bytes of each tar, then each row without label and flags, then the turns."""
    text = b"dataloading index of tars 1\n"
    for name, size in zip(names, sizes, strict=True):
        text += os.fsencode(name) + b"\0%d\n" % size
    for row in entries:
        kept = (row[key] for key in ("shard", "offset", "size", "width", "height"))
        text += struct.pack("<IQIHHiB", *map(int, kept), 0, 0)
    return hashlib.sha256(text + turns(entries)).hexdigest()


def turns(entries: np.ndarray) -> bytes:
    """The EXIF orientation by which each image is turned; nothing where none is."""
    found = bytes((flags & 7) + 1 if flags & 8 else 1 for flags in entries["flags"].tolist())
    return b"turned\n" + found if max(found) > 1 else b""
