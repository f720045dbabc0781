"""The index of a checkpoint: which range of which tensor is in which file.

A chunk is the range ``[offset, offset + length)`` of one tensor's flattened float32 values. The
index names chunks as ``[offset, length, file]``. Chunks of one length that follow each other in the
shards of successive ranks are one entry, ``[offset, length, first file, number of files]``, so that
the index does not grow with the number of ranks. This module imports the standard library alone:
the process that copies the encoder (``encoder_copy.py``) reads indexes without torch.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

from cmtmae_scale.runtime.storage import read_inside, read_json

INDEX = "index.json"
BYTES = 4
"""Bytes of a float32 value."""


def rank_file(rank: int) -> str:
    """Return the name of a rank's shard."""
    return f"rank-{rank:05d}.safetensors"


class Span(NamedTuple):
    """Chunks of one length, one after the other, in the shards of successive ranks."""

    offset: int
    """First value of the first chunk."""
    length: int
    """Values of each chunk."""
    file: str
    """Shard of the first chunk."""
    ranks: int = 1
    """Number of chunks, one per shard."""

    @property
    def end(self) -> int:
        return self.offset + self.length * self.ranks

    def file_of(self, number: int) -> str:
        """Return the shard of a chunk, counted from 0.

        Raises:
            ValueError: if there are several chunks, and the first shard has no rank.
        """
        if not number:
            return self.file
        digits = re.fullmatch(r"rank-(\d{5,})\.safetensors", self.file)
        if digits is None:
            raise ValueError(f"{INDEX}: no shard follows {self.file!r}")
        return rank_file(int(digits[1]) + number)

    def overlap(self, low: int, high: int) -> Iterator[tuple[int, str]]:
        """Yield offset and shard of the chunks that hold some of the values ``[low, high)``."""
        first = max(0, (low - self.offset) // self.length)
        last = min(self.ranks, -(-(high - self.offset) // self.length))
        for number in range(first, last):
            yield self.offset + number * self.length, self.file_of(number)


class Located(NamedTuple):
    """Where a tensor is."""

    shape: tuple[int, ...]
    spans: list[Span]


def load_index(folder: Path, sizes: Mapping[str, int]) -> dict[str, Located]:
    """Read ``index.json`` and check that its chunks cover every tensor exactly once.

    Args:
        folder: a checkpoint.
        sizes: bytes of each file that the manifest names.

    Raises:
        OSError: if the index cannot be read, or is not a regular file in the folder.
        ValueError: names an entry that ``build_index`` in ``shards.py`` cannot have written.
    """
    tree = read_json(read_inside(folder, folder / INDEX))
    if not isinstance(tree, dict):
        raise ValueError(f"{INDEX} is not a JSON object")
    index: dict[str, Located] = {}
    held: Counter[Span] = Counter()
    for key, entry in cast(dict[str, Any], tree).items():
        index[key] = located = check_entry(key, entry)
        covered = 0
        for span in located.spans:
            # The first and the last shard: the sizes below need those between.
            for file in {span.file, span.file_of(span.ranks - 1)}:
                if file not in sizes or not file.endswith(".safetensors"):
                    raise ValueError(
                        f"{INDEX}: {key} is in {file!r}, which the manifest does not name"
                    )
            if span.offset != covered:
                what = "a gap" if span.offset > covered else "an overlap"
                raise ValueError(
                    f"{INDEX}: the chunks of {key} leave {what} at value {span.offset}"
                )
            covered = span.end
            held[Span(0, 1, span.file, span.ranks)] += span.length
        if covered != math.prod(located.shape):
            raise ValueError(f"{INDEX}: {key} has {covered} values, its shape is {located.shape}")
    left = dict(sizes)
    for span, values in held.items():
        for _, file in span.overlap(0, span.ranks):
            if file not in left:
                raise ValueError(f"{INDEX} names {file!r}, which the manifest does not name")
            left[file] -= BYTES * values
            if left[file] < 0:
                raise ValueError(f"{INDEX} names more values than {file} has bytes for")
    return index


def check_entry(key: str, entry: Any) -> Located:
    """Return shape and sorted chunks of an entry of the index.

    Raises:
        ValueError: if a value has another type.
    """
    shape = entry.get("shape") if isinstance(entry, dict) else None
    chunks = entry.get("chunks") if isinstance(entry, dict) else None
    if (
        not isinstance(shape, list)
        or not isinstance(chunks, list)
        or not all(type(size) is int and size > 0 for size in shape)
        or not all(map(is_span, chunks))
    ):
        raise ValueError(f"{INDEX}: {key!r} does not give a shape and [offset, length, file]")
    return Located(tuple(shape), sorted(Span(*chunk) for chunk in chunks))


def is_span(chunk: object) -> bool:
    """Return whether a JSON value is a chunk, or chunks of successive ranks."""
    kinds = (int, int, str, int)
    if not isinstance(chunk, list) or len(chunk) not in (3, 4):
        return False
    if tuple(map(type, chunk)) != kinds[: len(chunk)]:
        return False
    return chunk[0] >= 0 and chunk[1] > 0 and (len(chunk) == 3 or chunk[3] > 0)
