"""Write safetensors files as a stream: one tensor in memory at a time, hashed while written.

Source: the format's description in the safetensors README; the safetensors library reads the files.
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
    load: Callable[[], Tensor]
    """Returns the values, float32 on the CPU; called when the tensor is written."""


def write_tensors(path: Path, entries: Sequence[Entry], metadata: dict[str, str]) -> dict[str, Any]:
    """Write float32 tensors and force them to storage.

    Returns:
        The file's size and SHA-256, as in a manifest.

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
    sha256 = hashlib.sha256()
    with path.open("wb") as opened:
        for data in (struct.pack("<Q", len(text)), text):
            opened.write(data)
            sha256.update(data)
        for entry in entries:
            values = entry.load()
            if values.numel() != math.prod(entry.shape):
                raise ValueError(f"{entry.name} has {values.numel()} values, not {entry.shape}")
            data = values.float().reshape(-1).numpy().data
            opened.write(data)
            sha256.update(data)
        opened.flush()
        os.fsync(opened.fileno())
    return {"size": 8 + len(text) + size, "sha256": sha256.hexdigest()}
