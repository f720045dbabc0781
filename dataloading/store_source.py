"""Samples within tars of object stores, with many requests in flight."""

import errno
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from dataloading.store_cache import PIECE
from dataloading.stores import NO_ANSWER, RemoteTar, read_range

IN_FLIGHT = 32
"""Most requests for samples that a process has in flight."""

_MERGED_GAP = 64 << 10  # bytes between samples up to which one request reads both
_MERGED_BYTES = 8 << 20  # most bytes of a request for several samples
_HUNG_S = 5.0  # without further requests after a request without an answer


class StoreSource:
    """Samples within tars of a store; ``prefetch`` has many requests in flight.

    Args:
        tars: the shards.
        entries: rows of the index.
        in_flight: most requests of ``prefetch`` at the same time.
        read_cached: reads as ``read_range``, from pieces that a ``StoreCache`` keeps; ``None``:
            each range is requested.
    """

    def __init__(
        self,
        tars: Sequence[RemoteTar],
        entries: NDArray[np.void],
        in_flight: int = IN_FLIGHT,
        read_cached: Callable[[RemoteTar, int, int], bytes] | None = None,
    ) -> None:
        self._tars = tars
        self._entries = entries
        self._read_cached = read_cached
        self._in_flight = in_flight
        self._pool: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        self._hung_until = 0.0
        self._coming: dict[tuple[int, int], tuple[int, Future[list[memoryview]]]] = {}

    def prefetch(self, rows: Sequence[int]) -> None:
        """Begin to read rows, neighbours with one request; returns at once.

        Each row is kept until it is read; that read raises a failure.
        """
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self._in_flight, thread_name_prefix="store")
            wanted = [row for row in set(rows) if self._place_of(row) not in self._coming]
            for group in self._group(wanted):
                places = [self._range_of(row) for row in group]
                future = self._pool.submit(self._fetch_all, places)
                for k, row in enumerate(group):
                    self._coming[self._place_of(row)] = k, future

    def read(self, i: int) -> bytes:
        with self._lock:
            coming = self._coming.pop(self._place_of(i), None)
        if coming is None:
            return bytes(self._fetch(*self._range_of(i)))
        k, future = coming
        return bytes(future.result()[k])

    def close(self) -> None:
        """Drop what was prefetched; requests in flight end by themselves."""
        with self._lock:
            if self._pool is not None:
                self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None
            self._coming.clear()

    def _group(self, rows: list[int]) -> list[list[int]]:
        """Group rows so that one request reads each group, or one piece of the cache holds it."""
        if self._read_cached is not None:
            return split_by_piece(self._entries, np.array(rows, np.int64))
        return merge_neighbours(self._entries, np.array(rows, np.int64))

    def _fetch_all(self, places: list[tuple[RemoteTar, int, int]]) -> list[memoryview]:
        """Read ranges of one tar in ascending order, without a cache as one range."""
        if self._read_cached is not None:
            return [self._fetch(*place) for place in places]
        tar, start, _ = places[0]
        data = self._fetch(tar, start, places[-1][1] + places[-1][2] - start)
        return [data[at - start : at - start + size] for _, at, size in places]

    def _fetch(self, tar: RemoteTar, offset: int, size: int) -> memoryview:
        """Read a range, unless the store did not answer a moment ago.

        Reads that have waited in a queue would otherwise wait for the same store one after another.
        """
        if time.monotonic() < self._hung_until:
            raise OSError(errno.ETIMEDOUT, NO_ANSWER, tar.url)
        try:
            return memoryview((self._read_cached or read_range)(tar, offset, size))
        except OSError as error:
            if error.errno == errno.ETIMEDOUT:
                self._hung_until = time.monotonic() + _HUNG_S
            raise

    def _place_of(self, row: int) -> tuple[int, int]:
        entry = self._entries[row]
        return int(entry["shard"]), int(entry["offset"])

    def _range_of(self, row: int) -> tuple[RemoteTar, int, int]:
        """Return tar, first byte and number of bytes of a row."""
        entry = self._entries[row]
        return self._tars[int(entry["shard"])], int(entry["offset"]), int(entry["size"])


def merge_neighbours(entries: NDArray[np.void], rows: NDArray[np.int64]) -> list[list[int]]:
    """Group rows so that one request reads each group.

    Args:
        entries: rows of the index.
        rows: distinct rows, in any order.

    Returns:
        Groups in the order of shard and offset; rows of a group are at most 64 KiB apart in one
        shard, and are 8 MiB together at most, unless one row alone is more.
    """
    if not len(rows):
        return []
    chosen = entries[rows]
    order = np.lexsort((chosen["offset"], chosen["shard"]))
    rows, chosen = rows[order], chosen[order]
    starts = chosen["offset"].astype(np.int64)
    ends = starts + chosen["size"]
    groups = [[int(rows[0])]]
    first = 0
    for before, here in pairwise(range(len(rows))):
        if (
            chosen["shard"][here] != chosen["shard"][before]
            or starts[here] - ends[before] > _MERGED_GAP
            or ends[here] - starts[first] > _MERGED_BYTES
        ):
            groups.append([])
            first = here
        groups[-1].append(int(rows[here]))
    return groups


def split_by_piece(entries: NDArray[np.void], rows: NDArray[np.int64]) -> list[list[int]]:
    """Group rows, distinct and in any order, that begin in the same piece of the cache."""
    if not len(rows):
        return []
    shards, offsets = entries["shard"][rows], entries["offset"][rows].astype(np.int64)
    order = np.lexsort((offsets, shards))
    keys = np.stack([shards[order].astype(np.int64), offsets[order] // PIECE])
    ends = np.flatnonzero((np.diff(keys) != 0).any(0)) + 1
    return [group.tolist() for group in np.split(rows[order], ends)]
