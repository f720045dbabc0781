"""An index that is published beside tars: whoever reads them takes it and reads no headers.

One file, ``image-index-DIGEST.bin``: the content of ``index.json`` as a line, then the rows. The
digest in its name is that of names and sizes of the tars and of the settings, so that an index is
found by what it is of; several may be in one folder.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataloading import index_file
from dataloading.columns import new_columns
from dataloading.entries import ENTRY
from dataloading.errors import DataError, ReadError
from dataloading.files import atomic_path, read_at
from dataloading.patience import LASTING, PATIENCE_S, Patience
from dataloading.shards import PUBLISHED, Shard, open_shard
from dataloading.stores import RemoteTar, TarPlace, find_tars

logger = logging.getLogger(__name__)

_AT_ONCE = 16 << 20  # bytes
_ROWS_AT_ONCE = 1 << 20


def write_published(
    facts: dict[str, Any], entries: NDArray[np.void], shards: Sequence[Shard], folder: Path | None
) -> Path:
    """Write an index beside its tars; or into ``folder``, from where it is to be copied there.

    Args:
        facts: content of ``index.json``.
        entries: rows of the index.
        shards: the tars; on a file system, if no folder is named.
        folder: made if it does not exist.

    Returns:
        The file.

    Raises:
        DataError: if it cannot be written.
    """
    path = Path(_place_of(shards, facts["contents"]))
    path = folder / path.name if folder is not None else path
    tree = index_file.hash_blocks(entries.view(np.uint8))
    whole = {"format": index_file.FORMAT, **facts, "tree": tree}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as draft, draft.open("wb") as file:
            file.write(json.dumps(whole).encode("ascii") + b"\n")
            file.write(entries.view(np.uint8).data)
    except OSError as error:
        raise DataError(
            f"{path}: the index cannot be written ({error.strerror}); name another folder, and "
            "copy the index beside the tars"
        ) from error
    return path


def take_published(
    shards: Sequence[Shard], own: dict[str, Any], folder: Path
) -> index_file.Kept | None:
    """Copy the index that is published beside tars into a folder.

    Args:
        shards: the tars.
        own: ``root``, ``settings``, ``listing`` and ``contents`` of this data set.
        folder: keeps the index from now on.

    Returns:
        The index; ``None``: there is none of these tars and settings, or it is damaged.

    Raises:
        ReadError: if storage fails for longer than reads are retried.
        OSError: if the folder cannot be written.
    """
    place = _find(shards, own["contents"])
    if place is None:
        return None
    try:
        facts = _copy(place, shards, own, folder)
    except ReadError:
        raise
    except (DataError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s: cannot be used (%s); the headers of all images are read", place, error)
        return None
    logger.info("%s: %d rows are taken, no header is read", place, facts["images"])
    return index_file.publish(folder, facts)


def _place_of(shards: Sequence[Shard], contents: str) -> str:
    """Return where the index of tars is published: in the folder that they have in common."""
    path, file = shards[0]
    folders = str(path).split("/")[: -1 - file.name.count("/")]
    return "/".join([*folders, f"{PUBLISHED}{contents[:16]}.bin"])


def _find(shards: Sequence[Shard], contents: str) -> TarPlace | None:
    text = _place_of(shards, contents)
    if not isinstance(shards[0].path, RemoteTar):
        return Path(text) if Path(text).is_file() else None

    def find() -> RemoteTar | None:
        try:
            return find_tars([text])[0]
        except OSError as error:  # without the right to list, S3 answers 403 for what is not there
            if error.errno in LASTING:
                return None
            raise

    return Patience(PATIENCE_S).retry(find, text)


def _copy(
    place: TarPlace, shards: Sequence[Shard], own: dict[str, Any], folder: Path
) -> dict[str, Any]:
    """Copy the rows, and return the facts.

    Raises:
        ValueError, KeyError, TypeError: if the published index is damaged, or is of other tars.
    """
    patience = Patience(PATIENCE_S)
    with open_shard(place) as (file, size):

        def read(offset: int, count: int) -> bytes:
            data = patience.retry(lambda: read_at(file, count, offset), str(place))
            if not data:
                raise ValueError("it is cut short")
            return data

        head = read(0, _AT_ONCE)
        while b"\n" not in head:
            head += read(len(head), _AT_ONCE)
        line = head.partition(b"\n")[0]
        facts: dict[str, Any] = json.loads(line)
        if (facts["format"], facts["contents"]) != (index_file.FORMAT, own["contents"]):
            raise ValueError("it is of another format, or of other tars")
        rows, begin = facts["images"], len(line) + 1
        if size != begin + rows * ENTRY.itemsize:
            raise ValueError(f"it has {size} bytes, not those of {rows} rows")
        with index_file.new_file(folder, own["listing"]) as new_buffer:
            entries, _ = new_columns(rows, 0, new_buffer)
            data, at = entries.view(np.uint8), 0
            while at < len(data):
                block = read(begin + at, min(_AT_ONCE, len(data) - at))
                data[at : at + len(block)] = np.frombuffer(block, np.uint8)
                at += len(block)
            if index_file.hash_blocks(data) != facts["tree"]:
                raise ValueError("its rows are damaged")
            _require_rows(entries, [shard.file.size for shard in shards], len(facts["labels"]))
    return {**facts, **own}


def _require_rows(entries: NDArray[np.void], sizes: Sequence[int], labels: int) -> None:
    """Refuse rows that are not in the tars."""
    bounds = np.array(sizes, np.uint64)
    for at in range(0, len(entries), _ROWS_AT_ONCE):
        rows = entries[at : at + _ROWS_AT_ONCE]
        if rows["shard"].max() >= len(bounds) or rows["label"].max() >= labels:
            raise ValueError("it names tars or labels that there are not")
        if (rows["offset"] + rows["size"] > bounds[rows["shard"]]).any():
            raise ValueError("it names images behind the end of their tar")
