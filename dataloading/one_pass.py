"""Crop listed samples, each once, for evaluation."""

import logging
from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dataloading.index import Index
from dataloading.patience import PATIENCE_S
from dataloading.plan import Plan
from dataloading.reading import Decoder, Reader, to_device
from dataloading.stream import LOOK_AHEAD, Batch, DecoderName, make_decoder
from dataloading.views import Boxes, centre_boxes

logger = logging.getLogger(__name__)

CENTRE = 224 / 256
"""Side of the centre crop as a fraction of the shorter side."""

Crop = Callable[[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]], Boxes]
"""From positions in the list, widths and heights, ``[B]`` each, to boxes ``[B, 4]``."""


def centre_crop(
    positions: NDArray[np.int64], widths: NDArray[np.int64], heights: NDArray[np.int64]
) -> Boxes:
    """Return the centre crops of images of these sizes."""
    return centre_boxes(widths, heights, CENTRE)


class OnePass:
    """Iterator of ``Batch``: each listed sample once over all ranks, cut and resized.

    Block b of ``micro_batch`` samples belongs to rank ``b mod world_size``. All ranks get equally
    many batches of one size; padding repeats the last sample, is not valid, and has a
    ``position`` at or beyond the end of the list. A sample that cannot be decoded is logged and is
    not valid either.

    Args:
        index: the samples.
        ids: rows of the index, int64 ``[n]``, n >= 1.
        micro_batch: views per batch, B.
        size: side of the images.
        rank: this process's place among ``world_size``.
        world_size: number of processes that share the list.
        threads: reader and decoder threads, >= 1.
        decode: as for ``Stream``.
        device: where batches are put; ``None``: the CPU.
        patience_s: seconds for which a failed read is retried.
        crop: box of each listed sample; the centre crop by default.

    Raises:
        DataError: if DALI is requested and not installed.
        ValueError: for an empty list.

    ``next`` raises ``ReadError`` where storage does not return a sample in time.
    """

    def __init__(
        self,
        index: Index,
        ids: NDArray[np.int64],
        *,
        micro_batch: int,
        size: int,
        rank: int = 0,
        world_size: int = 1,
        threads: int = 4,
        decode: DecoderName = "auto",
        device: torch.device | str | None = None,
        patience_s: float = PATIENCE_S,
        crop: Crop = centre_crop,
    ) -> None:
        if not len(ids):
            raise ValueError("no samples are listed")
        self._index, self._ids, self._micro_batch = index, ids, micro_batch
        self._rank, self._world_size = rank, world_size
        self._crop = crop
        self._number = -(-len(ids) // (micro_batch * world_size))
        self._device = torch.device("cpu" if device is None else device)
        self._decoder: Decoder | None = make_decoder(
            decode, Reader(index, patience_s), (size,), micro_batch, threads, self._device
        )
        self._plans = map(self._plan, range(self._number))
        self._pending: deque[Plan] = deque()
        self._handed_out = 0

    def __len__(self) -> int:
        return self._number

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        if self._decoder is None:
            raise RuntimeError("the pass is closed")
        if self._handed_out == self._number:
            raise StopIteration
        for plan in islice(self._plans, LOOK_AHEAD + 1 - len(self._pending)):
            self._decoder.submit(plan)
            self._pending.append(plan)
        self._handed_out += 1
        plan = self._pending.popleft()
        images, faults = self._decoder.collect()
        return self._hand_out(plan, images[0], faults)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the threads and wait for them. May be repeated."""
        decoder, self._decoder = self._decoder, None
        if decoder is not None:
            decoder.close()

    def _plan(self, number: int) -> Plan:
        """Plan this rank's batch with a number; the last batches are padded."""
        block = number * self._world_size + self._rank
        positions = block * self._micro_batch + np.arange(self._micro_batch, dtype=np.int64)
        ids = self._ids[np.minimum(positions, len(self._ids) - 1)]
        rows = self._index.entries[ids]
        boxes = self._crop(positions, rows["width"], rows["height"])
        zeros = np.zeros_like(positions)
        return Plan(positions, ids, zeros, boxes, zeros.astype(np.bool_))

    def _hand_out(self, plan: Plan, images: Tensor, faults: list[str | None]) -> Batch:
        """Log undecodable samples and move the batch to the device."""
        listed: list[bool] = (plan.positions < len(self._ids)).tolist()
        faulty = [k for k, fault in enumerate(faults) if fault is not None and listed[k]]
        for place in faulty:
            name = self._index.names[int(plan.ids[place])]
            logger.warning("%s is excluded: %s", name, faults[place])
        valid = [one and fault is None for one, fault in zip(listed, faults, strict=True)]
        return Batch(
            (to_device(images, self._device),),
            to_device(torch.as_tensor(plan.positions), self._device),
            to_device(torch.as_tensor(plan.ids), self._device),
            to_device(torch.as_tensor(plan.views), self._device),
            to_device(torch.tensor(valid), self._device),
            plan,
            tuple(faulty),
        )
