"""Read the bytes of samples in threads, with retries, and check them against the index."""

import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dataloading.entries import SIDEWAYS, orientation_of
from dataloading.errors import DataError
from dataloading.errors import UndecodableError as UndecodableError
from dataloading.headers import MAX_SCANS, HeaderError, has_many_scans, size_of_bytes
from dataloading.index import Index
from dataloading.patience import PATIENCE_S, Patience
from dataloading.plan import Plan
from dataloading.shard_names import unit_of
from dataloading.turns import Box, turn_box

LOOK_AHEAD = 3
"""Micro-batches in preparation beside the returned one."""
GREY = 128
"""Value of every pixel of an undecodable view."""


class Views(NamedTuple):
    """Views of one micro-batch.

    Attributes:
        images: uint8 RGB ``[B, S, S, 3]``, one for each size, all from the same crops.
        faults: for each view ``None``, or why it is grey.
    """

    images: tuple[Tensor, ...]
    faults: list[str | None]


class Decoder(Protocol):
    """Turns plans into views, several micro-batches at a time, in the order of submission.

    Attributes:
        ahead: plans to submit beyond the one that is collected, to avoid waiting.
    """

    ahead: int

    def submit(self, plan: Plan) -> None:
        """Begin to read and decode; returns at once."""
        ...

    def collect(self) -> Views:
        """Wait for the oldest micro-batch that was submitted and not collected.

        Raises:
            ReadError: storage did not return an image; the next call collects the next plan.
        """
        ...

    def close(self) -> None:
        """Stop all threads; nothing can be submitted or collected any more."""
        ...


class Reader:
    """Reads encoded images; safe in threads.

    Wrong bytes are a property of the sample and the same at every launch. Missing bytes are
    temporary and must not change what a run sees; hence the two errors.

    Args:
        index: the samples.
        patience_s: seconds for which a failed read is retried.
        store_cache: folder for pieces of remote tars; ``None``: each read is a request.
    """

    def __init__(
        self, index: Index, patience_s: float = PATIENCE_S, store_cache: Path | None = None
    ) -> None:
        self.patience_s = patience_s
        self.store_cache = store_cache
        self.index = index
        self._source = index.open(store_cache)
        self._patience = Patience(patience_s)

    def read(self, sample: int) -> bytes:
        """Read a sample, and require that its length and stored size are those in the index.

        Raises:
            UndecodableError: if they are not.
            ReadError: if storage does not return it in time.
        """
        data = self._patience.retry(
            lambda: self._source.read(sample), lambda: self._place_of(sample)
        )
        indexed = int(self.index.entries["size"][sample])
        if len(data) != indexed:
            found = f"{len(data)}" if len(data) < indexed else "more"
            raise UndecodableError(f"{found} bytes, the index says {indexed}")
        try:
            size = size_of_bytes(data)
        except HeaderError as error:
            raise UndecodableError(str(error)) from error
        width, height = self.stored_size(sample)
        if size != (width, height):
            raise UndecodableError(
                f"{size[0]} x {size[1]} pixels, the index says {width} x {height}"
            )
        if has_many_scans(data):
            raise UndecodableError(f"JPEG with more than {MAX_SCANS} scans, which takes minutes")
        return data

    def prefetch(self, samples: Sequence[int]) -> None:
        """Begin to read samples that are needed soon, where reads are slow; returns at once."""
        self._source.prefetch(samples)

    def _place_of(self, sample: int) -> str:
        path, offset = self.index.where(sample)
        return str(path) if offset is None else f"{path}, {unit_of(str(path))} {offset}"

    def orientation(self, sample: int) -> int:
        """Return the EXIF orientation by which a sample is turned, 1 to 8; 1: as stored."""
        return orientation_of(int(self.index.entries["flags"][sample]))

    def stored_size(self, sample: int) -> tuple[int, int]:
        """Return (width, height) of a sample as stored, before it is turned upright."""
        entries = self.index.entries
        width, height = int(entries["width"][sample]), int(entries["height"][sample])
        return (height, width) if self.orientation(sample) >= SIDEWAYS else (width, height)

    def stored_box(self, sample: int, box: Sequence[int]) -> tuple[Box, int]:
        """Return a box of the upright image as a box of the stored image, and the orientation."""
        orientation = self.orientation(sample)
        return turn_box(box, *self.stored_size(sample), orientation), orientation

    def hurry(self) -> None:
        """End all retries: the results are no longer needed."""
        self._patience.end()

    def close(self) -> None:
        self._source.close()


def start_threads(number: int) -> ThreadPoolExecutor:
    """Start all threads at once, each with one torch thread; the caller keeps its own number.

    ``torch.set_num_threads`` acts on the calling thread and on all that first use torch later,
    hence the restoration.

    Raises:
        DataError: if the system refuses to start the threads.
    """
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(number, thread_name_prefix="decode", initializer=_use_one_core)
    ready = threading.Barrier(number + 1)
    try:
        for _ in range(number):
            pool.submit(ready.wait)
    except RuntimeError as error:
        ready.abort()  # those that were started wait for the others, and the process for them
        pool.shutdown(wait=False)
        raise DataError(
            f"{number} threads that decode cannot be started ({error}); lower data.workers "
            "(--threads), or raise the limit of processes (ulimit -u, the container's pids)"
        ) from error
    ready.wait()
    torch.set_num_threads(before)
    return pool


def _use_one_core() -> None:
    torch.get_num_threads()  # applies the process's number now, not later
    torch.set_num_threads(1)


def lend(memory: NDArray[np.uint8]) -> tuple[Tensor, Callable[[], bool]]:
    """Make a tensor of memory that is reused once nothing holds the tensor any more.

    Returns:
        The tensor, and a function that returns whether anything holds the tensor, a view of it, or
        an array or tensor made from either.
    """
    # torch keeps the very array that a tensor is made from until the last such view is gone.
    # Counting references to the memory does not work: Python versions count differently.
    array = memory[:]
    held = weakref.ref(array)
    return torch.as_tensor(array), lambda: held() is not None


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Move a tensor to a device; to a GPU asynchronously, from pinned memory."""
    if device.type != "cuda" or tensor.device.type == "cuda":
        return tensor.to(device)
    pinned = tensor if tensor.is_pinned() else tensor.pin_memory()
    return pinned.to(device, non_blocking=True)


def copy_beside(
    tensors: Sequence[Tensor], device: torch.device, stream: torch.cuda.Stream | None
) -> list[Tensor]:
    """Copy pinned tensors to a GPU on a stream of their own, concurrently with computation.

    Work that is launched afterwards on the current stream waits for them; the host does not.

    Args:
        tensors: on the host, pinned.
        device: where they are needed.
        stream: for the copies; ``None``: the device is not a GPU.
    """
    if stream is None:
        return [tensor.to(device) for tensor in tensors]
    current = torch.cuda.current_stream(device)
    with torch.cuda.stream(stream):
        copies = [tensor.to(device, non_blocking=True) for tensor in tensors]
    current.wait_stream(stream)
    for copy in copies:
        copy.record_stream(current)
    return copies


def copy_stream(device: torch.device) -> torch.cuda.Stream | None:
    """Return a stream for ``copy_beside``."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None
