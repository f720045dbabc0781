"""Write flat fragments to safetensors files and read them back, at any number of ranks.

A chunk is the range ``[offset, offset + length)`` of one tensor's flattened float32 values. A file
names the chunk ``key@offset``.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cmtmae_scale.backends.base import Fragment
from cmtmae_scale.checkpoint.tensor_file import Entry, write_tensors
from cmtmae_scale.errors import CheckpointError
from cmtmae_scale.runtime.collectives import gather_texts
from cmtmae_scale.runtime.storage import read_inside, read_json, require_inside
from cmtmae_scale.teachers.weights import find_non_finite

INDEX = "index.json"
BYTES = 4
"""Of a float32 value."""


class HostChunk(NamedTuple):
    """Copy of a fragment in host memory."""

    key: str
    offset: int
    shape: tuple[int, ...]
    values: Tensor


def copy_to_host(fragments: Mapping[str, Fragment]) -> list[HostChunk]:
    """Copy the fragments that this rank writes; synchronises with the device."""
    return [
        HostChunk(key, own.offset, own.shape, own.local.detach().to("cpu", copy=True))
        for key, own in fragments.items()
        if own.owner and own.local.numel()
    ]


def write_chunks(chunks: Sequence[HostChunk], path: Path) -> dict[str, Any]:
    """Write one rank's chunks to one safetensors file, with the shapes in its metadata.

    Returns:
        The file's size and SHA-256.

    Raises:
        CheckpointError: for values that are not finite: such a checkpoint would replace a sound
            one, and no launch could resume it.
    """
    found = find_non_finite({chunk.key: chunk.values for chunk in chunks})
    if found:
        raise CheckpointError(f"{found}: lower optimizer.base_lr, or set optimizer.grad_clip")
    entries: list[Entry] = []
    shapes: dict[str, tuple[int, ...]] = {}
    for chunk in chunks:
        name = f"{chunk.key}@{chunk.offset}"
        entries.append(Entry(name, chunk.values.shape, lambda values=chunk.values: values))
        shapes[chunk.key] = chunk.shape
    return write_tensors(path, entries, {"shapes": json.dumps(shapes)})


def index_chunks(folder: Path, files: Iterable[str]) -> dict[str, Any]:
    """Map every tensor to its shape and its chunks, from the files' headers.

    Raises:
        CheckpointError: if the chunks of a tensor leave a gap.
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


