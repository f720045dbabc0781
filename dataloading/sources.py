"""Sources of the bytes of a sample: files and tars."""

import contextlib
import os
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dataloading.files import open_regular, read_range

_MAX_OPEN = 512  # tars kept open by a source; a process may have 1024 files open


class Source(Protocol):
    """Bytes of samples by row of the index; safe to call from several threads."""

    def read(self, i: int) -> bytes:
        """Return the encoded image of row ``i``.

        A sample that has changed since it was indexed returns other bytes: fewer where it ends
        early, one more where it continues; never more than that, whatever the file holds now.

        Raises:
            OSError: if it cannot be read.
        """
        ...

    def prefetch(self, rows: Sequence[int]) -> None:
        """Begin to read rows where reads take long; returns at once."""
        ...

    def close(self) -> None:
        """Close open files; no read may be in progress. May be repeated."""
        ...


class FolderSource:
    """One file per sample under one folder; ``names`` are relative to it, in index order."""

    def __init__(
        self, root: str | os.PathLike[str], names: Sequence[str], entries: NDArray[np.void]
    ) -> None:
        self._root = Path(root)
        self._names = names
        self._entries = entries

    def read(self, i: int) -> bytes:
        descriptor = open_regular(self._root / self._names[i])
        try:
            return read_range(descriptor, 0, int(self._entries[i]["size"]) + 1)
        finally:
            os.close(descriptor)

    def prefetch(self, rows: Sequence[int]) -> None:
        """Do nothing: the page cache of the system reads ahead."""

    def close(self) -> None:
        """Do nothing: no file stays open."""


class TarSource:
    """Samples within uncompressed tar files, read in place.

    A tar is opened at the first read from it and stays open, for all threads, until ``close`` or
    the end of this object; beyond 512, a read opens and closes its tar.
    """

    def __init__(self, shards: Sequence[Path], entries: NDArray[np.void]) -> None:
        self._shards = shards
        self._entries = entries
        self._opening = threading.Lock()
        self._descriptors: dict[int, int] = {}
        weakref.finalize(self, _close_all, self._descriptors)

    def read(self, i: int) -> bytes:
        row = self._entries[i]
        shard, offset, size = int(row["shard"]), int(row["offset"]), int(row["size"])
        descriptor = self._descriptors.get(shard)
        if descriptor is None:
            descriptor = self._open(shard)
        if descriptor is not None:
            with contextlib.suppress(OSError):  # a file server was restarted
                return read_range(descriptor, offset, size)
        descriptor = open_regular(self._shards[shard])
        try:
            return read_range(descriptor, offset, size)
        finally:
            os.close(descriptor)

    def prefetch(self, rows: Sequence[int]) -> None:
        """Do nothing: the page cache of the system reads ahead."""

    def close(self) -> None:
        """Close the tars; no read may be in progress. A later read opens its tar again."""
        with self._opening:
            _close_all(self._descriptors)

    def _open(self, shard: int) -> int | None:
        """Return a descriptor that stays open, or ``None`` if there are many already."""
        with self._opening:
            if shard not in self._descriptors:
                if len(self._descriptors) >= _MAX_OPEN:
                    return None
                self._descriptors[shard] = open_regular(self._shards[shard])
            return self._descriptors[shard]


def _close_all(descriptors: dict[int, int]) -> None:
    while descriptors:
        os.close(descriptors.popitem()[1])
