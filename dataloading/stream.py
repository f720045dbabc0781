"""A rank's endless sequence of views, read and decoded ahead of training."""

import logging
import os
from collections import deque
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple, Self, get_args

import numpy as np
import torch
from torch import Tensor

from dataloading.errors import DataError
from dataloading.index import Index
from dataloading.order import WINDOW, Shuffle
from dataloading.patience import PATIENCE_S
from dataloading.plan import Plan, Planner
from dataloading.pool import ProcessDecoder, make_readers
from dataloading.quarantine import Quarantine
from dataloading.reading import LOOK_AHEAD as LOOK_AHEAD
from dataloading.reading import Decoder, Reader, to_device
from dataloading.resident import ResidentDecoder
from dataloading.store_cache import StoreCache
from dataloading.stores import RemoteTar
from dataloading.torch_decode import TorchDecoder

logger = logging.getLogger(__name__)

DecoderName = Literal["auto", "dali", "torch"]
WorkerType = Literal["auto", "thread", "process"]


class Batch(NamedTuple):
    """One micro-batch of views.

    Attributes:
        images: uint8 RGB ``[B, S, S, 3]``, one for each size, all from the same crops.
        position: global sample index, int64 ``[B]``.
        sample_id: row of the index, int64 ``[B]``.
        view: number of the view of that sample, int64 ``[B]``.
        valid: whether the image could be decoded, bool ``[B]``; the others are grey.
        plan: the draws, on the host; ``None`` where no stream made the batch.
        faulty: places in the batch of the views that are not valid, on the host.
    """

    images: tuple[Tensor, ...]
    position: Tensor
    sample_id: Tensor
    view: Tensor
    valid: Tensor
    plan: Plan | None = None
    faulty: tuple[int, ...] = ()


class Stream:
    """Endless iterator of ``Batch``, a pure function of its arguments and the index.

    The j-th batch holds positions ``start_position + (j*world_size + rank)*micro_batch`` and the
    ``micro_batch - 1`` that follow. A sample that cannot be decoded, or does not match the index,
    keeps its place, with ``valid`` false and a grey image; nothing else changes. For a
    sample that cannot be read ``next`` raises ``ReadError`` in place of the batch.

    Args:
        index: the samples.
        seed: of order, crops and flips.
        micro_batch: views per batch, B.
        rank: this process's rank.
        world_size: number of processes that share the stream.
        sizes: sides of the images.
        scale: range of the crop's share of the area, within ``(0, 1]``.
        ratio: range of the crop's width / height.
        flip: flip half of the views horizontally.
        count: number of distinct views per sample (view = epoch mod count); ``None``: view = epoch.
        shuffle: "full", a fresh permutation each epoch; "window", a permutation that reads few
            blocks at a time; or "none", index order.
        threads: reader and decoder threads, >= 1; each uses one core.
        worker_type: "process", as many processes in place of threads, which do not occupy the
            interpreter of this process and take seconds to start; "thread"; "auto", processes where
            the device is a GPU and the images are not resident. The views are the same.
        start_position: position of the first draw of rank 0.
        decode: "dali", DALI on the device; "torch", the CPU;
            "auto", DALI where it is installed and the device is a GPU, else "torch", which is
            faster on a CPU. Draws, crops and flips do not depend on it.
        resident: keep all images decoded on the device and cut views there, for small sets;
            "dali" is refused with it. On a GPU a pixel may differ from that of "torch" by two
            levels of 255.
        device: where batches are put; ``None``: the CPU. Copies to a GPU are asynchronous, on the
            current stream, from pinned memory.
        quarantine: JSON-lines file of failed samples; ``None``: they are only logged.
        patience_s: seconds for which a failed read is retried.
        store_cache: folder of this node for pieces of tars of a store, which its processes share;
            ``None``: each sample is requested.
        watch: called with each plan as its images begin to be read, ahead of its batch.

    Attributes:
        ahead: micro-batches in preparation beside the returned one.
        draws: views returned so far.
        bad: number of returned views that were not valid.

    Raises:
        DataError: if DALI is requested and not installed, or the set is too large to be resident.
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
        shuffle: Shuffle = "full",
        threads: int = 4,
        worker_type: WorkerType = "auto",
        start_position: int = 0,
        decode: DecoderName = "auto",
        resident: bool = False,
        device: torch.device | str | None = None,
        quarantine: str | os.PathLike[str] | None = None,
        patience_s: float = PATIENCE_S,
        store_cache: Path | None = None,
        watch: Callable[[Plan], None] | None = None,
    ) -> None:
        _at_least_one(micro_batch=micro_batch, world_size=world_size, threads=threads)
        _at_least_one(
            samples=len(index), sizes=min(sizes, default=0), count=1 if count is None else count
        )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}; expected 0 <= rank < world_size = {world_size}")
        if start_position < 0:
            raise ValueError(f"start_position is {start_position}; expected >= 0")
        self._micro_batch = micro_batch
        self._device = torch.device("cpu" if device is None else device)
        self._next_position = start_position + rank * micro_batch
        self._stride = world_size * micro_batch
        self._plan = Planner(
            index, seed=seed, scale=scale, ratio=ratio, flip=flip, count=count, shuffle=shuffle
        )
        self.draws = 0
        self.bad = 0
        self._quarantine = Quarantine(index, quarantine)
        in_processes = use_processes(worker_type, resident, self._device)
        if store_cache is not None:
            whole = sum(tar.size for tar in index.shards if isinstance(tar, RemoteTar))
            near = 1.0 if shuffle == "full" else min(1.0, 2 * WINDOW / len(index))
            StoreCache(store_cache).require_room(near * whole, f"data.shuffle={shuffle}")
        reader = Reader(index, patience_s, store_cache)
        self._decoder: Decoder | None
        if resident:
            if decode == "dali":
                raise ValueError("decode is 'dali'; resident=True decodes on the CPU, once")
            self._decoder = ResidentDecoder(index, reader, tuple(sizes), threads, self._device)
        else:
            self._decoder = make_decoder(
                *(decode, reader, tuple(sizes), micro_batch, threads, self._device),
                in_processes=in_processes,
                in_thread=True,
            )
        self.ahead = self._decoder.ahead
        self._pending: deque[Plan] = deque()
        self._watch = watch

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        if self._decoder is None:
            raise RuntimeError("the stream is closed")
        while len(self._pending) <= self.ahead:
            positions = self._next_position + np.arange(self._micro_batch, dtype=np.int64)
            self._next_position += self._stride
            plan = self._plan(positions)
            self._decoder.submit(plan)
            if self._watch is not None:
                self._watch(plan)
            self._pending.append(plan)
        plan = self._pending.popleft()
        images, faults = self._decoder.collect()
        return self._hand_out(plan, images, faults)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the threads and wait for them; the stream yields nothing more. May be repeated."""
        decoder, self._decoder = self._decoder, None
        if decoder is not None:
            decoder.close()
        self._pending.clear()

    def _hand_out(
        self, plan: Plan, images: tuple[Tensor, ...], faults: Sequence[str | None]
    ) -> Batch:
        """Count and report a batch's failures, and move the batch to the device."""
        ids: list[int] = plan.ids.tolist()
        for sample, fault in zip(ids, faults, strict=True):
            if fault is not None:
                self._quarantine.add(sample, fault)
        self.draws += len(faults)
        self.bad += sum(fault is not None for fault in faults)
        return Batch(
            tuple(to_device(image, self._device) for image in images),
            to_device(torch.as_tensor(plan.positions), self._device),
            to_device(torch.as_tensor(plan.ids), self._device),
            to_device(torch.as_tensor(plan.views), self._device),
            to_device(torch.tensor([fault is None for fault in faults]), self._device),
            plan,
            tuple(place for place, fault in enumerate(faults) if fault is not None),
        )


