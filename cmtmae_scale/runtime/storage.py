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
