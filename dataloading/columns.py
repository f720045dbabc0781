"""Columns of a data set in one buffer: in memory, or a file that processes map together."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import DTypeLike, NDArray

from dataloading.entries import ENTRY

Buffer = NDArray[np.uint8]
Fields = Mapping[str, tuple[DTypeLike, int]]
"""Dtype and length of each column, by name."""
NewBuffer = Callable[[int], Buffer]
"""Returns a writable buffer of the given number of bytes."""

_ALIGNMENT = 64
_AT_ONCE = 65536


def buffer_bytes(fields: Fields) -> int:
    """Return the number of bytes that the columns take together."""
    return sum(_room(*field) for field in fields.values())


def new_memory(size: int) -> Buffer:
    """Return a buffer of this process, ``[size]``."""
    return np.zeros(size, np.uint8)


def new_mapping(path: Path, size: int) -> Buffer:
    """Create a file of ``size`` bytes, at least one, and map it.

    Raises:
        OSError: if it cannot be written, or there is no room. The room is allocated here, since a
            store that is full while the mapping is written would end the process.
    """
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)
    return np.memmap(path, np.uint8, "r+")


def map_buffer(path: Path, size: int) -> Buffer:
    """Map a file of ``size`` bytes, read-only.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it has another size.
    """
    found = path.stat().st_size
    if found != size:
        raise ValueError(f"{path.name} has {found} bytes, not {size}")
    return np.memmap(path, np.uint8, "r") if size else new_memory(0)


def view_columns(buffer: Buffer, fields: Fields) -> dict[str, NDArray[Any]]:
    """Return the columns of a buffer, without a copy."""
    columns: dict[str, NDArray[Any]] = {}
    start = 0
    for name, (dtype, count) in fields.items():
        size = np.dtype(dtype).itemsize * count
        columns[name] = np.asarray(buffer)[start : start + size].view(dtype)
        start += _room(dtype, count)
    return columns


def _room(dtype: DTypeLike, count: int) -> int:
    return math.ceil(np.dtype(dtype).itemsize * count / _ALIGNMENT) * _ALIGNMENT


class FileNames(Sequence[str]):
    """Names of files, concatenated in one array of bytes; strings are created on access.

    Args:
        text: the encoded names, uint8.
        ends: where each name ends in ``text``, uint64 ``[n]``.
    """

    def __init__(self, text: NDArray[np.uint8], ends: NDArray[np.uint64]) -> None:
        self.text = text
        self.ends = ends

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        end = int(self.ends[index])  # refuses what is out of range
        row = index % len(self)
        start = int(self.ends[row - 1]) if row else 0
        return self.text[start:end].tobytes().decode("utf-8", "surrogateescape")

    def encoded(self, first: int, last: int) -> list[bytes]:
        """Return the encoded names of the rows from ``first`` to before ``last``."""
        start = int(self.ends[first - 1]) if first else 0
        ends = (self.ends[first:last] - np.uint64(start)).tolist()
        text = self.text[start : start + (ends[-1] if ends else 0)].tobytes()
        return [text[a:b] for a, b in zip([0, *ends], ends, strict=False)]


def folders_of(names: FileNames) -> set[str]:
    """Return the distinct folders of names, without the last slash."""
    found: set[bytes] = set()
    for at in range(0, len(names), _AT_ONCE):
        encoded = names.encoded(at, min(at + _AT_ONCE, len(names)))
        found.update(name.rpartition(b"/")[0] for name in encoded)
    return {folder.decode("utf-8", "surrogateescape") for folder in found}


def index_fields(rows: int, name_bytes: int) -> Fields:
    """Return the columns of an index; ``name_bytes`` is 0 for tars, which have no names."""
    named = rows if name_bytes else 0
    return {"entries": (ENTRY, rows), "ends": (np.uint64, named), "text": (np.uint8, name_bytes)}


def new_columns(
    rows: int, name_bytes: int, new_buffer: NewBuffer
) -> tuple[NDArray[np.void], FileNames]:
    """Return empty rows and names of an index, in one new buffer."""
    fields = index_fields(rows, name_bytes)
    columns = view_columns(new_buffer(buffer_bytes(fields)), fields)
    return columns["entries"], FileNames(columns["text"], columns["ends"])
