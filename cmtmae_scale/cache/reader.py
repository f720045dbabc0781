"""Read the rows of a cache ahead of the step, on threads, each verified by its checksum."""

import errno
import json
import logging
import os
import resource
import threading
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cmtmae_scale.cache.format import (
    HEADER_LIMIT,
    Manifest,
    list_shards,
    row_checksum,
    row_memory,
    shard_path,
)
from cmtmae_scale.errors import may_pass
from dataloading.files import open_regular
from dataloading.plan import Plan

logger = logging.getLogger(__name__)

THREADS = 4
MAX_OPEN = 4096
SIDECAR_POLL_S = 0.2
"""Shortest time between two listings of a folder, seconds; a sidecar finishes shards that often."""
BUILD_POLL_S = 10.0
"""The same for a cache of views, where a micro-batch may miss shards of every folder."""
FIRST_READ = 4096
"""Bytes of a shard that are read at first; a header has fewer."""
MAX_RUN = 1024
"""Maximum number of rows in one read: the system's limit of buffers (IOV_MAX)."""
INCOMPLETE = "it is not complete"
STORE_FAILS = "the store fails"
"""Beginning of the fault of a row that may be intact."""
UNDECODED = "its image could not be decoded when it was built"
UNDAMAGED = (None, INCOMPLETE, UNDECODED)
"""Faults that are not damage."""
_readers: "weakref.WeakSet[CacheReader]" = weakref.WeakSet()
"""Readers of this process, one per cached teacher, which share its limit of open files."""


class Field(NamedTuple):
    """Place of a tensor in the file of a shard."""

    offset: int
    row_bytes: int


class ShardFile:
    """An open shard whose rows are read in place. Threads may share it.

    Raises:
        OSError: if the file is absent or cannot be read.
        ValueError: if its layout is not that of the manifest.
    """

    def __init__(self, folder: Path, manifest: Manifest, shard: int) -> None:
        self.manifest = manifest
        self.rows = manifest.shard_rows(shard)
        self.identity = manifest.identity
        path = shard_path(folder, manifest, shard)
        if path.is_symlink():
            raise OSError(errno.ELOOP, "Is a link", str(path))
        self.descriptor = open_regular(path)
        try:
            self.fields = self.locate_fields(os.fstat(self.descriptor).st_size)
        except BaseException:
            os.close(self.descriptor)
            raise

    def locate_fields(self, size: int) -> dict[str, Field]:
        """Find every tensor from the file's header, which is not trusted."""
        head = os.pread(self.descriptor, FIRST_READ, 0)
        length = int.from_bytes(head[:8], "little")
        if not 0 < length <= min(HEADER_LIMIT, size - 8):
            raise ValueError("its header is damaged")
        if 8 + length > len(head):
            head += os.pread(self.descriptor, 8 + length - len(head), len(head))
        expected = 8 + length + self.manifest.row_bytes() * len(self.rows)
        if size != expected:
            raise ValueError(f"it has {size} bytes, its rows need {expected}")
        try:
            header: Any = json.loads(head[8 : 8 + length])
            starts = {name: header[name]["data_offsets"][0] for name in self.manifest.fields()}
        except (ValueError, KeyError, TypeError, IndexError, RecursionError):
            raise ValueError("its header is damaged") from None
        found: dict[str, Field] = {}
        for name, (dtype, shape) in self.manifest.fields().items():
            row_bytes = dtype.itemsize * torch.Size(shape).numel()
            start, room = starts[name], size - 8 - length - row_bytes * len(self.rows)
            if not isinstance(start, int) or not 0 <= start <= room:
                raise ValueError("its header is damaged")
            found[name] = Field(8 + length + start, row_bytes)
        return found

    def read_rows(
        self, rows: Sequence[int], into: Mapping[str, Tensor], places: Sequence[int]
    ) -> list[str | None]:
        """Read rows of this shard into a batch and verify each; adjacent rows are read together.

        Args:
            rows: their numbers in the cache, in any order.
            into: tensors ``[B, ...]`` of ``Manifest.fields``, on the CPU.
            places: index in the batch of each row.

        Returns:
            Per row ``None``, or why it cannot be used.

        Raises:
            OSError: if the store fails.
        """
        faults: list[str | None] = [None] * len(rows)
        for run in adjacent_runs(rows):
            found = self._read_run([rows[k] for k in run], into, [places[k] for k in run])
            for k, fault in zip(run, found, strict=True):
                faults[k] = fault
        return faults

    def _read_run(
        self, rows: list[int], into: Mapping[str, Tensor], places: list[int]
    ) -> list[str | None]:
        """Read successive rows; a run that ends early is read again row by row."""
        memory: list[list[memoryview]] = []
        for name, field in self.fields.items():
            targets = [row_memory(into[name], at) for at in places]
            start = field.offset + (rows[0] - self.rows.start) * field.row_bytes
            if os.preadv(self.descriptor, targets, start) != field.row_bytes * len(rows):
                if len(rows) == 1:
                    return ["it is cut short"]
                return [
                    fault
                    for row, at in zip(rows, places, strict=True)
                    for fault in self._read_run([row], into, [at])
                ]
            memory.append(targets)
        return [
            self._check_row(row, into, at, [targets[k] for targets in memory[:-1]])
            for k, (row, at) in enumerate(zip(rows, places, strict=True))
        ]

    def _check_row(
        self, row: int, into: Mapping[str, Tensor], at: int, memory: list[memoryview]
    ) -> str | None:
        """Verify a row that was read; ``memory`` is its bytes without the checksum."""
        if row_checksum(self.identity, row, memory) != int(into["checksum"][at]):
            return "it differs from its checksum"
        return None if into["valid"][at] else UNDECODED

    def close(self) -> None:
        os.close(self.descriptor)


