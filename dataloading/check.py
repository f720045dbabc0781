"""Decode every sample of a data set once, as training would, and name those that cannot be."""

import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypeVar

from PIL import Image

from dataloading.errors import ReadError
from dataloading.index import Index
from dataloading.reading import Reader, UndecodableError, start_threads
from dataloading.torch_decode import find_codec, make_decode

ReportDone = Callable[[int], None]
"""Called with the number of samples that are done."""

_CHUNK = 16
_AHEAD = 4  # chunks in work or waiting, for each thread

Piece = TypeVar("Piece")
Result = TypeVar("Result")


class Fault(NamedTuple):
    """A sample that cannot be used: its row of the index, its name there, and why."""

    sample: int
    name: str
    reason: str


def find_undecodable(
    index: Index, threads: int, report_done: ReportDone, patience_s: float = 10.0
) -> list[Fault]:
    """Decode everything, in index order; each thread uses one core.

    Returns:
        The samples that a run would see as grey views or stop for, with reasons, in index order.
    """
    reader = Reader(index, patience_s)
    decode = make_decode(find_codec())

    def work(chunk: range) -> list[Fault]:
        faults: list[Fault] = []
        for sample in chunk:
            try:
                _, height, width = decode(reader.read(sample)).shape
                wide, high = reader.stored_size(sample)
                if (width, height) != (wide, high):
                    raise UndecodableError(
                        f"decodes to {width} x {height} pixels, its header says {wide} x {high}"
                    )
            except UndecodableError as error:
                faults.append(Fault(sample, index.names[sample], str(error)))
            except ReadError as error:
                reason = getattr(error.__cause__, "strerror", None) or "no answer"
                faults.append(Fault(sample, index.names[sample], f"cannot be read: {reason}"))
        return faults

    n = len(index)
    chunks = (range(at, min(at + _CHUNK, n)) for at in range(0, n, _CHUNK))
    found: list[Fault] = []
    pool = start_threads(threads)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # max_pixels decides
            for number, faults in enumerate(map_in_order(pool, threads, work, chunks), start=1):
                found += faults
                report_done(min(number * _CHUNK, n))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        reader.close()
    return found


def map_in_order(
    pool: ThreadPoolExecutor, threads: int, work: Callable[[Piece], Result], pieces: Iterable[Piece]
) -> Iterator[Result]:
    """Process pieces in ``threads`` threads, a bounded number ahead of the consumer, in order."""
    waiting: deque[Future[Result]] = deque()
    for piece in pieces:
        waiting.append(pool.submit(work, piece))
        if len(waiting) >= _AHEAD * threads:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
