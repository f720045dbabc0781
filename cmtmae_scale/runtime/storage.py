"""Files on storage: atomic writes, digests, and dropping pages from memory."""

import errno
import hashlib
import json
import logging
import os
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cmtmae_scale.errors import may_pass
from dataloading.files import append_line, append_whole, atomic_path, open_regular, sync

__all__ = [
    "append_line",
    "append_whole",
    "atomic_path",
    "digest",
    "drop_from_memory",
    "list_names",
    "optional_write",
    "read_inside",
    "read_json",
    "read_regular",
    "require_inside",
    "sync",
    "warn_unwritten",
    "write_atomic",
]

MAX_BYTES = 2**30
"""Largest file that is read into memory as a whole: 1 GiB."""

logger = logging.getLogger(__name__)

WARN_EVERY_S = 60.0
"""Shortest time between two warnings about one file that cannot be written."""
_warned_at: dict[Path, float] = {}


def warn_unwritten(path: Path, error: OSError) -> None:
    """Warn that a file cannot be written, at most every ``WARN_EVERY_S`` per file."""
    now = time.monotonic()
    if now - _warned_at.get(path, float("-inf")) >= WARN_EVERY_S:
        _warned_at[path] = now
        logger.warning(
            "%s cannot be written (%s); the run continues without it; check space, quota and "
            "permissions there",
            path,
            error.strerror or error,
        )


@contextmanager
def optional_write(path: Path, at_launch: bool = False) -> Iterator[None]:
    """Turn an ``OSError`` of the block, which writes an optional file, into a warning.

    Args:
        path: the file, for the warning.
        at_launch: raise the error of a store that is full or fails, since nothing is lost yet.
    """
    try:
        yield
    except OSError as error:
        if at_launch and may_pass(error):
            raise
        warn_unwritten(path, error)


def digest(
    path: Path,
    offset: int = 0,
    size: int | None = None,
    report: Callable[[int], object] = lambda _: None,
) -> str:
    """Return the SHA-256 of a file, or of some of its bytes.

    Args:
        path: the file.
        offset: first byte.
        size: number of bytes; ``None``: up to the end.
        report: called with the number of bytes of each piece that is read.
    """
    sha256 = hashlib.sha256()
    left = sys.maxsize if size is None else size
    with path.open("rb", buffering=0) as opened:
        opened.seek(offset)
        while piece := opened.read(min(2**20, left)):
            sha256.update(piece)
            left -= len(piece)
            report(len(piece))
    return sha256.hexdigest()


def list_names(folder: Path) -> list[str]:
    """Return the names in a folder; none if it is absent.

    ``Path.glob`` would return none also if the store fails or refuses.

    Raises:
        OSError: if the store fails or refuses.
    """
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []


def require_inside(folder: Path, path: Path) -> None:
    """Refuse a path that is not a regular file within a folder; nothing is opened.

    Args:
        folder: the folder; it may itself be named through links.
        path: within the folder, as the caller built it.

    Raises:
        OSError: if the path is absent, a folder, a pipe or a device, or a link out of the folder.
    """
    if not path.resolve().is_relative_to(folder.resolve()):
        raise OSError(errno.EINVAL, f"Links to a file outside {folder}", str(path))
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "Not a regular file", str(path))


def read_inside(folder: Path, path: Path, limit: int = MAX_BYTES) -> bytes:
    """Read a regular file within a folder.

    Raises:
        OSError: as ``require_inside``, and for a file of more than ``limit`` bytes.
    """
    require_inside(folder, path)
    return read_regular(path, limit)


def read_regular(path: Path, limit: int = MAX_BYTES) -> bytes:
    """Read a regular file, also through links.

    Raises:
        OSError: if it cannot be read, is a pipe or a device, or has more than ``limit`` bytes.
    """
    with open(open_regular(path), "rb") as opened:
        size = os.fstat(opened.fileno()).st_size
        if size > limit:
            raise OSError(errno.EFBIG, f"Has {size} bytes, more than {limit}", str(path))
        return opened.read(limit)


def read_json(data: bytes | str) -> Any:
    """Parse JSON.

    Raises:
        ValueError: if it is not JSON, not UTF-8, or nested too deeply.
    """
    try:
        return json.loads(data)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def write_atomic(path: Path, data: str | bytes, durable: bool = True) -> dict[str, Any]:
    """Write a small file atomically.

    Args:
        path: the file; an existing one is replaced.
        data: the content; text is encoded as UTF-8.
        durable: force the content to storage before the file gets its name.

    Returns:
        The file's size in bytes and its SHA-256.
    """
    content = data.encode() if isinstance(data, str) else data
    with atomic_path(path, durable) as draft:
        draft.write_bytes(content)
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def drop_from_memory(path: Path) -> float | None:
    """Drop a file's pages from the page cache, so that the next read comes from storage.

    Returns:
        Fraction of 64 evenly spaced pages that are in memory afterwards; ``None`` if the file
        system cannot report it.
    """
    sync(path)
    handle = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        length = os.fstat(handle).st_size
        places = sorted({length * k // 64 for k in range(64)})
        found = sum(is_in_memory(handle, place) for place in places) / len(places)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)  # the test may have read ahead
    except OSError:
        return None
    finally:
        os.close(handle)
    return found


def is_in_memory(handle: int, place: int) -> bool:
    """Return whether a byte of a file is in the page cache.

    Raises:
        OSError: if the file system cannot report it.
    """
    try:
        return os.preadv(handle, [bytearray(1)], place, os.RWF_NOWAIT) > 0
    except BlockingIOError:
        return False
