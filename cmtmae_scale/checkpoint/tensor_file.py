"""safetensors files written as a stream: one tensor in memory at a time, hashed on the way.

Source: the format's description in the safetensors README; its library reads the files back.
"""

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor


class Entry(NamedTuple):
    """One tensor of a file."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    """Gives the values, float32 on the CPU; called when it is the tensor's turn."""


def write_tensors(path: Path, entries: Sequence[Entry], metadata: dict[str, str]) -> dict[str, Any]:
    """Write float32 tensors and force them to storage.

    Returns:
        Size and SHA-256 of what was written, as a manifest has them.

    Raises:
        OSError: if the store refuses; a partial file may be left.
        ValueError: if a tensor has not the size of its shape.
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
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of 8 bytes
    sha256 = hashlib.sha256()
    with path.open("wb") as opened:
        for part in (struct.pack("<Q", len(text)), text):
            opened.write(part)
            sha256.update(part)
        for entry in entries:
            values = entry.read()
            if values.numel() != math.prod(entry.shape):
                raise ValueError(f"{entry.name} has {values.numel()} values, not {entry.shape}")
            part = values.float().reshape(-1).numpy().data
            opened.write(part)
            sha256.update(part)
        opened.flush()
        os.fsync(opened.fileno())
    return {"size": 8 + len(text) + size, "sha256": sha256.hexdigest()}
