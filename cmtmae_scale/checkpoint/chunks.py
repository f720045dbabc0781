"""Flat fragments to safetensors files and back, at any number of ranks.

A chunk is the range ``[offset, offset + length)`` of one state's flattened float32 values. In a
file it is named ``key@offset``.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cmtmae_scale.backends.base import Fragment
from cmtmae_scale.checkpoint.tensor_file import Entry, write_tensors
from cmtmae_scale.errors import CheckpointError

INDEX = "index.json"


class HostChunk(NamedTuple):
    """A fragment's copy in host memory, detached from training."""

    key: str
    offset: int
    shape: tuple[int, ...]
    values: Tensor


def copy_to_host(fragments: Mapping[str, Fragment]) -> list[HostChunk]:
    """Copy what this rank writes; synchronises with the device."""
    return [
        HostChunk(key, part.offset, part.shape, part.local.detach().to("cpu", copy=True))
        for key, part in fragments.items()
        if part.owner and part.local.numel()
    ]


def write_chunks(chunks: Iterable[HostChunk], path: Path) -> dict[str, Any]:
    """Write one rank's chunks as one safetensors file; shapes go to its metadata.

    Returns:
        Its size and SHA-256.
    """
    entries: list[Entry] = []
    shapes: dict[str, tuple[int, ...]] = {}
    for chunk in chunks:
        name = f"{chunk.key}@{chunk.offset}"
        entries.append(Entry(name, chunk.values.shape, lambda values=chunk.values: values))
        shapes[chunk.key] = chunk.shape
    return write_tensors(path, entries, {"shapes": json.dumps(shapes)})


def build_index(folder: Path, files: Iterable[str]) -> dict[str, Any]:
    """List which chunk lies where, from the files' headers.

    Raises:
        CheckpointError: if the chunks of a state leave a gap.
    """
    index: dict[str, Any] = {}
    for file in files:
        with safe_open(folder / file, "pt") as opened:
            shapes = json.loads(opened.metadata()["shapes"])
            for name in opened.keys():  # noqa: SIM118 - not a dict
                key, _, offset = name.rpartition("@")
                length = opened.get_slice(name).get_shape()[0]
                entry = index.setdefault(key, {"shape": shapes[key], "chunks": []})
                entry["chunks"].append([int(offset), length, file])
    for key, entry in index.items():
        entry["chunks"].sort()
        covered = 0
        for offset, length, _ in entry["chunks"]:
            if offset > covered:
                break
            covered = max(covered, offset + length)
        if covered < math.prod(entry["shape"]):
            raise CheckpointError(
                f"{folder}: {key} has only {covered} values; the save is incomplete"
            )
    return index


class ChunkReader:
    """Reads ranges of states from a checkpoint folder; ``with`` closes its files.

    Args:
        folder: a folder with ``index.json`` and the files that it names.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index: dict[str, Any] = json.loads((folder / INDEX).read_text())
        self.files: dict[str, Any] = {}
        """Open files by name: their headers are read once."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self.files.clear()

    def read(self, key: str, offset: int, length: int) -> Tensor:
        """Values ``[offset, offset + length)`` of a state, 1-D float32 on the CPU.

        Raises:
            CheckpointError: if a file is gone or is no safetensors file.
        """
        values = torch.empty(length)
        for start, size, file in self.index[key]["chunks"]:
            low, high = max(offset, start), min(offset + length, start + size)
            if low < high:
                try:
                    if file not in self.files:
                        self.files[file] = safe_open(self.folder / file, "pt")
                    part = self.files[file].get_slice(f"{key}@{start}")[low - start : high - start]
                except (OSError, SafetensorError) as error:
                    raise CheckpointError(f"{self.folder / file}: {error}") from error
                values[low - offset : high - offset] = part
        return values

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a state's parameter."""
        return tuple(self.index[key]["shape"])

    def read_whole(self, key: str) -> Tensor:
        """A state in its own shape."""
        shape = self.shape(key)
        return self.read(key, 0, math.prod(shape)).reshape(shape)


def load_fragments(folder: Path, fragments: Mapping[str, Fragment]) -> None:
    """Fill live fragments from a checkpoint, each with just the ranges that it needs.

    Raises:
        CheckpointError: if names or shapes differ; nothing has been written then.
    """
    with ChunkReader(folder) as reader:
        fill(reader, fragments)


def fill(reader: ChunkReader, fragments: Mapping[str, Fragment]) -> None:
    """Check names and shapes, then read; see ``load_fragments``."""
    folder = reader.folder
    found, wanted = set(reader.index), set(fragments)
    if found != wanted:
        absent = sorted(wanted - found)[:3]
        extra = sorted(found - wanted)[:3]
        raise CheckpointError(
            f"{folder}: belongs to another model: absent {absent}, not expected {extra}"
        )
    for key, part in fragments.items():
        shape = reader.shape(key)
        if shape != part.shape:
            raise CheckpointError(f"{folder}: {key} has shape {shape}, the model {part.shape}")
    for key, part in fragments.items():
        if part.local.numel():
            part.local.copy_(reader.read(key, part.offset, part.local.numel()))