def adjacent_runs(rows: Sequence[int]) -> list[list[int]]:
    """Return the places of rows in runs of successive numbers, at most ``MAX_RUN`` each."""
    runs: list[list[int]] = []
    for k in sorted(range(len(rows)), key=rows.__getitem__):
        if runs and len(runs[-1]) < MAX_RUN and rows[k] == rows[runs[-1][-1]] + 1:
            runs[-1].append(k)
        else:
            runs.append([k])
    return runs


class CachedRows(NamedTuple):
    """Rows of one micro-batch, B of them."""

    fields: dict[str, Tensor]
    """Tensors ``[B, ...]`` of ``Manifest.fields`` on the CPU; see ``blank_row`` for faulty rows."""
    numbers: list[int]
    """Numbers of the rows in the cache."""
    faults: list[str | None]
    """Per row ``None``, or why it cannot be used."""


class CacheReader:
    """Reads the rows of crop plans, several micro-batches at a time.

    A row's number is ``sample * count + view``, or the position if the cache belongs to a run's
    stream. Where a shard is missing, the folder of the shard is listed, and no shard that the list
    lacks is opened until ``poll_s`` have passed and a new list has it.

    Args:
        folder: ``cache.dir``.
        manifest: the cache's.
        count: views per image; ``None``: rows are positions, and none is read twice.
        pin: read into pinned memory.
    """

    def __init__(self, folder: Path, manifest: Manifest, count: int | None, pin: bool) -> None:
        self.folder = folder
        self.manifest = manifest
        self.count = count
        self.pin = pin
        self.poll_s = SIDECAR_POLL_S if count is None else BUILD_POLL_S
        self.limit = min(MAX_OPEN, max(16, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4))
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="cache")
        self._pending: deque[tuple[Plan, CachedRows, list[Future[None]]]] = deque()
        self._lock = threading.Lock()
        self._open: OrderedDict[int, ShardFile] = OrderedDict()
        self._warned: set[tuple[int, bool]] = set()
        self._listing = threading.Lock()
        self._listed: dict[Path, tuple[float, set[int]]] = {}
        _readers.add(self)

    def submit(self, plan: Plan) -> None:
        """Start to read the rows of a micro-batch; returns at once."""
        chosen = plan.positions if self.count is None else plan.ids * self.count + plan.views
        numbers: list[int] = chosen.tolist()
        fields = self.manifest.empty_rows(len(numbers), pin_memory=self.pin)
        rows = CachedRows(fields, numbers, [None] * len(numbers))
        self._pending.append((plan, rows, self._start_reading(rows, range(len(numbers)))))

    def _start_reading(self, rows: CachedRows, places: Iterable[int]) -> list[Future[None]]:
        """Start to read some rows of a micro-batch, each shard on one thread."""
        shards: dict[int, list[int]] = {}
        for at in places:
            shards.setdefault(self.shard_of(rows.numbers[at]), []).append(at)
        return [self._pool.submit(self._fill_rows, n, rows, some) for n, some in shards.items()]

    def collect(self, plan: Plan) -> CachedRows:
        """Wait for the rows of a plan; drops the plans that were submitted before it.

        Raises:
            RuntimeError: if the plan was not submitted, or was collected before.
        """
        while self._pending:
            submitted, rows, futures = self._pending.popleft()
            wait(futures)
            if submitted is plan:
                for future in futures:
                    future.result()
                return rows if self.count is not None else self._retry_incomplete(rows)
        raise RuntimeError("rows were collected that were never submitted; please report this")

    def is_submitted(self, plan: Plan) -> bool:
        """Return whether a plan was submitted and not collected."""
        return any(submitted is plan for submitted, _, _ in self._pending)

    def _retry_incomplete(self, rows: CachedRows) -> CachedRows:
        """Read rows again whose shard may be complete now, and close earlier shards.

        A deleted file occupies its space until it is closed.
        """
        with self._lock:
            for number in [n for n in self._open if n < self.shard_of(rows.numbers[0])]:
                del self._open[number]
        incomplete = [at for at, fault in enumerate(rows.faults) if fault == INCOMPLETE]
        for future in self._start_reading(rows, incomplete):
            future.result()
        return rows

    def close(self) -> None:
        """Stop the threads and close all files; may be called again."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._pending.clear()
        self._open.clear()
        _readers.discard(self)

    def shard_of(self, row: int) -> int:
        return row // self.manifest.rows_per_shard

    def _fill_rows(self, shard: int, rows: CachedRows, places: list[int]) -> None:
        """Read the rows of a shard that a micro-batch has, on a thread."""
        faults = self._try_rows(shard, rows, places)
        if any(fault not in UNDAMAGED for fault in faults):
            # The shard may have been repaired since it was opened: read the present file once.
            with self._lock:
                self._open.pop(shard, None)
            faults = self._try_rows(shard, rows, places)
        for at, fault in zip(places, faults, strict=True):
            rows.faults[at] = fault
            if fault is not None:
                blank_row(rows.fields, at)
            if fault not in UNDAMAGED:
                self._warn_once(rows.numbers[at], fault)

    def _try_rows(self, shard: int, rows: CachedRows, places: list[int]) -> list[str | None]:
        """Read rows of a shard; return per row ``None``, or why it cannot be used."""
        numbers = [rows.numbers[at] for at in places]
        try:
            return self._open_shard(shard).read_rows(numbers, rows.fields, places)
        except FileNotFoundError:
            fault = INCOMPLETE
        except OSError as error:
            reason = STORE_FAILS if may_pass(error) else "it cannot be read"
            fault = f"{reason} ({error.strerror})"
        except ValueError as error:
            fault = str(error)
        return [fault] * len(places)

    def _open_shard(self, number: int) -> ShardFile:
        """Return an open shard.

        Raises:
            OSError: if it cannot be opened.
            ValueError: if it is incomplete or damaged.
        """
        with self._lock:
            found = self._open.get(number)
            if found is not None:
                self._open.move_to_end(number)
                return found
        place = shard_path(self.folder, self.manifest, number).parent
        if self._is_absent(place, number):
            raise FileNotFoundError
        try:
            found = ShardFile(self.folder, self.manifest, number)
        except FileNotFoundError:
            self._list_folder(place)
            raise
        # Another thread may still read a shard that is dropped: the last reference closes it.
        weakref.finalize(found, os.close, found.descriptor)
        with self._lock:
            self._open[number] = found
            while len(self._open) > max(self.limit // len(_readers), 1):
                self._open.popitem(last=False)
        return found

    def _is_absent(self, place: Path, number: int) -> bool:
        """Return whether the list of a shard's folder, if there is one, lacks the shard."""
        with self._listing:
            if place not in self._listed:
                return False
            listed_at, shards = self._listed[place]
        if number not in shards and time.monotonic() - listed_at >= self.poll_s:
            shards = self._list_folder(place)
        return number not in shards

    def _list_folder(self, place: Path) -> set[int]:
        """List the complete shards of a folder, and keep the list."""
        called_at = time.monotonic()
        with self._listing:
            listed = self._listed.get(place)
            if listed is None or listed[0] < called_at:  # else another thread has just listed it
                listed = self._listed[place] = (time.monotonic(), list_shards(place))
        return listed[1]

    def _warn_once(self, row: int, fault: str | None) -> None:
        """Log that a shard is damaged, or that its store fails, once per shard."""
        number, fails = self.shard_of(row), str(fault).startswith(STORE_FAILS)
        with self._lock:
            new = (number, fails) not in self._warned
            self._warned.add((number, fails))
        if new:
            path = shard_path(self.folder, self.manifest, number)
            remedy = "see that the storage works" if fails else "build this shard again"
            logger.warning("%s, row %d: %s; %s", path, row, fault, remedy)


def blank_row(fields: dict[str, Tensor], at: int) -> None:
    """Overwrite a row that cannot be used: uniform attention, and features of zero."""
    for field in fields.values():
        field[at].zero_()
    if "attention" in fields:
        fields["attention"][at].fill_(1 / fields["attention"].shape[1])
