"""Pieces of an index in progress, kept so that a build that is killed continues."""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dataloading.entries import ENTRY
from dataloading.files import atomic_path
from dataloading.listing import Files

LISTING = "listing.bin"
"""File beside the parts: the listing for ``help_build``."""
_OWN_NAME = re.compile(r"([0-9a-f]{64}|listing\.(bin|json))|\..+\.[0-9a-f]{8}\.tmp")


class Part(NamedTuple):
    """Result of reading the headers of one piece.

    Attributes:
        facts: plain JSON beside the rows; ``is_final``: whether another machine, or this machine
            later, would find the same.
        rows: of its usable images, in order, ``ENTRY``.
    """

    facts: dict[str, Any]
    rows: NDArray[np.void]


class Parts:
    """Results for the pieces of a data set, one file per piece, named by a digest of its input.

    Args:
        folder: created when it is needed; ``None``: results are kept in memory.
        files: the listing.
        pieces: rows of the listing that belong together.
        settings: what the results depend on beside the files.
    """

    def __init__(
        self, folder: Path | None, files: Files, pieces: Sequence[range], *settings: int
    ) -> None:
        self.folder = folder
        self.files = files
        self.pieces = pieces
        self._settings = repr(settings).encode("ascii")
        self._memory: dict[int, Part] = {}

    def has(self, piece: int) -> bool:
        """Return whether there is a result; it may be damaged."""
        path = self._path(piece)
        return piece in self._memory or (path is not None and path.exists())

    def recall(self, piece: int) -> Part | None:
        """Return the result; ``None``: there is none, or it is damaged."""
        path = self._path(piece)
        if piece in self._memory or path is None:
            return self._memory.get(piece)
        try:
            sha256, _, data = path.read_bytes().partition(b"\n")
        except OSError:
            return None
        if hashlib.sha256(data).hexdigest().encode() != sha256:
            return None
        facts, _, rows = data.partition(b"\n")
        return Part(json.loads(facts), np.frombuffer(rows, ENTRY))

    def keep(self, piece: int, part: Part) -> None:
        """Keep a result; in memory where it cannot be written, or is not final."""
        path = self._path(piece) if part.facts["is_final"] else None
        if path is not None:
            data = json.dumps(part.facts).encode("ascii") + b"\n" + part.rows.tobytes()
            with suppress(OSError):
                path.parent.mkdir(parents=True, exist_ok=True)
                with atomic_path(path, durable=False) as draft:
                    draft.write_bytes(hashlib.sha256(data).hexdigest().encode() + b"\n" + data)
                return
        self._memory[piece] = part

    def remove(self) -> None:
        """Delete all pieces, when the index itself is kept; other files in the folder stay."""
        if self.folder is not None:
            with suppress(OSError):
                for file in filter(_OWN_NAME.fullmatch, os.listdir(self.folder)):
                    (self.folder / file).unlink(missing_ok=True)
                self.folder.rmdir()

    def _path(self, piece: int) -> Path | None:
        if self.folder is None:
            return None
        rows = self.pieces[piece]
        total = hashlib.sha256(self._settings + self.files.digest_of(rows.start, rows.stop))
        return self.folder / total.hexdigest()
