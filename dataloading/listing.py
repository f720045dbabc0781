"""Listing of a data set before any header is read: names, sizes and times of its files."""

import hashlib
import json
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dataloading.columns import (
    Fields,
    FileNames,
    buffer_bytes,
    map_buffer,
    new_mapping,
    view_columns,
)
from dataloading.entries import File, encode_name
from dataloading.files import atomic_path


class Files(NamedTuple):
    """Listed files as columns; rows in the order of the listing.

    Attributes:
        names: relative, with ``/``.
        sizes: bytes, int64 ``[n]``; -1 where there is a fault.
        times: of the last modification, nanoseconds, int64 ``[n]``.
        faults: by row, why the file cannot be used whatever its content.
    """

    names: FileNames
    sizes: NDArray[np.int64]
    times: NDArray[np.int64]
    faults: dict[int, str]

    def __len__(self) -> int:
        return len(self.sizes)

    def digest_of(self, first: int, last: int, with_times: bool = True) -> bytes:
        """Hash names, sizes and times of some rows, sha256."""
        start = int(self.names.ends[first - 1]) if first else 0
        ends = self.names.ends[first:last]
        total = hashlib.sha256(b"files %d\n" % (last - first))
        total.update(self.names.text[start : int(ends[-1]) if len(ends) else start].tobytes())
        total.update((ends - np.uint64(start)).tobytes())
        total.update(self.sizes[first:last].tobytes())
        if with_times:
            total.update(self.times[first:last].tobytes())
        bad = np.flatnonzero(self.sizes[first:last] < 0).tolist()
        total.update(json.dumps([[row, self.faults.get(first + row)] for row in bad]).encode())
        return total.digest()


def collect_files(files: Iterable[File]) -> Files:
    """Store files as columns, some 24 bytes per file and its name."""
    text, ends, sizes, times = bytearray(), array("Q"), array("q"), array("q")
    faults: dict[int, str] = {}
    for name, size, mtime_ns, fault in files:
        if fault is not None:
            faults[len(sizes)] = fault
        text += encode_name(name)
        ends.append(len(text))
        sizes.append(size)
        times.append(mtime_ns)
    names = FileNames(np.frombuffer(text, np.uint8), np.frombuffer(ends, np.uint64))
    return Files(names, np.frombuffer(sizes, np.int64), np.frombuffer(times, np.int64), faults)


def _fields(rows: int, name_bytes: int) -> Fields:
    return {
        "ends": (np.uint64, rows),
        "sizes": (np.int64, rows),
        "times": (np.int64, rows),
        "text": (np.uint8, name_bytes),
    }


def write_files(files: Files, shards: Sequence[str], path: Path) -> None:
    """Write a listing, and the paths of its tars if it is of tars, for processes that map it.

    Raises:
        OSError: if it cannot be written.
    """
    facts = {
        "rows": len(files),
        "name_bytes": len(files.names.text),
        "faults": files.faults,
        "shards": list(shards),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    fields = _fields(len(files), len(files.names.text))
    with atomic_path(path, durable=False) as draft:
        buffer = new_mapping(draft, max(1, buffer_bytes(fields)))
        columns = view_columns(buffer, fields)
        columns["ends"][:], columns["text"][:] = files.names.ends, files.names.text
        columns["sizes"][:], columns["times"][:] = files.sizes, files.times
    with atomic_path(path.with_suffix(".json"), durable=False) as draft:
        draft.write_text(json.dumps(facts), encoding="ascii")


def map_files(path: Path) -> tuple[Files, list[str]]:
    """Map the files that ``write_files`` wrote.

    Raises:
        OSError, ValueError: if it is missing or incomplete.
    """
    facts: dict[str, Any] = json.loads(path.with_suffix(".json").read_text(encoding="ascii"))
    fields = _fields(facts["rows"], facts["name_bytes"])
    columns = view_columns(map_buffer(path, buffer_bytes(fields)), fields)
    faults = {int(row): why for row, why in facts["faults"].items()}
    names = FileNames(columns["text"], columns["ends"])
    return Files(names, columns["sizes"], columns["times"], faults), facts["shards"]
