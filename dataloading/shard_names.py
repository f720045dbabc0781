"""Names of samples in tars and Parquet files."""

from collections.abc import Sequence
from typing import overload

import numpy as np
from numpy.typing import NDArray


def is_parquet(name: str) -> bool:
    """Return whether a name is that of a Parquet file."""
    return name.lower().endswith(".parquet")


class TarNames(Sequence[str]):
    """Names of samples in tars or Parquet files, created on access.

    ``tar -tvRf SHARD`` lists the member with its block: byte / 512 - 1 is the block of its header.
    """

    def __init__(self, shards: Sequence[str], entries: NDArray[np.void]) -> None:
        self.shards = shards
        self._entries = entries

    def __len__(self) -> int:
        return len(self._entries)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...

    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        if isinstance(index, slice):
            return TarNames(self.shards, self._entries[index])
        row = self._entries[index]
        return place(self.shards[int(row["shard"])], int(row["offset"]))


def place(shard: str, offset: int) -> str:
    """Name a place in a tar, or a row of a Parquet file."""
    return f"{unit_of(shard)} {offset} of {shard}"


def unit_of(shard: str) -> str:
    """Return what the offsets of a file's samples count."""
    return "row" if is_parquet(shard) else "byte"
