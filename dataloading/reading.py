"""Bytes of samples, read by threads, tried again, and checked against the index."""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dataloading.headers import HeaderError, size_of_bytes
from dataloading.index import Index
from dataloading.plan import Plan

logger = logging.getLogger(__name__)

GREY = 128
"""Every pixel of a view that could not be made."""
_READ_TRIES = 3
_READ_PAUSE_S = 0.2


class UndecodableError(ValueError):
    """A picture cannot be used; the message is a short reason without a path."""


class Views(NamedTuple):
    """Views of one micro-batch.

    Attributes:
        images: uint8 RGB ``[B, S, S, 3]``, one for each size, all from the same crops.
        faults: for each view ``None``, or why it is grey.
    """

    images: tuple[Tensor, ...]
    faults: list[str | None]


class Decoder(Protocol):
    """From plans to views, several micro-batches at a time, in the order of their submission."""

    def submit(self, plan: Plan) -> None:
        """Begin to read and decode; returns at once."""
        ...

    def collect(self) -> Views:
        """Wait for the oldest micro-batch that was submitted and not collected."""
        ...

    def close(self) -> None:
        """Stop all threads; nothing can be submitted or collected any more."""
        ...


class Reader:
    """Reads encoded pictures; safe in threads.

    Args:
        index: the samples.
    """

    def __init__(self, index: Index) -> None:
        self._index = index
        self._source = index.open()

    def read(self, sample: int) -> bytes:
        """Read a sample whose length, width and height are those of the index.

        Raises:
            UndecodableError: if they are not, or the storage does not give it.
        """
        row = self._index.entries[sample]
        try:
            data = _read(lambda: self._source.read(sample), self._index.names[sample])
            if len(data) != row["size"]:
                raise UndecodableError(f"{len(data)} bytes, the index says {row['size']}")
            size = size_of_bytes(data)
        except HeaderError as error:
            raise UndecodableError(str(error)) from error
        except OSError as error:
            raise UndecodableError(f"cannot be read: {error.strerror}") from error
        if size != (row["width"], row["height"]):
            raise UndecodableError(
                f"{size[0]} x {size[1]} pixels, the index says {row['width']} x {row['height']}"
            )
        return data

    def close(self) -> None:
        """Release open files."""
        self._source.close()


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


def start_threads(number: int) -> ThreadPoolExecutor:
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
