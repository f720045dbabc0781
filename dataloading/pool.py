"""Read and decode outside the training process, whose interpreter launches kernels.

Whole micro-batches are handed over: their plan is written into a slot of shared memory, workers
fill the slot, and the training process is woken by their answers. Draws, order, grey views and
errors are those of decoding in threads.
"""

import contextlib
import logging
import os
import pickle
import signal
import subprocess
import sys
import weakref
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dataloading.entries import ENTRY
from dataloading.errors import ReadError
from dataloading.index import Index
from dataloading.plan import Plan
from dataloading.reading import LOOK_AHEAD, Reader, Views, copy_beside, copy_stream, lend
from dataloading.ring import FAILED, UNREADABLE, Layout, Slot, chunks, map_head, new_memory
from dataloading.worker import IGNORED, RECORD, Job

logger = logging.getLogger(__name__)

_DEATHS = 2  # within one micro-batch, after which it is given up
_AT_ONCE = 512  # answers that one call reads


class WorkerDiedError(Exception):
    """Worker processes ended by themselves.

    Attributes:
        worker: the first of them; ``None``: all at once.
    """

    def __init__(self, how: str, worker: int | None = None) -> None:
        super().__init__(how)
        self.worker = worker


class Processes:
    """Worker processes; they serve until ``close``, or until the first of them dies.

    Args:
        job: what they do; its pipes are made here.
    """

    def __init__(self, job: Job) -> None:
        tasks, self._tasks = os.pipe()
        self._results, results = os.pipe()
        order = os.memfd_create("job", os.MFD_CLOEXEC)
        with open(order, "wb", closefd=False) as file:
            pickle.dump(replace(job, tasks=tasks, results=results), file)
        os.lseek(order, 0, os.SEEK_SET)
        path = os.pathsep.join(filter(None, sys.path))
        only_cpu = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        # A signal to the whole group must not end them before they ignore it themselves.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED)
        try:
            self._server = subprocess.Popen(
                [sys.executable, "-P", "-m", "dataloading.worker", str(order)],
                stdin=subprocess.PIPE,
                pass_fds=(order, job.memory, tasks, results),
                env=os.environ | {"PYTHONPATH": path} | only_cpu,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            for descriptor in (order, tasks, results):
                os.close(descriptor)
        self.close = weakref.finalize(self, _end, self._server, self._tasks, self._results)

    def kill(self) -> None:
        """Kill the workers; ``answers`` then raises."""
        self._server.kill()  # the kernel kills the workers with it

    def request(self, slot: int, layout: Layout) -> None:
        """Request all views of a slot; if workers are dead, ``answers`` raises."""
        with contextlib.suppress(BrokenPipeError):
            os.write(self._tasks, b"".join(RECORD.pack(slot, k) for k in chunks(layout)))

    def answers(self) -> list[tuple[int, int]]:
        """Wait until requests are done; returns slot and first view of each.

        Raises:
            WorkerDiedError: a worker is dead, and with it all are.
        """
        found = list(RECORD.iter_unpack(os.read(self._results, RECORD.size * _AT_ONCE)))
        if not found:
            raise WorkerDiedError(_how(self._server.wait()))
        for number, status in found:
            if number < 0:
                raise WorkerDiedError(_how(os.waitstatus_to_exitcode(status)), -1 - number)
        return found


def _end(server: "subprocess.Popen[bytes]", tasks: int, results: int) -> None:
    """Kill the workers and wait until they are dead."""
    server.kill()
    server.wait()
    os.close(tasks)
    while os.read(results, 4096):  # until the last of them has closed its end
        pass
    os.close(results)
    if server.stdin is not None:
        server.stdin.close()


def _how(code: int) -> str:
    """Describe the exit code of a process."""
    if code >= 0:
        return f"ended with code {code}"
    kind = signal.Signals(-code).name
    return f"was killed by {kind}{' (out of memory?)' if -code == signal.SIGKILL else ''}"


@dataclass
class _Work:
    """A micro-batch in preparation."""

    plan: Plan
    slot: Slot
    left: set[int]
    """First views of the requests that are not answered."""
    deaths: int = 0
    failure: str = ""
    """Why it was given up."""


class WorkerPool:
    """Worker processes and the slots that they fill, in the order of submission.

    Dead workers are replaced, once per micro-batch, and all micro-batches in preparation are
    requested again: a view is a function of its plan.

    Args:
        index: the samples.
        patience_s: seconds for which a failed read is retried.
        layout: of the slots.
        store_cache: see ``Reader``.
    """

    def __init__(
        self, index: Index, patience_s: float, layout: Layout, store_cache: Path | None
    ) -> None:
        self._index, self._layout = index, layout
        self._memory = new_memory(layout)
        weakref.finalize(self, os.close, self._memory)
        self._busy = map_head(self._memory, layout)
        bare = replace(index, entries=np.zeros(0, ENTRY), names=(), labels=(), excluded=())
        self._job = Job(bare, layout, self._memory, 0, 0, patience_s, store_cache)
        self._processes = Processes(self._job)
        self._ending = False
        self._slots: list[Slot] = []
        self._works: deque[_Work] = deque()

    def submit(self, plan: Plan) -> None:
        """Let workers begin a micro-batch; returns at once."""
        slot = self._free_slot()
        slot.write_plan(plan, self._index)
        self._works.append(_Work(plan, slot, set(chunks(self._layout))))
        self._processes.request(slot.number, self._layout)

    def collect(self) -> tuple[Slot, list[str | None]]:
        """Wait for the oldest micro-batch.

        Returns:
            Its slot, which is reused once its ``in_use`` returns false, and for each view
            ``None``, or why it is grey.

        Raises:
            ReadError: storage did not return an image, or workers died again and again; the next
                call returns the next micro-batch.
            RuntimeError: a fault of the program, with its traceback.
        """
        work = self._works[0]
        while work.left:
            try:
                for number, first in self._processes.answers():
                    one = next(one for one in self._works if one.slot.number == number)
                    one.left.discard(first)
            except WorkerDiedError as error:
                if self._ending:
                    raise ReadError("the workers were stopped") from error
                self._replace(error)
        self._works.popleft()
        if work.deaths >= _DEATHS:
            raise ReadError(work.failure)
        return work.slot, find_faults(work.slot)

    def hurry(self) -> None:
        """End a ``collect`` of another thread at once: the views are no longer needed."""
        self._ending = True
        self._processes.kill()

    def close(self) -> None:
        """Kill the workers; may be repeated."""
        self._ending = True
        self._processes.close()
        self._works.clear()

    def _free_slot(self) -> Slot:
        """Return an unused slot, after extending the memory if all slots are used."""
        taken = [work.slot for work in self._works]
        for slot in self._slots:
            if slot not in taken and not slot.in_use():
                return slot
        number = len(self._slots)
        layout = self._layout
        os.ftruncate(self._memory, layout.head_bytes() + (number + 1) * layout.slot_bytes())
        self._slots.append(Slot(self._memory, layout, number))
        return self._slots[-1]

    def _replace(self, error: WorkerDiedError) -> None:
        """Start new workers, and request again the micro-batches in preparation.

        The oldest micro-batch is given up when workers have died twice before it was ready.
        """
        self._processes.close()
        oldest = self._works[0]
        oldest.deaths += 1
        text = f"a data worker {error}{self._present(error.worker)}"
        if oldest.deaths >= _DEATHS:
            oldest.failure = (
                f"{text}, for the second time in one micro-batch; free memory, lower data.workers, "
                "or set data.worker_type=thread, then launch again"
            )
            oldest.left.clear()
        logger.warning("%s; new workers take over", text)
        self._busy[:] = 0
        self._processes = Processes(self._job)
        for work in self._works:
            if work.left:
                work.left = set(chunks(self._layout))
                self._processes.request(work.slot.number, self._layout)

    def _present(self, worker: int | None) -> str:
        """Name the image that a worker was busy with, if any."""
        place = int(self._busy[worker]) - 1 if worker is not None else -1
        if place < 0:
            return ""
        slot, view = divmod(place, self._layout.views)
        work = next((work for work in self._works if work.slot.number == slot), None)
        if work is None:
            return ""
        return f" while it decoded {self._index.names[int(work.plan.ids[view])]}"


def find_faults(slot: Slot) -> list[str | None]:
    """Return why views are grey.

    Raises:
        ReadError: for the first view that could not be read.
        RuntimeError: for the first view at which a worker failed.
    """
    found: list[str | None] = [None] * len(slot.outcomes)
    for view in np.flatnonzero(slot.outcomes).tolist():
        reason = slot.read_reason(view)
        if slot.outcomes[view] == UNREADABLE:
            raise ReadError(reason)
        if slot.outcomes[view] == FAILED:
            raise RuntimeError(f"a data worker failed; please report this:\n{reason}")
        found[view] = reason
    return found


def make_readers(reader: Reader, micro_batch: int, workers: int) -> WorkerPool:
    """Make workers that read and check, and decode nothing; arguments as ``ProcessDecoder``'s."""
    largest = int(reader.index.entries["size"].max())
    layout = Layout(micro_batch, (), micro_batch * largest, workers)
    return WorkerPool(reader.index, reader.patience_s, layout, reader.store_cache)


class ProcessDecoder:
    """Worker processes read, decode, crop and resize.

    Args:
        reader: its index and patience are those of the workers; closed with this object.
        sizes: sides of the images.
        micro_batch: views in every plan.
        workers: processes; each uses one core.
        device: where the views are put; slots are pinned for a GPU.
    """

    ahead = LOOK_AHEAD

    def __init__(
        self,
        reader: Reader,
        sizes: tuple[int, ...],
        micro_batch: int,
        workers: int,
        device: torch.device,
    ) -> None:
        self._device = device
        self._reader = reader
        layout = Layout(micro_batch, sizes, 0, workers)
        self._pool = WorkerPool(reader.index, reader.patience_s, layout, reader.store_cache)
        self._copies = copy_stream(device)
        self._cuda: Any = torch.cuda.cudart() if device.type == "cuda" else None
        self._pinned: set[Slot] = set()

    def submit(self, plan: Plan) -> None:
        self._pool.submit(plan)

    def collect(self) -> Views:
        slot, faults = self._pool.collect()
        if self._device.type == "cuda":
            return Views(self._copy(slot), faults)
        lent = [lend(array) for array in slot.images]
        held = [is_held for _, is_held in lent]
        slot.in_use = lambda: any(is_held() for is_held in held)
        return Views(tuple(image for image, _ in lent), faults)

    def close(self) -> None:
        self._pool.close()
        self._reader.close()
        if self._pinned:
            torch.cuda.synchronize(self._device)
        for slot in self._pinned:
            for array in slot.images:
                self._cuda.cudaHostUnregister(array.ctypes.data)
        self._pinned.clear()

    def _copy(self, slot: Slot) -> tuple[Tensor, ...]:
        """Copy a slot from pinned memory to the GPU, asynchronously, concurrently with its work."""
        if slot not in self._pinned:
            for array in slot.images:
                error = self._cuda.cudaHostRegister(array.ctypes.data, array.nbytes, 0)
                torch.cuda.check_error(int(error))
            self._pinned.add(slot)
        images = [torch.as_tensor(array) for array in slot.images]
        copies = copy_beside(images, self._device, self._copies)
        copied = torch.cuda.Event()
        copied.record(self._copies)
        slot.in_use = lambda: not copied.query()
        return tuple(copies)
