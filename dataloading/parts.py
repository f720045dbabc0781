"""Pieces of an index in progress, kept so that a build that is killed continues."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from dataloading.entries import File, encode_name
from dataloading.files import atomic_path


class Parts:
    """What is known of the files of a data set, one small file of JSON per piece of them.

    Args:
        folder: created when it is needed; ``None``: nothing is kept.
        settings: what the results depend on beside the files.
    """

    def __init__(self, folder: Path | None, *settings: int) -> None:
        self.folder = folder
        self.settings = settings

    def recall(self, files: Sequence[File]) -> Any:
        """Return what was kept of these files; ``None``: nothing, or they differ by now."""
        if self.folder is None:
            return None
        try:
            sha256, _, text = (self.folder / self._name(files)).read_bytes().partition(b"\n")
        except OSError:
            return None
        return json.loads(text) if hashlib.sha256(text).hexdigest().encode() == sha256 else None

    def keep(self, files: Sequence[File], facts: Any) -> None:
        """Keep what is known of some files; where the store refuses, nothing is kept."""
        if self.folder is None:
            return
        text = json.dumps(facts).encode("ascii")
        with suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_path(self.folder / self._name(files), durable=False) as draft:
                draft.write_bytes(hashlib.sha256(text).hexdigest().encode() + b"\n" + text)

    def remove(self) -> None:
        """Delete all pieces, when the index itself is kept."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _name(self, files: Sequence[File]) -> str:
        total = hashlib.sha256(repr(self.settings).encode())
        for file in files:
            total.update(encode_name(file.name) + b"\0%d %d\n" % (file.size, file.mtime_ns))
        return total.hexdigest()
