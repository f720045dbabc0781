"""Folders that the demo writes, each with a record beside it that identifies it."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from cmtmae_scale.errors import ConfigError, may_pass
from cmtmae_scale.runtime.storage import atomic_path, read_json, write_atomic


def record_file(folder: Path) -> Path:
    """Return the record of a folder."""
    return folder.with_name(folder.name + ".json")


def read_record(folder: Path) -> dict[str, int] | None:
    """Return the record of a folder; ``None`` if there is none, or the file is something else.

    Raises:
        OSError: if the store fails.
    """
    try:
        record = read_json(record_file(folder).read_bytes())
    except (OSError, ValueError) as error:
        if may_pass(error):
            raise
        return None
    is_record = isinstance(record, dict) and "recipe" in record
    return record if is_record and all(type(one) is int for one in record.values()) else None


def write_folder(folder: Path, fill: Callable[[Path], dict[str, int]]) -> None:
    """Write a folder and its record; an earlier folder is replaced if it is the demo's.

    Args:
        folder: appears whole or not at all.
        fill: writes a draft of the folder, and returns the record.

    Raises:
        ConfigError: if the folder exists and is not the demo's.
    """
    taken = next((path for path in (folder, record_file(folder)) if os.path.lexists(path)), None)
    if taken is not None and (folder.is_symlink() or read_record(folder) is None):
        raise ConfigError(
            f"{taken}: was not written by the demo, or its record {record_file(folder)} is lost; "
            "move or delete it, or run the demo in another folder"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder, durable=False) as draft:
        record = fill(draft)
        if folder.exists():
            shutil.rmtree(folder)
        # Before the folder gets its name: a folder without a record would not be the demo's.
        write_atomic(record_file(folder), json.dumps(record) + "\n")
