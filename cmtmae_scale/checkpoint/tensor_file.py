"""Write safetensors files as a stream: one tensor in memory at a time, hashed while written.

This module imports the standard library alone, for ``encoder_copy.py``.

Source: the format's description in the safetensors README; the safetensors library reads the files.
"""

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


BLOCK_BYTES = 2**24
"""Bytes of a file that have a digest of their own: 16 MiB, so that ranks can share a file."""


class Entry(NamedTuple):
    """One tensor of a file."""

    name: str
    shape: tuple[int, ...]
    load: "Callable[[], Tensor]"
    """Returns the values, float32 on the CPU; called when the tensor is written."""


class RawEntry(NamedTuple):
    """One tensor of a file, as bytes."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], Iterable[bytes | memoryview]]
    """Yields the float32 values in pieces; called when the tensor is written."""


def write_tensors(path: Path, entries: Sequence[Entry], metadata: dict[str, str]) -> dict[str, Any]:
    """Write float32 tensors; see ``write_raw``."""
    return write_raw(
        path, [RawEntry(one.name, one.shape, partial(to_bytes, one)) for one in entries], metadata
    )


def to_bytes(entry: Entry) -> Iterator[memoryview]:
    """Yield the bytes of a tensor, as one piece."""
    yield entry.load().float().reshape(-1).numpy().data


def write_raw(path: Path, entries: Sequence[RawEntry], metadata: dict[str, str]) -> dict[str, Any]:
    """Write float32 tensors and force them to storage.

    Returns:
        The file's size and SHA-256, as in a manifest: one digest, or one per block.

    Raises:
        OSError: if the store refuses; a partial file may be left.
        ValueError: if the number of values does not match the shape.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    size = 0
    for entry in entries:
        end = size + 4 * math.prod(entry.shape)
        header[entry.name] = {
            "dtype": "F32",
            "shape": list(entry.shape),
            "data_offsets": [size, end],
        }
        size = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the values begin at a multiple of 8 bytes
    sha256 = BlockDigests()
    with path.open("wb") as opened:
        for data in (struct.pack("<Q", len(text)), text):
            opened.write(data)
            sha256.update(data)
        for entry in entries:
            num_bytes = 0
            for piece in entry.read():
                opened.write(piece)
                sha256.update(piece)
                num_bytes += memoryview(piece).nbytes
            if num_bytes != 4 * math.prod(entry.shape):
                raise ValueError(f"{entry.name} has {num_bytes // 4} values, not {entry.shape}")
        opened.flush()
        os.fsync(opened.fileno())
    return sha256.facts()


class BlockDigests:
    """SHA-256 of each block of ``BLOCK_BYTES`` of a file that is written as a stream."""

    def __init__(self) -> None:
        self.size = 0
        self.digests: list[str] = []
        self.block_bytes = BLOCK_BYTES
        self.block = hashlib.sha256()
        self.left = self.block_bytes

    def update(self, data: bytes | memoryview) -> None:
        """Add bytes."""
        rest = memoryview(data).cast("B")
        self.size += len(rest)
        while rest:
            if not self.left:
                self.digests.append(self.block.hexdigest())
                self.block, self.left = hashlib.sha256(), self.block_bytes
            part, rest = rest[: self.left], rest[self.left :]
            self.block.update(part)
            self.left -= len(part)

    def facts(self) -> dict[str, Any]:
        """Return size and SHA-256, for a manifest; a file of one block has one digest."""
        last = self.block.hexdigest()
        if not self.digests:
            return {"size": self.size, "sha256": last}
        blocks = [*self.digests, last]
        return {"size": self.size, "block_bytes": self.block_bytes, "sha256": blocks}
