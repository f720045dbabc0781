"""Files that are on storage, whole, or not there at all."""

import hashlib
import os
from pathlib import Path
from typing import Any


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Force a file or folder to storage."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> dict[str, Any]:
    """Write a small file, whole or not at all; returns its size and SHA-256."""
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(text)
    sync(draft)
    draft.replace(path)
    return {"size": len(text.encode()), "sha256": hashlib.sha256(text.encode()).hexdigest()}


def drop_from_memory(path: Path) -> float | None:
    """Ask the system to forget a file's pages, so that it is next read from storage.

    Returns:
        Share of 64 pages, evenly spread, that are in memory afterwards; ``None`` where the file
        system does not tell.
    """
    sync(path)
    handle = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        length = os.fstat(handle).st_size
        places = sorted({length * k // 64 for k in range(64)})
        found = sum(is_in_memory(handle, place) for place in places) / len(places)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)  # looking may read ahead
    except OSError:
        return None
    finally:
        os.close(handle)
    return found


def is_in_memory(handle: int, place: int) -> bool:
    """Whether a byte of a file can be had without waiting for storage.

    Raises:
        OSError: if the file system does not tell.
    """
    try:
        return os.preadv(handle, [bytearray(1)], place, os.RWF_NOWAIT) > 0
    except BlockingIOError:
        return False
