"""Memory that a training process shares with its worker processes: slots of one micro-batch each.

It is an anonymous file (memfd): without a name nothing remains of it when processes are killed,
and ``/dev/shm`` does not bound it. Pages take memory once they are written, so that the space for
long names, reasons and encoded images costs nothing until it is used.
"""

import mmap
import os
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from dataloading.entries import ENTRY, encode_name
from dataloading.index import Index
from dataloading.plan import Plan

_PAGE = mmap.PAGESIZE
_LONGEST = 4096  # bytes of a name, and of a reason

READY, UNDECODABLE, UNREADABLE, FAILED = range(4)
"""Outcome of a view: its pixels, or a reason for grey, ``ReadError`` or a program fault."""


class Layout(NamedTuple):
    """Sizes of the arrays of a slot.

    Attributes:
        views: B.
        sizes: sides of the images; empty where encoded bytes are passed.
        encoded_bytes: room for all encoded images of a micro-batch together.
        workers: processes that share the memory.
    """

    views: int
    sizes: tuple[int, ...]
    encoded_bytes: int
    workers: int

    def fields(self) -> dict[str, tuple[DTypeLike, tuple[int, ...]]]:
        """Return dtype and shape of each array of a slot."""
        views = self.views
        found: dict[str, tuple[DTypeLike, tuple[int, ...]]] = {
            "rows": (ENTRY, (views,)),
            "names": (np.uint8, (views * _LONGEST,)),
            "ends": (np.int64, (views,)),
            "boxes": (np.int32, (views, 4)),
            "flips": (np.bool_, (views,)),
            "outcomes": (np.uint8, (views,)),
            "reasons": (np.uint8, (views, _LONGEST)),
            "encoded": (np.uint8, (self.encoded_bytes,)),
        }
        for number, size in enumerate(self.sizes):
            found[f"images{number}"] = (np.uint8, (views, size, size, 3))
        return found

    def slot_bytes(self) -> int:
        return sum(_room(*field) for field in self.fields().values())

    def head_bytes(self) -> int:
        return _room(np.int64, (self.workers,))


def _room(dtype: DTypeLike, shape: tuple[int, ...]) -> int:
    """Return the bytes of an array, rounded up to whole pages."""
    return -(-np.dtype(dtype).itemsize * int(np.prod(shape)) // _PAGE) * _PAGE


def new_memory(layout: Layout) -> int:
    """Return the descriptor of new memory without slots."""
    memory = os.memfd_create("views", os.MFD_CLOEXEC)
    os.ftruncate(memory, layout.head_bytes())
    return memory


def map_head(memory: int, layout: Layout) -> NDArray[np.int64]:
    """Map the view of each worker, int64 ``[workers]``: slot * B + view + 1; 0: nothing."""
    return np.frombuffer(mmap.mmap(memory, layout.head_bytes()), np.int64)[: layout.workers]


class Slot:
    """The arrays of one micro-batch; see ``Layout``.

    Args:
        memory: descriptor of the memory.
        layout: sizes of its arrays.
        number: of the slot; the memory reaches to its end.
    """

    def __init__(self, memory: int, layout: Layout, number: int) -> None:
        self.number = number
        size = layout.slot_bytes()
        self.map = mmap.mmap(memory, size, offset=layout.head_bytes() + number * size)
        arrays: dict[str, NDArray[Any]] = {}
        start = 0
        for name, (dtype, shape) in layout.fields().items():
            count = int(np.prod(shape))
            arrays[name] = np.frombuffer(self.map, dtype, count, start).reshape(shape)
            start += _room(dtype, shape)
        self.rows, self.boxes, self.flips = arrays["rows"], arrays["boxes"], arrays["flips"]
        self.outcomes, self.encoded = arrays["outcomes"], arrays["encoded"]
        self.images = [arrays[f"images{number}"] for number in range(len(layout.sizes))]
        self._names, self._ends, self._reasons = arrays["names"], arrays["ends"], arrays["reasons"]
        self.in_use: Callable[[], bool] = lambda: False

    def write_plan(self, plan: Plan, index: Index) -> None:
        """Write the parts of a plan that workers need; the index itself stays in its process."""
        self.rows[:] = index.entries[plan.ids]
        self.boxes[:] = plan.boxes
        self.flips[:] = plan.flips
        if index.source == "folder":
            ids: list[int] = plan.ids.tolist()
            names = [encode_name(index.names[sample]) for sample in ids]
            self._ends[:] = np.cumsum([len(name) for name in names])
            self._names[: self._ends[-1]] = np.frombuffer(b"".join(names), np.uint8)

    def read_names(self, first: int, last: int) -> list[str]:
        """Return the names of some views of a folder."""
        ends = [int(self._ends[first - 1]) if first else 0, *self._ends[first:last].tolist()]
        return [
            self._names[start:end].tobytes().decode("utf-8", "surrogateescape")
            for start, end in pairwise(ends)
        ]

    def encoded_starts(self) -> NDArray[np.int64]:
        """Return where the bytes of each view begin in ``encoded``, and their end, ``[B + 1]``."""
        return np.concatenate([[0], np.cumsum(self.rows["size"], dtype=np.int64)])

    def write_reason(self, view: int, outcome: int, reason: str) -> None:
        data = encode_name(reason)[-_LONGEST:].ljust(_LONGEST, b"\0")
        self._reasons[view] = np.frombuffer(data, np.uint8)
        self.outcomes[view] = outcome

    def read_reason(self, view: int) -> str:
        return self._reasons[view].tobytes().rstrip(b"\0").decode("utf-8", "replace")


def chunk_of(layout: Layout) -> int:
    """Return the views per request: micro-batches are shared evenly, in at most 128 requests."""
    views = layout.views
    return max(-(-views // 128), min(8, -(-views // layout.workers)))


def chunks(layout: Layout) -> Sequence[int]:
    """Return the first view of each request of a micro-batch."""
    return range(0, layout.views, chunk_of(layout))