def load_index(folder: Path, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Read ``index.json`` and check that its chunks cover every tensor exactly once.

    Args:
        folder: a checkpoint.
        sizes: bytes of each file that the manifest names.

    Raises:
        OSError: if the index cannot be read, or is no regular file in the folder.
        ValueError: naming the entry that is not as ``index_chunks`` writes it.
    """
    index = read_json(read_inside(folder, folder / INDEX))
    if not isinstance(index, dict):
        raise ValueError(f"{INDEX} is not a JSON object")
    left = dict(sizes)
    for key, entry in cast(dict[str, Any], index).items():
        shape, chunks = check_entry(key, entry)
        covered = 0
        for offset, length, file in sorted(chunks):
            if file not in left or not file.endswith(".safetensors"):
                raise ValueError(f"{INDEX}: {key} is in {file!r}, which the manifest does not name")
            if offset != covered:
                what = "a gap" if offset > covered else "an overlap"
                raise ValueError(f"{INDEX}: the chunks of {key} leave {what} at value {offset}")
            covered += length
            left[file] -= BYTES * length
            if left[file] < 0:
                raise ValueError(f"{INDEX} names more values than {file} has bytes for")
        if covered != math.prod(shape):
            raise ValueError(f"{INDEX}: {key} has {covered} values, its shape is {shape}")
    return cast(dict[str, Any], index)


def check_entry(key: str, entry: Any) -> tuple[list[int], list[tuple[int, int, str]]]:
    """Return shape and chunks of an entry of the index.

    Raises:
        ValueError: if a value has another type.
    """
    shape = entry.get("shape") if isinstance(entry, dict) else None
    chunks = entry.get("chunks") if isinstance(entry, dict) else None
    kinds = (int, int, str)
    if (
        not isinstance(shape, list)
        or not isinstance(chunks, list)
        or not all(type(size) is int and size > 0 for size in shape)
        or not all(
            isinstance(chunk, list)
            and tuple(map(type, chunk)) == kinds
            and chunk[0] >= 0
            and chunk[1] > 0
            for chunk in chunks
        )
    ):
        raise ValueError(f"{INDEX}: {key!r} does not give a shape and [offset, length, file]")
    return shape, [(offset, length, file) for offset, length, file in chunks]


class ChunkReader:
    """Reads ranges of tensors from a checkpoint folder; ``with`` closes its files.

    Args:
        folder: a folder with ``index.json`` and the files that the index names.

    Raises:
        CheckpointError: if the index is not as ``load_index`` expects it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            sizes = {path.name: path.lstat().st_size for path in folder.iterdir()}
            self.index = load_index(folder, sizes)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder}: {error}") from error
        self.files: dict[str, Any] = {}
        """Open files by name, so that each header is read once."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self.files.clear()

    def read_values(self, key: str, offset: int, length: int) -> Tensor:
        """Read values ``[offset, offset + length)`` of a tensor, 1-D float32 on the CPU.

        Raises:
            CheckpointError: if a file is absent, is no safetensors file, or has other chunks than
                the index names.
        """
        values = torch.empty(length)
        for start, size, file in self.index[key]["chunks"]:
            low, high = max(offset, start), min(offset + length, start + size)
            if low < high:
                try:
                    if file not in self.files:
                        require_inside(self.folder, self.folder / file)
                        self.files[file] = safe_open(self.folder / file, "pt")
                    chunk = self.files[file].get_slice(f"{key}@{start}")
                    if (chunk.get_dtype(), chunk.get_shape()) != ("F32", [size]):
                        raise CheckpointError(
                            f"{self.folder / file}: {key}@{start} is {chunk.get_dtype()} "
                            f"{chunk.get_shape()}, {INDEX} names F32 {[size]}"
                        )
                    found = chunk[low - start : high - start]
                except (OSError, SafetensorError) as error:
                    raise CheckpointError(f"{self.folder / file}: {error}") from error
                values[low - offset : high - offset] = found
        return values

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self.index[key]["shape"])

    def read_tensor(self, key: str) -> Tensor:
        """Read a whole tensor, float32 on the CPU.

        Raises:
            CheckpointError: as ``read_values``, and for values that are not finite.
        """
        shape = self.shape(key)
        values = self.read_values(key, 0, math.prod(shape)).reshape(shape)
        found = find_non_finite({key: values})
        if found:
            raise CheckpointError(f"{self.folder}: {found}; name an older checkpoint")
        return values


def load_fragments(folder: Path, fragments: Mapping[str, Fragment]) -> None:
    """Fill live fragments from a checkpoint; read only the ranges that this rank needs.

    A collective.

    Raises:
        CheckpointError: if names or shapes differ; no fragment is changed then. On every rank, if
            one of them reads values that are not finite.
    """
    found_bad = ""
    with ChunkReader(folder) as reader:
        found, wanted = set(reader.index), set(fragments)
        if found != wanted:
            absent = sorted(wanted - found)[:3]
            extra = sorted(found - wanted)[:3]
            raise CheckpointError(
                f"{folder}: belongs to another model: absent {absent}, not expected {extra}"
            )
        for key, own in fragments.items():
            shape = reader.shape(key)
            if shape != own.shape:
                raise CheckpointError(f"{folder}: {key} has shape {shape}, the model {own.shape}")
        for key, own in fragments.items():
            if own.local.numel():
                values = reader.read_values(key, own.offset, own.local.numel())
                found_bad = found_bad or find_non_finite({key: values})
                own.local.copy_(values)
    everyone = list(filter(None, gather_texts(found_bad)))
    if everyone:
        raise CheckpointError(
            f"{folder}: {everyone[0]}; move this folder away, and the run continues from the "
            "checkpoint before"
        )
