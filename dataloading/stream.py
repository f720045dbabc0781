"""The endless sequence of views that a rank sees, read and decoded ahead of it."""

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Literal, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dataloading.headers import HeaderError, size_of_bytes
from dataloading.index import Index
from dataloading.order import sample_ids, sequential_ids
from dataloading.quarantine import Quarantine
from dataloading.torch_decode import (
    DecoderName,
    UndecodableError,
    crop_and_resize,
    make_decoder,
)
from dataloading.views import crop_boxes

logger = logging.getLogger(__name__)

GREY = 128
_LOOK_AHEAD = 3  # micro-batches in work beside the one that is handed out
_READ_TRIES = 3
_READ_PAUSE_S = 0.2


class Batch(NamedTuple):
    """One micro-batch of views.

    Attributes:
        images: uint8 RGB ``[B, S, S, 3]``, one for each size, all from the same crops.
        position: place in the global stream, int64 ``[B]``.
        sample_id: row of the index, int64 ``[B]``.
        view: number of the view of that sample, int64 ``[B]``.
        valid: whether the picture could be decoded, bool ``[B]``; the others are grey.
    """

    images: tuple[Tensor, ...]
    position: Tensor
    sample_id: Tensor
    view: Tensor
    valid: Tensor


class _Pending(NamedTuple):
    """A micro-batch in work; each future ends with ``None`` or the reason of a failure."""

    images: tuple[Tensor, ...]
    positions: NDArray[np.int64]
    ids: NDArray[np.int64]
    views: NDArray[np.int64]
    faults: list[Future[str | None]]


