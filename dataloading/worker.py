"""Worker processes: they read and decode for one training process, into shared memory.

``python -m dataloading.worker`` imports torch once and forks the workers, which then share its
pages. Requests and answers are records of 8 bytes in two pipes that all workers share: Linux reads
and writes so few bytes of a pipe as a whole. Nothing outlives the training process: when it ends,
however it ends, the pipe on standard input closes, and the kernel kills workers with their parent.
"""

import ctypes
import gc
import importlib
import logging
import os
import pickle
import select
import signal
import struct
import sys
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dataloading.entries import ENTRY
from dataloading.errors import ReadError
from dataloading.index import Index
from dataloading.ring import (
    FAILED,
    READY,
    UNDECODABLE,
    UNREADABLE,
    Layout,
    Slot,
    chunk_of,
    map_head,
)

RECORD = struct.Struct("<iI")
"""A request or its answer: slot, first view. Of a dead worker: -1 - its number, wait status."""
IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Signals that ask a run to stop: the training process decides, workers serve it to its end."""

_PARENT_DEATH = 1  # PR_SET_PDEATHSIG of prctl(2)
_POLL_S = 0.5  # between two checks of the workers


@dataclass(frozen=True)
class Job:
    """What the workers of one stream do.

    Attributes:
        index: the data set without its samples: the rows that are needed are in the slots.
        layout: of the slots.
        memory: descriptor of the slots.
        tasks: descriptor of the pipe with requests.
        results: descriptor of the pipe for answers.
        patience_s: seconds for which a failed read is retried.
        store_cache: see ``Reader``.
    """

    index: Index
    layout: Layout
    memory: int
    tasks: int
    results: int
    patience_s: float
    store_cache: Path | None = None


def serve(job: Job) -> None:
    """Fork the workers, and wait until one of them or the training process ends."""
    importlib.import_module("dataloading.torch_decode").load_operators()  # once, for all workers
    gc.collect()
    gc.freeze()  # pages stay shared
    parent, server = os.getppid(), os.getpid()
    numbers: dict[int, int] = {}
    for number in range(job.layout.workers):
        pid = os.fork()
        if not pid:
            _run_worker(job, number, server)
        numbers[pid] = number
    while not select.select([0], [], [], _POLL_S)[0] and os.getppid() == parent:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            os.write(job.results, RECORD.pack(-1 - numbers[pid], status & 0xFFFF))
            break


def _run_worker(job: Job, number: int, server: int) -> None:
    """Work until the training process closes its pipe; never returns."""
    try:
        ctypes.CDLL(None).prctl(_PARENT_DEATH, signal.SIGKILL, 0, 0, 0)
        if os.getppid() == server:
            work(job, number)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def work(job: Job, number: int) -> None:
    """Answer requests until their pipe is closed.

    From a store, the samples of the next request, if any, are read while those of the present
    request are decoded.
    """
    layout, chunk = job.layout, chunk_of(job.layout)
    most = 2 if job.index.is_remote() else 1  # requests taken; others cannot take them any more
    rows, names = np.zeros(most * chunk, ENTRY), [""] * (most * chunk)  # the samples of those
    index = replace(job.index, entries=rows, names=names)
    fill, prefetch = _make_filler(index, job)
    busy = map_head(job.memory, layout)
    slots: dict[int, Slot] = {}
    taken: deque[tuple[bytes, Slot, range, int]] = deque()  # request, slot, views, first row
    start = 0
    if most > 1:
        os.set_blocking(job.tasks, False)  # another worker may be faster
    while True:
        while len(taken) < most and (record := _take(job.tasks, wait=not taken)) is not None:
            if not record:
                return
            place, first = RECORD.unpack(record)
            if place not in slots:
                slots[place] = Slot(job.memory, layout, place)
            slot, views = slots[place], range(first, min(first + chunk, layout.views))
            rows[start : start + len(views)] = slot.rows[first : views.stop]
            if index.source == "folder":
                names[start : start + len(views)] = slot.read_names(first, views.stop)
            prefetch(range(start, start + len(views)))
            taken.append((record, slot, views, start))
            start = (start + chunk) % len(rows)
        record, slot, views, row = taken.popleft()
        for view in views:
            busy[number] = slot.number * layout.views + view + 1
            _fill_view(fill, slot, view, row + view - views.start)
        busy[number] = 0
        os.write(job.results, record)


def _take(tasks: int, wait: bool) -> bytes | None:
    """Return the next request, empty when the pipe is closed; ``None``: there is none."""
    while True:
        try:
            return os.read(tasks, RECORD.size)
        except BlockingIOError:
            if not wait:
                return None
            select.select([tasks], [], [])


Filler = Callable[[Slot, int, int], str | None]
"""From slot, view and row to pixels or bytes in the slot; returns why the view is grey."""
Prefetch = Callable[[Sequence[int]], None]


def _fill_view(fill: Filler, slot: Slot, view: int, row: int) -> None:
    """Fill one view and write its outcome."""
    try:
        reason = fill(slot, view, row)
    except ReadError as error:
        slot.write_reason(view, UNREADABLE, str(error))
    except Exception:  # raised again, with this text, in the training process
        slot.write_reason(view, FAILED, traceback.format_exc())
    else:
        if reason is None:
            slot.outcomes[view] = READY
        else:
            slot.write_reason(view, UNDECODABLE, reason)


def _make_filler(index: Index, job: Job) -> tuple[Filler, Prefetch]:
    """Return the filler, which decodes, or reads where DALI decodes, and the prefetch function."""
    from dataloading.reading import Reader, UndecodableError
    from dataloading.torch_decode import ViewMaker

    reader, layout = Reader(index, job.patience_s, job.store_cache), job.layout
    if not layout.sizes:

        def read(slot: Slot, view: int, row: int) -> str | None:
            try:
                data = reader.read(row)
            except UndecodableError as error:
                return str(error)
            start = int(slot.rows["size"][:view].sum(dtype=np.int64))
            slot.encoded[start : start + len(data)] = np.frombuffer(data, np.uint8)
            return None

        return read, reader.prefetch
    make = ViewMaker(reader, layout.sizes)

    def decode(slot: Slot, view: int, row: int) -> str | None:
        places = [images[view] for images in slot.images]
        return make(row, slot.boxes[view].tolist(), bool(slot.flips[view]), places)

    return decode, reader.prefetch


def main() -> None:
    """Serve the job that is read from the descriptor on the command line."""
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, IGNORED)  # the parent blocked them until now
    logging.basicConfig(level=logging.WARNING, format="[data worker] %(message)s")
    with open(int(sys.argv[1]), "rb") as file:
        job: Any = pickle.load(file)  # written by the parent process into anonymous memory
    serve(job)


if __name__ == "__main__":
    main()
