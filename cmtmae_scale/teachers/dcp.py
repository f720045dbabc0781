"""Folders of ``torch.distributed.checkpoint`` (DCP), as torchtitan writes: weights without code.

A folder has files of tensors, and ``.metadata``, a pickle: names, shapes and the place of each
chunk. ``FileSystemReader`` unpickles anything there; here only the classes that DCP itself writes.
"""

import math
import pathlib
import pickle
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from cmtmae_scale.runtime.storage import require_inside
from dataloading.files import open_regular

METADATA = ".metadata"
NOT_WEIGHTS = ("optimizer.", "optim.", "lr_scheduler.", "dataloader.", "train_state.")
"""Prefixes of names under which programs save other tensors than weights."""
WRITTEN: dict[tuple[str, str], Any] = {
    **{
        (kind.__module__, kind.__qualname__): kind
        for kind in (
            *(Metadata, TensorStorageMetadata, metadata.BytesStorageMetadata),
            *(metadata.TensorProperties, metadata.ChunkStorageMetadata, metadata.MetadataIndex),
            *(metadata.StorageMeta, metadata._MEM_FORMAT_ENCODING, filesystem._StorageInfo),
            *(torch.Size, OrderedDict),
        )
    },
    ("torch.serialization", "_get_layout"): lambda _: torch.strided,
    ("pathlib", "PosixPath"): pathlib.PurePosixPath,
    ("pathlib._local", "PosixPath"): pathlib.PurePosixPath,
}
"""Classes that a pickle of DCP may name; building them runs no other code."""


class MetadataUnpickler(pickle.Unpickler):
    """Unpickles ``.metadata``, and nothing that runs code."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        """Return one of ``WRITTEN``, or a dtype of torch."""
        found = WRITTEN.get((module_name, global_name))
        if found is None and module_name == "torch" and "." not in global_name:
            found = getattr(torch, global_name, None)
            found = found if isinstance(found, torch.dtype) else None
        if found is None:
            raise ValueError(f"{METADATA} names {module_name}.{global_name}, which could run code")
        return found


class Reader(filesystem.FileSystemReader):
    """Reads files of one folder alone."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read and check ``.metadata``.

        Raises:
            ValueError, OSError: if a class is not one that DCP writes, or a file not in the folder.
        """
        folder = Path(self.path)
        require_inside(folder, folder / METADATA)
        with open(open_regular(folder / METADATA), "rb") as opened:
            found = MetadataUnpickler(opened).load()
        if not isinstance(found, Metadata):
            raise TypeError(f"{METADATA} is no metadata of torch.distributed.checkpoint")
        for place in found.storage_data.values():
            require_inside(folder, folder / place.relative_path)
        if found.storage_meta is None:  # of an older torch
            found.storage_meta = metadata.StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found


@contextmanager
def without_group() -> Iterator[None]:
    """Call DCP with ``no_dist=True`` in the block, without its warning about it.

    Raises:
        Exception: the cause, where DCP raises a ``BaseException`` around it.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        try:
            yield
        except CheckpointException as error:
            failure = error.failures[0][0]
            # Where the store refuses a write, torch.save raises an error of its own on top.
            store = failure.__context__
            raise (store if isinstance(store, OSError) else failure) from error


def read_dcp(folder: Path) -> dict[str, Tensor]:
    """Read the tensors of a folder on the CPU, without those of an optimizer.

    Of a nested state the tensors under ``model`` are read, without that prefix.

    Raises:
        Exception: of any kind, for a folder that is damaged or holds anything but tensors.
    """
    reader = Reader(folder)
    found: dict[str, Any] = reader.read_metadata().state_dict_metadata
    stored = {
        name: entry
        for name, entry in found.items()
        if isinstance(entry, TensorStorageMetadata) and not name.startswith(NOT_WEIGHTS)
    }
    prefix = "model." if any(name.startswith("model.") for name in stored) else ""
    stored = {name: entry for name, entry in stored.items() if name.startswith(prefix)}
    refuse_other_sizes(stored, sum(path.lstat().st_size for path in folder.iterdir()))
    state: dict[str, Any] = {
        name: torch.zeros(entry.size, dtype=entry.properties.dtype)
        for name, entry in stored.items()
    }
    with without_group():
        load(state, storage_reader=reader, no_dist=True)
    return {name.removeprefix(prefix): value for name, value in state.items()}


def refuse_other_sizes(stored: Mapping[str, TensorStorageMetadata], num_bytes: int) -> None:
    """Refuse tensors that their chunks do not fill, and more values than there are bytes for.

    Raises:
        ValueError: naming the tensor.
    """
    for name, entry in stored.items():
        num_values = math.prod(entry.size)
        if sum(math.prod(chunk.sizes) for chunk in entry.chunks) != num_values:
            raise ValueError(f"the chunks of {name} are not its {num_values} values")
        num_bytes -= num_values * entry.properties.dtype.itemsize
        if num_bytes < 0:
            raise ValueError(f"{METADATA} names more values than the files have bytes for")
