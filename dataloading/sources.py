"""Where the bytes of a sample come from."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol


class Source(Protocol):
    """Bytes of samples by row of the index; safe to call from several threads."""

    def read(self, i: int) -> bytes:
        """Return the encoded picture of row ``i``; ``OSError`` if it cannot be read."""
        ...


class FolderSource:
    """One file a sample under one folder.

    Args:
        root: the folder.
        names: paths relative to it, with ``/``, in index order.
    """

    def __init__(self, root: str | os.PathLike[str], names: Sequence[str]) -> None:
        self._root = Path(root)
        self._names = names

    def read(self, i: int) -> bytes:
        """Read the whole file of row ``i``.

        Raises:
            OSError: if it cannot be read.
        """
        return (self._root / self._names[i]).read_bytes()
