"""Decode every sample of a data set once, as in training, and report those that fail."""

import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image

from dataloading.entries import UNREADABLE
from dataloading.errors import ReadError
from dataloading.index import Index
from dataloading.reading import Reader, UndecodableError, start_threads
from dataloading.torch_decode import find_codec, make_decode
from dataloading.values import (
    Digests,
    Survey,
    digest_bytes,
    find_duplicates,
    find_suspect_values,
    is_scaled,
)

ReportDone = Callable[[int], None]
"""Called with the number of samples that are done."""

_CHUNK = 16
_AHEAD = 4  # chunks in progress or waiting, per thread

Piece = TypeVar("Piece")
Result = TypeVar("Result")


class Fault(NamedTuple):
    """A sample that cannot be used: its row of the index, its name there, and why."""

    sample: int
    name: str
    reason: str


class _Found(NamedTuple):
    """Result of a few samples; digests are those of the samples ``read``."""

    faults: list[Fault]
    suspect: list[tuple[int, str]]
    read: list[int]
    digests: list[Digests]
    scaled: int


def check_samples(
    index: Index, threads: int, report_done: ReportDone, patience_s: float = 10.0
) -> tuple[list[Fault], Survey]:
    """Decode everything, in index order; each thread uses one core.

    Returns:
        The samples that a run would see as grey views or stop for, with reasons, in index order;
        and a survey of the others.
    """
    reader = Reader(index, patience_s)
    decode = make_decode(find_codec())

    def work(chunk: range) -> _Found:
        faults: list[Fault] = []
        suspect: list[tuple[int, str]] = []
        read: list[int] = []
        digests: list[Digests] = []
        scaled = 0
        reader.prefetch(chunk)
        for sample in chunk:
            try:
                data = reader.read(sample)
                read.append(sample)
                digests.append(digest_bytes(data))
                image = decode(data)
                _, height, width = image.shape
                wide, high = reader.stored_size(sample)
                if (width, height) != (wide, high):
                    raise UndecodableError(
                        f"decodes to {width} x {height} pixels, its header says {wide} x {high}"
                    )
                scaled += is_scaled(data)
                doubt = find_suspect_values(image)
                if doubt is not None:
                    suspect.append((sample, doubt))
            except UndecodableError as error:
                faults.append(Fault(sample, index.names[sample], str(error)))
            except ReadError as error:
                reason = getattr(error.__cause__, "strerror", None) or "no answer"
                faults.append(Fault(sample, index.names[sample], f"{UNREADABLE}{reason}"))
        return _Found(faults, suspect, read, digests, scaled)

    n = len(index)
    chunks = (range(at, min(at + _CHUNK, n)) for at in range(0, n, _CHUNK))
    done: list[_Found] = []
    pool = start_threads(threads)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # max_pixels decides
            for number, found in enumerate(map_in_order(pool, threads, work, chunks), start=1):
                done.append(found)
                report_done(min(number * _CHUNK, n))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        reader.close()
    read = [sample for found in done for sample in found.read]
    digests = [digest for found in done for digest in found.digests]
    survey = Survey(
        [doubt for found in done for doubt in found.suspect],
        find_duplicates(read, np.array(digests, dtype=np.uint64).reshape(-1, 2)),
        sum(found.scaled for found in done),
    )
    return [fault for found in done for fault in found.faults], survey


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
