"""Rows of a cache, read ahead of the step by threads, at their place in the parts."""

import logging
import os
import resource
import threading
import weakref
from collections import OrderedDict, deque
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from cmtmae_scale.cache.format import Manifest, part_path
from cmtmae_scale.cache.parts import INCOMPLETE, UNDECODED, PartFile
from dataloading.plan import Plan

logger = logging.getLogger(__name__)

THREADS = 4
MOST_OPEN = 4096
HARMLESS = (None, INCOMPLETE, UNDECODED)
"""What is no damage."""


class Rows(NamedTuple):
    """Rows of one micro-batch, B of them."""

    fields: dict[str, Tensor]
    """Tensors ``[B, ...]`` of ``Manifest.fields`` on the CPU; see ``blank`` for faulty rows."""
    numbers: list[int]
    """Numbers of the rows in the cache."""
    faults: list[str | None]
    """For each row ``None``, or why it cannot be used."""


class CacheReader:
    """Reads the rows of plans, several micro-batches at a time.

    A row's number is ``sample * count + view``, or the position where the cache is of a run's own
    stream. A part is looked for whenever a row of it is wanted and it is not open, so one that
    appears later is found then.

    Args:
        folder: ``cache.dir``.
        manifest: the cache's.
        count: views an image; ``None``: rows are positions, of which none is wanted twice.
        pin: read into pinned memory.
    """

    def __init__(self, folder: Path, manifest: Manifest, count: int | None, pin: bool) -> None:
        self.folder = folder
        self.manifest = manifest
        self.count = count
        self.pin = pin
        self.limit = min(MOST_OPEN, max(16, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4))
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="cache")
        self._pending: deque[tuple[Plan, Rows, list[Future[str | None]]]] = deque()
        self._lock = threading.Lock()
        self._open: OrderedDict[int, PartFile] = OrderedDict()
        self._warned: set[int] = set()

    def submit(self, plan: Plan) -> None:
        """Begin to read the rows of a micro-batch; returns at once."""
        places = plan.positions if self.count is None else plan.ids * self.count + plan.views
        numbers: list[int] = places.tolist()
        fields = {
            name: torch.empty((len(numbers), *shape), dtype=dtype, pin_memory=self.pin)
            for name, (dtype, shape) in self.manifest.fields().items()
        }
        futures = [self._pool.submit(self._fill, n, fields, k) for k, n in enumerate(numbers)]
        self._pending.append((plan, Rows(fields, numbers, []), futures))

    def collect(self, plan: Plan) -> Rows:
        """Wait for the rows of a plan; forgets those of the plans that were submitted before it.

        Raises:
            RuntimeError: if it was not submitted, or was collected before.
        """
        while self._pending:
            submitted, rows, futures = self._pending.popleft()
            wait(futures)
            if submitted is plan:
                rows = rows._replace(faults=[future.result() for future in futures])
                return rows if self.count is not None else self._followed(rows)
        raise RuntimeError("rows were collected that nobody asked for; please report this")

    def asked(self, plan: Plan) -> bool:
        """Whether a plan was submitted and not collected."""
        return any(submitted is plan for submitted, _, _ in self._pending)

    def _followed(self, rows: Rows) -> Rows:
        """Look again for rows whose part may have come since, and close the parts behind.

        A file that is deleted takes its space until it is closed.
        """
        with self._lock:
            for number in [n for n in self._open if n < self.part_of(rows.numbers[0])]:
                del self._open[number]
        late = [k for k, fault in enumerate(rows.faults) if fault == INCOMPLETE]
        again = [self._pool.submit(self._fill, rows.numbers[k], rows.fields, k) for k in late]
        faults = list(rows.faults)
        for k, future in zip(late, again, strict=True):
            faults[k] = future.result()
        return rows._replace(faults=faults)

    def close(self) -> None:
        """Stop the threads and close all files; may be repeated."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._pending.clear()
        self._open.clear()

    def part_of(self, row: int) -> int:
        """Number of the part that holds a row."""
        return row // self.manifest.rows_a_part

    def _fill(self, row: int, fields: dict[str, Tensor], place: int) -> str | None:
        """Read one row into its place; runs in a thread. Returns why it failed, if it did."""
        fault = self._read(row, fields, place)
        if fault not in HARMLESS:
            # Once more from the file of now: it may have been built again since it was opened.
            with self._lock:
                self._open.pop(self.part_of(row), None)
            fault = self._read(row, fields, place)
        if fault is not None:
            blank(fields, place)
        if fault not in HARMLESS:
            self._warn(row, fault)
        return fault

    def _read(self, row: int, fields: dict[str, Tensor], place: int) -> str | None:
        """Read one row; returns why it cannot be used, if it cannot."""
        try:
            return self._part(self.part_of(row)).read_row(row, fields, place)
        except FileNotFoundError:
            return INCOMPLETE
        except OSError as error:
            return f"it cannot be read ({error.strerror})"
        except ValueError as error:
            return str(error)

    def _part(self, number: int) -> PartFile:
        """Find a part among the open ones, or open it.

        Raises:
            OSError: if it cannot be opened.
            ValueError: if it is incomplete or damaged.
        """
        with self._lock:
            found = self._open.get(number)
            if found is not None:
                self._open.move_to_end(number)
                return found
        found = PartFile(self.folder, self.manifest, number)
        # Closed once nobody holds it: another thread may still be reading when it is dropped.
        weakref.finalize(found, os.close, found.descriptor)
        with self._lock:
            self._open[number] = found
            while len(self._open) > self.limit:
                self._open.popitem(last=False)
        return found

    def _warn(self, row: int, fault: str | None) -> None:
        """Tell of a damaged part, once."""
        number = self.part_of(row)
        with self._lock:
            new = number not in self._warned
            self._warned.add(number)
        if new:
            path = part_path(self.folder, number)
            logger.warning("%s, row %d: %s; build this part again", path, row, fault)


def blank(fields: dict[str, Tensor], place: int) -> None:
    """Overwrite a row that cannot be used: an even map, and features of zero."""
    for field in fields.values():
        field[place].zero_()
    if "attention" in fields:
        fields["attention"][place].fill_(1 / fields["attention"].shape[1])