class Stream:
    """Endless iterator of ``Batch``, a pure function of its arguments and the index.

    The j-th batch holds positions ``start_position + (j*world_size + rank)*micro_batch`` and the
    ``micro_batch - 1`` that follow. A sample that cannot be read or decoded keeps its place, with
    ``valid`` false and a grey picture; nothing else changes.

    Args:
        index: the samples.
        seed: of order, crops and mirroring.
        micro_batch: views a batch, B.
        rank: this process's place among ``world_size``.
        world_size: number of processes that share the stream.
        sizes: sides of the pictures.
        scale: range of the crop's share of the area, within ``(0, 1]``.
        ratio: range of the crop's width / height.
        flip: mirror half of the views.
        count: number of distinct views a sample (view = epoch mod count); ``None``: view = epoch.
        shuffle: "full", a fresh permutation each epoch, or "none", index order.
        threads: reader and decoder threads, >= 1; each uses one core.
        start_position: position of the first draw of rank 0.
        decode: "auto" or "torch", see ``torch_decode.make_decoder``.
        device: where batches are put; ``None``: the CPU. Copies to a GPU are asynchronous, on the
            current stream, from pinned memory.
        quarantine: JSON-lines file of failed samples; ``None``: the log alone names them.

    Attributes:
        draws: views handed out by this object so far.
        bad: how many of them were not valid.

    Raises:
        ValueError: for arguments out of range.
    """

    def __init__(
        self,
        index: Index,
        *,
        seed: int,
        micro_batch: int,
        rank: int = 0,
        world_size: int = 1,
        sizes: Sequence[int] = (224,),
        scale: tuple[float, float] = (0.2, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: bool = True,
        count: int | None = None,
        shuffle: Literal["full", "none"] = "full",
        threads: int = 4,
        start_position: int = 0,
        decode: DecoderName = "auto",
        device: torch.device | str | None = None,
        quarantine: str | os.PathLike[str] | None = None,
    ) -> None:
        _at_least_one(micro_batch=micro_batch, world_size=world_size, threads=threads)
        _at_least_one(
            samples=len(index), sizes=min(sizes, default=0), count=1 if count is None else count
        )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}; expected 0 <= rank < world_size = {world_size}")
        if start_position < 0:
            raise ValueError(f"start_position is {start_position}; expected >= 0")
        if shuffle not in ("full", "none"):
            raise ValueError(f"shuffle is {shuffle!r}; expected 'full' or 'none'")
        self._index = index
        self._seed = seed
        self._micro_batch = micro_batch
        self._sizes = tuple(sizes)
        self._scale, self._ratio, self._flip = scale, ratio, flip
        self._count = count
        self._shuffle = shuffle
        self._device = torch.device("cpu" if device is None else device)
        self._next_position = start_position + rank * micro_batch
        self._stride = world_size * micro_batch
        crop_boxes(seed, [0], [0], [1], [1], scale, ratio)  # complain here, not at the first batch

        self.draws = 0
        self.bad = 0
        self._source = index.open()
        self._decode = make_decoder(decode)
        self._quarantine = Quarantine(quarantine)
        self._pool: ThreadPoolExecutor | None = _start_threads(threads)
        self._pending: deque[_Pending] = deque()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        if self._pool is None:
            raise RuntimeError("the stream is closed")
        while len(self._pending) <= _LOOK_AHEAD:
            self._pending.append(self._submit(self._pool))
        return self._hand_out(self._pending.popleft())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the threads and wait for them; the stream yields nothing more. May be repeated."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=True, cancel_futures=True)
        self._pending.clear()

    def _submit(self, pool: ThreadPoolExecutor) -> _Pending:
        """Plan the next batch and set the threads to it."""
        batch = self._micro_batch
        positions = self._next_position + np.arange(batch, dtype=np.int64)
        self._next_position += self._stride
        if self._shuffle == "full":
            ids, epochs = sample_ids(len(self._index), self._seed, positions)
        else:
            ids, epochs = sequential_ids(len(self._index), positions)
        views = epochs if self._count is None else epochs % self._count
        rows = self._index.entries[ids]
        boxes, flips = crop_boxes(
            self._seed, ids, views, rows["width"], rows["height"], self._scale, self._ratio
        )
        pin = self._device.type == "cuda"
        images = tuple(
            torch.empty(batch, size, size, 3, dtype=torch.uint8, pin_memory=pin)
            for size in self._sizes
        )
        arrays: list[NDArray[np.uint8]] = [image.numpy() for image in images]
        faults = [
            pool.submit(
                self._fill,
                int(ids[k]),
                boxes[k].tolist(),
                bool(flips[k]) and self._flip,
                [array[k] for array in arrays],
            )
            for k in range(batch)
        ]
        return _Pending(images, positions, ids, views, faults)

    def _fill(
        self, sample: int, box: list[int], flip: bool, out: list[NDArray[np.uint8]]
    ) -> str | None:
        """Put one view into its place; runs in a thread. Returns why it failed, if it did."""
        row = self._index.entries[sample]
        try:
            data = _read(lambda: self._source.read(sample), self._index.names[sample])
            if len(data) != row["size"]:
                raise UndecodableError(f"{len(data)} bytes, the index says {row['size']}")
            size = size_of_bytes(data)
            if size != (row["width"], row["height"]):
                raise UndecodableError(
                    f"{size[0]} x {size[1]} pixels, the index says {row['width']} x {row['height']}"
                )
            pictures = crop_and_resize(self._decode(data), box, self._sizes, flip)
        except (UndecodableError, HeaderError) as error:
            fault = str(error)
        except OSError as error:
            fault = f"cannot be read: {error.strerror}"
        else:
            for place, picture in zip(out, pictures, strict=True):
                place[...] = picture
            return None
        for place in out:
            place[...] = GREY
        return fault

    def _hand_out(self, pending: _Pending) -> Batch:
        """Wait for a batch, count and report its failures, put it on the device."""
        faults = [future.result() for future in pending.faults]
        ids: list[int] = pending.ids.tolist()
        for sample, fault in zip(ids, faults, strict=True):
            if fault is not None:
                self._quarantine.add(sample, self._index.names[sample], fault)
        self.draws += len(faults)
        self.bad += sum(fault is not None for fault in faults)
        return Batch(
            tuple(self._move(image) for image in pending.images),
            self._move(torch.as_tensor(pending.positions)),
            self._move(torch.as_tensor(pending.ids)),
            self._move(torch.as_tensor(pending.views)),
            self._move(torch.tensor([fault is None for fault in faults])),
        )

    def _move(self, tensor: Tensor) -> Tensor:
        if self._device.type != "cuda":
            return tensor.to(self._device)
        pinned = tensor if tensor.is_pinned() else tensor.pin_memory()
        return pinned.to(self._device, non_blocking=True)


def _at_least_one(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; expected at least 1")


def _start_threads(number: int) -> ThreadPoolExecutor:
    """Start all threads at once, each with one torch thread; the caller keeps its own number.

    ``torch.set_num_threads`` acts on the calling thread and on all that first use torch later,
    hence the restoration.
    """
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(number, thread_name_prefix="decode", initializer=_use_one_core)
    ready = threading.Barrier(number + 1)
    for _ in range(number):
        pool.submit(ready.wait)
    ready.wait()
    torch.set_num_threads(before)
    return pool


def _use_one_core() -> None:
    torch.get_num_threads()  # takes the process's number now, so that it does not come later
    torch.set_num_threads(1)


def _read(read: Callable[[], bytes], name: str) -> bytes:
    """Read with a few more tries: network storage has bad moments; a missing file has not."""
    for left in reversed(range(_READ_TRIES)):
        try:
            return read()
        except (FileNotFoundError, PermissionError):
            raise
        except OSError as error:
            if not left:
                raise
            logger.warning("%s: %s; %d tries left", name, error.strerror, left)
            time.sleep(_READ_PAUSE_S)
    raise RuntimeError("unreachable")
