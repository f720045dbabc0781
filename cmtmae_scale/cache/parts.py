"""One part of a cache: written whole or not at all, read row by row."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from cmtmae_scale.cache.format import (
    Manifest,
    checksum,
    part_path,
    read_seal,
    row_bytes_of,
    seal_path,
)
from cmtmae_scale.runtime.storage import digest, sync, write_atomic

INCOMPLETE = "it is not complete"
UNDECODED = "its picture could not be decoded when it was built"
_HEADER_LIMIT = 1 << 20


def write_part(folder: Path, manifest: Manifest, part: int, fields: Mapping[str, Tensor]) -> None:
    """Write a part and seal it.

    Args:
        folder: ``cache.dir``.
        manifest: the cache's.
        part: its number.
        fields: attention, features, scales and ``valid`` of all its rows, on the CPU; checksums
            are added here.

    Raises:
        OSError: if the store refuses; nothing counts then.
    """
    path = part_path(folder, part)
    path.parent.mkdir(parents=True, exist_ok=True)
    names = [name for name in manifest.fields() if name != "checksum"]
    rows, identity = manifest.rows_of(part), manifest.identity
    sums = [
        checksum(identity, row, [row_bytes_of(fields[name], i) for name in names])
        for i, row in enumerate(rows)
    ]
    tensors = {name: fields[name].contiguous() for name in names}
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(tensors | {"checksum": torch.tensor(sums)}, draft)
        draft.chmod(0o644)  # safetensors lets nobody else read
        sync(draft)
        seal = {"size": draft.stat().st_size, "sha256": digest(draft)}
        seal_path(folder, part).unlink(missing_ok=True)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    write_atomic(seal_path(folder, part), json.dumps(seal))
    sync(path.parent)


class Field(NamedTuple):
    """Where a tensor lies in a part's file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    row_bytes: int


class PartFile:
    """An open part; rows are read at their place. Safe to read from in threads.

    Args:
        folder: ``cache.dir``.
        manifest: the cache's.
        part: its number.

    Raises:
        OSError: if it is absent or cannot be read.
        ValueError: if it is not complete or not laid out as the manifest says.
    """

    def __init__(self, folder: Path, manifest: Manifest, part: int) -> None:
        self.manifest = manifest
        self.rows = manifest.rows_of(part)
        self.identity = manifest.identity
        seal = read_seal(folder, part)
        if seal is None:
            raise ValueError(INCOMPLETE)
        path = part_path(folder, part)
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            size = os.fstat(self.descriptor).st_size
            if size != seal.size:
                raise ValueError(f"it has {size} bytes, its seal says {seal.size}")
            self.fields = self.locate(size)
        except BaseException:
            os.close(self.descriptor)
            raise

    def locate(self, size: int) -> dict[str, Field]:
        """Find every tensor from the file's header; nothing of it is believed unchecked."""
        length = int.from_bytes(os.pread(self.descriptor, 8, 0), "little")
        if not 0 < length <= min(_HEADER_LIMIT, size - 8):
            raise ValueError("its header is damaged")
        try:
            header: Any = json.loads(os.pread(self.descriptor, length, 8))
            header.pop("__metadata__", None)
            starts = {name: header[name]["data_offsets"][0] for name in self.manifest.fields()}
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
            raise ValueError("its header is damaged") from None
        found: dict[str, Field] = {}
        for name, (dtype, shape) in self.manifest.fields().items():
            row_bytes = dtype.itemsize * torch.Size(shape).numel()
            start = starts[name]
            if not isinstance(start, int) or not 0 <= start <= size - 8 - length:
                raise ValueError("its header is damaged")
            if 8 + length + start + row_bytes * len(self.rows) > size:
                raise ValueError("its header is damaged")
            found[name] = Field(dtype, shape, 8 + length + start, row_bytes)
        return found

    def read_row(self, row: int, into: Mapping[str, Tensor], at: int) -> str | None:
        """Read one row into tensors of many, and check it.

        Args:
            row: its number in the cache.
            into: tensors ``[B, ...]`` of ``Manifest.fields``, on the CPU.
            at: row of these.

        Returns:
            ``None``, or why the row cannot be used.

        Raises:
            OSError: if the store does not give it.
        """
        number = row - self.rows.start
        views: list[memoryview] = []
        for name, field in self.fields.items():
            target = row_bytes_of(into[name], at)
            place = field.offset + number * field.row_bytes
            if os.preadv(self.descriptor, [target], place) != field.row_bytes:
                return "it is cut short"
            views.append(target)
        stored = int(into["checksum"][at])
        if checksum(self.identity, row, views[:-1]) != stored:
            return "it differs from its checksum"
        if not into["valid"][at]:
            return UNDECODED
        return None

    def close(self) -> None:
        """Close the file."""
        os.close(self.descriptor)
