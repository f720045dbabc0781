"""Write flat fragments to safetensors files and read them back, at any number of ranks.

A file holds the chunk of tensor ``key`` from value ``offset`` on as ``key@offset``; ``index.py``
describes the index.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cmtmae_scale.backends.base import Fragment
from cmtmae_scale.checkpoint.index import INDEX, Located, Span, load_index
from cmtmae_scale.checkpoint.replicas import broadcast_copies, choose_readers
from cmtmae_scale.checkpoint.tensor_file import Entry, write_tensors
from cmtmae_scale.errors import CheckpointError
from cmtmae_scale.runtime.collectives import (
    broadcast_text,
    gather_texts,
    is_first,
    on_all_ranks,
    own_rank,
)
from cmtmae_scale.runtime.storage import require_inside
from cmtmae_scale.teachers.state_dicts import find_non_finite


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


class ChunkReader:
    """Reads ranges of tensors from a checkpoint folder; ``with`` closes its files.

    Args:
        folder: a folder with ``index.json`` and the files that the index names.
        index: from ``share_index``; ``None``: the index is read and checked.

    Raises:
        CheckpointError: if ``load_index`` refuses the index.
    """

    def __init__(self, folder: Path, index: dict[str, Located] | None = None) -> None:
        self.folder = folder
        try:
            if index is None:
                sizes = {path.name: path.lstat().st_size for path in folder.iterdir()}
                index = load_index(folder, sizes)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder}: {error}") from error
        self.index = index
        self.files: dict[str, Any] = {}
        """Open files by name, so that each header is read once."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self.files.clear()

    def read_values(self, key: str, offset: int, length: int) -> Tensor:
        """Read values ``[offset, offset + length)`` of a tensor, 1-D float32 on the CPU.

        Raises:
            CheckpointError: if a file is absent, is not a safetensors file, or has other chunks
                than the index names.
        """
        values = torch.empty(length)
        for span in self.index[key].spans:
            size = span.length
            for start, file in span.overlap(offset, offset + length):
                low, high = max(offset, start), min(offset + length, start + size)
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

    def read_range(self, key: str, own: Fragment) -> Tensor:
        """Read the values of a fragment; see ``read_values``."""
        return self.read_values(key, own.offset, own.local.numel())

    def shape(self, key: str) -> tuple[int, ...]:
        return self.index[key].shape

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


def share_index(folder: Path) -> dict[str, Located]:
    """Read and check a checkpoint's index on rank 0, and broadcast it; a collective.

    Raises:
        CheckpointError: on every rank, if ``load_index`` refuses the index.
    """
    first = on_all_ranks(lambda: ChunkReader(folder).index if is_first() else None)
    tree = json.loads(broadcast_text(json.dumps(first)))
    return first or {
        key: Located(tuple(shape), [Span(*span) for span in spans])
        for key, (shape, spans) in tree.items()
    }


def load_fragments(folder: Path, fragments: Mapping[str, Fragment]) -> None:
    """Fill live fragments from a checkpoint; read only the ranges that this rank needs.

    One of the ranks that hold the same range reads it and sends it to the others, so that all ranks
    together read each byte once. A collective.

    Raises:
        CheckpointError: if names or shapes differ; no fragment is changed then. On every rank, if
            a rank reads values that are not finite.
        CmtMaeError: on every rank, if a rank cannot read its ranges.
    """
    with ChunkReader(folder, share_index(folder)) as reader:
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
        found_bad = fill_fragments(fragments, reader.read_range)
        if found_bad:
            raise CheckpointError(
                f"{folder}: {found_bad}; move this folder away, and the run continues from the "
                "checkpoint before"
            )


def fill_fragments(
    fragments: Mapping[str, Fragment], read: Callable[[str, Fragment], Tensor]
) -> str:
    """Fill live fragments; one of the ranks that hold the same range reads it. A collective.

    Args:
        fragments: from ``Backend.fragments``, all or some, the same on every rank.
        read: returns a fragment's values, 1-D float32 on the CPU, by its name.

    Returns:
        The first tensor of which a rank read values that are not finite, or ``""``.

    Raises:
        CmtMaeError: on every rank, if a rank cannot read its ranges.
    """
    readers = choose_readers(fragments)
    mine = {key: fragments[key] for key, rank in readers.items() if rank == own_rank()}

    def read_mine() -> str:
        found_bad = ""
        for key, own in mine.items():
            if own.local.numel():
                values = read(key, own)
                found_bad = found_bad or find_non_finite({key: values})
                own.local.copy_(values)
        return found_bad

    everyone = list(filter(None, gather_texts(on_all_ranks(read_mine))))
    if everyone:
        return everyone[0]
    broadcast_copies(fragments, readers)
    return ""
