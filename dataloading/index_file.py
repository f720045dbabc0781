"""An index on storage: ``index.json``, and one file of columns that all processes map.

The columns are named by a digest of the listing and are complete before ``index.json`` names them.
A reader therefore finds both files of the same index, whenever a writer is killed. ``tree`` has the
digest of each block of 16 MiB: blocks are verified in threads, and only on request.
"""

import functools
import hashlib
import json
import re
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from dataloading.columns import (
    Buffer,
    FileNames,
    NewBuffer,
    buffer_bytes,
    index_fields,
    map_buffer,
    new_mapping,
    view_columns,
)
from dataloading.errors import DataError
from dataloading.files import atomic_path

FORMAT = 4
INDEX_JSON = "index.json"

_BLOCK = 16 << 20
_THREADS = 8
_COLUMNS_NAME = re.compile(r"index-[0-9a-f]{16}\.bin")


class Kept(NamedTuple):
    """An index in its folder.

    Attributes:
        facts: content of ``index.json``.
        buffer: all columns, mapped.
    """

    facts: dict[str, Any]
    buffer: Buffer

    @property
    def entries(self) -> NDArray[np.void]:
        return self._columns()["entries"]

    @property
    def names(self) -> FileNames:
        """Names of the files; empty for tars."""
        columns = self._columns()
        return FileNames(columns["text"], columns["ends"])

    def _columns(self) -> dict[str, NDArray[Any]]:
        fields = index_fields(self.facts["images"], self.facts["name_bytes"])
        return view_columns(self.buffer, fields)

    def is_intact(self) -> bool:
        """Return whether every block has its digest."""
        return hash_blocks(self.buffer) == self.facts["tree"]


def open_file(folder: Path) -> Kept:
    """Map the index of a folder; nothing is hashed.

    Raises:
        OSError: if there is none, or it cannot be read.
        ValueError, KeyError, TypeError: if it is damaged or of another format.
        DataError: if ``index.json`` is that of another program.
    """
    content: Any = json.loads((folder / INDEX_JSON).read_text(encoding="utf-8"))
    facts: dict[str, Any] = cast(dict[str, Any], content) if isinstance(content, dict) else {}
    if not {"format", "listing"} <= set(facts):  # every format has these two
        raise DataError(
            f"{folder / INDEX_JSON}: is not an index of images, and is not replaced by one; set "
            "data.index (--index) to a folder of its own"
        )
    if facts["format"] != FORMAT:
        raise ValueError(f"its format is {facts['format']}, not {FORMAT}")
    size = buffer_bytes(index_fields(facts["images"], facts["name_bytes"]))
    return Kept(facts, map_buffer(folder / _columns_name(facts["listing"]), size))


@contextmanager
def new_file(folder: Path, listing: str) -> Generator[NewBuffer, None, None]:
    """Yield a function that creates the buffer of a new index; the file is renamed at the end.

    Raises:
        OSError: if it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder / _columns_name(listing)) as draft:
        yield functools.partial(new_mapping, draft)


def publish(folder: Path, facts: dict[str, Any]) -> Kept:
    """Write ``index.json`` beside the columns that ``new_file`` wrote, and delete older ones.

    Raises:
        OSError: if it cannot be written.
    """
    name = _columns_name(facts["listing"])
    others = [file for file in folder.glob("index-*.bin") if _COLUMNS_NAME.fullmatch(file.name)]
    if _is_of_format_3(folder):
        others.append(folder / "index.npy")
    size = buffer_bytes(index_fields(facts["images"], facts["name_bytes"]))
    buffer = map_buffer(folder / name, size)
    whole = {"format": FORMAT, **facts, "tree": hash_blocks(buffer)}
    with atomic_path(folder / INDEX_JSON) as draft:
        draft.write_text(json.dumps(whole, indent=0), encoding="ascii")
    for old in others:
        if old.name != name:
            with suppress(OSError):
                old.unlink(missing_ok=True)
    return Kept(whole, buffer)


def hash_blocks(buffer: Buffer) -> list[str]:
    """Return the sha256 of each block of a buffer."""

    def work(start: int) -> str:
        return hashlib.sha256(buffer[start : start + _BLOCK].data).hexdigest()

    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(work, range(0, len(buffer), _BLOCK)))


def _is_of_format_3(folder: Path) -> bool:
    """Return whether ``index.npy`` belongs to the index of a folder."""
    with suppress(OSError, ValueError):
        return "npy_sha256" in json.loads((folder / INDEX_JSON).read_text(encoding="utf-8"))
    return False


def _columns_name(listing: str) -> str:
    return f"index-{listing[:16]}.bin"
