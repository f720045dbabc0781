"""Write flat fragments to safetensors files and read them back, at any number of ranks.

A chunk is the range ``[offset, offset + length)`` of one tensor's flattened float32 values. A file
names the chunk ``key@offset``. The index names chunks as ``[offset, length, file]``. Chunks of one
length that follow each other in the shards of successive ranks are one entry, ``[offset, length,
first file, number of files]``, so that the index does not grow with the number of ranks.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cmtmae_scale.backends.base import Fragment
from cmtmae_scale.checkpoint.tensor_file import Entry, write_tensors
from cmtmae_scale.errors import CheckpointError
from cmtmae_scale.runtime.collectives import broadcast_text, gather_texts, is_first, on_all_ranks
from cmtmae_scale.runtime.storage import read_inside, read_json, require_inside
from cmtmae_scale.teachers.weights import find_non_finite

INDEX = "index.json"
BYTES = 4
"""Of a float32 value."""


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
                entry["chunks"].append(Span(int(offset), length, file))
    for key, entry in index.items():
        spans = join_chunks(entry["chunks"])
        covered = 0
        for span in spans:
            if span.offset > covered:
                break
            covered = max(covered, span.end)
        if covered < math.prod(entry["shape"]):
            raise CheckpointError(
                f"{folder}: {key} has only {covered} values; the save is incomplete"
            )
        entry["chunks"] = [span if span.ranks > 1 else span[:3] for span in spans]
    return index


def join_chunks(chunks: Iterable[Span]) -> list[Span]:
    """Join chunks of equal length that follow each other in the shards of successive ranks."""
    joined: list[Span] = []
    for chunk in sorted(chunks):
        last = joined[-1] if joined else None
        if (
            last is not None
            and (chunk.offset, chunk.length) == (last.end, last.length)
            and chunk.file == rank_file_after(last)
        ):
            joined[-1] = last._replace(ranks=last.ranks + 1)
        else:
            joined.append(chunk)
    return joined


def rank_file_after(span: Span) -> str | None:
    """Return the shard that follows a span's last; ``None``: the shards have no ranks."""
    try:
        return span.file_of(span.ranks)
    except ValueError:
        return None


def load_index(folder: Path, sizes: Mapping[str, int]) -> dict[str, Located]:
    """Read ``index.json`` and check that its chunks cover every tensor exactly once.

    Args:
        folder: a checkpoint.
        sizes: bytes of each file that the manifest names.

    Raises:
        OSError: if the index cannot be read, or is no regular file in the folder.
        ValueError: naming the entry that is not as ``index_chunks`` writes it.
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


class ChunkReader:
    """Reads ranges of tensors from a checkpoint folder; ``with`` closes its files.

    Args:
        folder: a folder with ``index.json`` and the files that the index names.
        index: from ``share_index``; ``None``: the index is read and checked.

    Raises:
        CheckpointError: if the index is not as ``load_index`` expects it.
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
            CheckpointError: if a file is absent, is no safetensors file, or has other chunks than
                the index names.
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
        CheckpointError: on every rank, if the index is not as ``load_index`` expects it.
    """
    first = on_all_ranks(lambda: ChunkReader(folder).index if is_first() else None)
    tree = json.loads(broadcast_text(json.dumps(first)))
    return first or {
        key: Located(tuple(shape), [Span(*span) for span in spans])
        for key, (shape, spans) in tree.items()
    }


def load_fragments(folder: Path, fragments: Mapping[str, Fragment]) -> None:
    """Fill live fragments from a checkpoint; read only the ranges that this rank needs.

    A collective.

    Raises:
        CheckpointError: if names or shapes differ; no fragment is changed then. On every rank, if
            one of them reads values that are not finite.
    """
    found_bad = ""
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