def _at_least_one(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; expected at least 1")


def choose_decoder(name: DecoderName, device: torch.device) -> Literal["dali", "torch"]:
    """Resolve ``auto`` for a device; see ``Stream``."""
    if name != "auto":
        return name
    return "dali" if device.type == "cuda" and has_dali() else "torch"


def use_processes(worker_type: WorkerType, resident: bool, device: torch.device) -> bool:
    """Resolve ``auto`` for a device; see ``Stream``.

    Raises:
        ValueError: if the type is not known, or processes are requested for resident images.
    """
    if worker_type not in get_args(WorkerType):
        raise ValueError(f"worker_type is {worker_type!r}; expected one of {get_args(WorkerType)}")
    if worker_type == "process" and resident:
        raise ValueError("worker_type is 'process'; resident=True decodes once, in threads")
    return worker_type == "process" or (
        worker_type == "auto" and not resident and device.type == "cuda"
    )


def has_dali() -> bool:
    """Return whether DALI is installed."""
    return find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None


def require_decoder(name: DecoderName) -> None:
    """Refuse a decoder that is not installed.

    Raises:
        DataError: DALI is requested and not installed.
    """
    if name == "dali" and not has_dali():
        raise DataError(
            "data.decode=dali, but DALI is not installed; install the extra dali "
            "(CUDA 13: pip install 'cmtmae-scale[dali]') or dali12 "
            "(CUDA 12: pip install 'cmtmae-scale[dali12]'), or set data.decode=torch"
        )


def make_decoder(
    name: DecoderName,
    reader: Reader,
    sizes: tuple[int, ...],
    micro_batch: int,
    threads: int,
    device: torch.device,
    in_processes: bool = False,
    in_thread: bool = False,
) -> Decoder:
    """Choose a decoder; see ``Stream``. With ``in_thread`` DALI has a thread of its own.

    Raises:
        DataError: DALI is requested and not installed.
        ValueError: if the name is not known.
    """
    if resolve_decoder(name, device) == "dali":
        from dataloading.dali import DaliDecoder  # an optional package, slow to import
        from dataloading.own_thread import OwnThread

        workers = make_readers(reader, micro_batch, threads) if in_processes else None
        decoder = DaliDecoder(reader, sizes, micro_batch, threads, device, workers)
        return OwnThread(decoder, device) if in_thread else decoder
    if in_processes:
        return ProcessDecoder(reader, sizes, micro_batch, threads, device)
    return TorchDecoder(reader, sizes, threads, pin=device.type == "cuda")


def resolve_decoder(name: DecoderName, device: torch.device) -> Literal["dali", "torch"]:
    """Choose a decoder that is installed, and warn where a GPU could decode and does not.

    Raises:
        DataError: DALI is requested and not installed.
        ValueError: if the name is not known.
    """
    if name not in ("auto", "dali", "torch"):
        raise ValueError(f"decode is {name!r}; expected 'auto', 'dali' or 'torch'")
    chosen = choose_decoder(name, device)
    require_decoder(chosen)
    if name == "auto" and device.type == "cuda" and chosen == "torch":
        logger.warning(
            "DALI is not installed: the CPU decodes; for the GPU pip install 'cmtmae-scale[dali]' "
            "(CUDA 13) or 'cmtmae-scale[dali12]' (CUDA 12)"
        )
    return chosen
