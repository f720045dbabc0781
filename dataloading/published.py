"""An index that is published beside tars: it is copied, and no headers are read.

One file, ``image-index-DIGEST.bin``: the content of ``index.json`` as a line, then the rows. The
digest in its name is that of names and sizes of the tars and of the settings: it identifies the
index, so that one folder may hold several. The index records the versions of the tars, since an
edited tar often keeps its size.
"""

import json
import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataloading import index_file
from dataloading.columns import new_columns
from dataloading.entries import ENTRY
from dataloading.errors import DataError, ReadError
from dataloading.files import atomic_path, read_at
from dataloading.headers import LACKED, has_avif
from dataloading.patience import LASTING, PATIENCE_S, Patience
from dataloading.shard_names import is_parquet
from dataloading.shards import PUBLISHED, Shard, open_shard
from dataloading.stores import RemoteTar, TarPlace, find_tars, find_times

logger = logging.getLogger(__name__)

_AT_ONCE = 16 << 20  # bytes
_ROWS_AT_ONCE = 1 << 20
_PAUSE_S = 3600.0  # longest between two files of one copy


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
    place = _place_of(shards, facts["contents"])
    path = Path(place) if folder is None else folder / Path(place).name
    tree = index_file.hash_blocks(entries.view(np.uint8))
    versions = [shard.file.mtime_ns for shard in shards]
    whole = {"format": index_file.FORMAT, **facts, "tree": tree, "versions": versions}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as draft:
            draft.touch()
            time_ns = draft.stat().st_mtime_ns
            whole["home"] = place if isinstance(shards[0].path, RemoteTar) else time_ns
            with draft.open("wb") as file:
                file.write(json.dumps(whole).encode("ascii") + b"\n")
                file.write(entries.view(np.uint8).data)
            with suppress(OSError):  # then it counts as a copy
                os.utime(draft, ns=(time_ns, time_ns))
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
        The index; ``None``: none of these tars and settings exists, or it is damaged, or older than
        a tar.

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
        except OSError as error:  # without permission to list, S3 answers 403 for a missing object
            if error.errno in LASTING:
                return None
            raise

    return Patience(PATIENCE_S).retry(find, text)


def _copy(
    place: TarPlace, shards: Sequence[Shard], own: dict[str, Any], folder: Path
) -> dict[str, Any]:
    """Copy the rows, and return the facts.

    Raises:
        ValueError, KeyError, TypeError: if the published index is damaged, or is of other tars, or
            of these before they changed.
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
        changed = _find_changed(place, shards, facts)
        if changed is not None:
            raise ValueError(
                f"{changed} has changed since, or was copied much later; publish the index again "
                "with check-data --write-index"
            )
        if has_avif() and any(LACKED in reason for _, reason in facts["excluded"]):
            raise ValueError("it lacks images that this Pillow reads")
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
            _require_rows(entries, shards, len(facts["labels"]))
    copied = {name: fact for name, fact in facts.items() if name not in ("versions", "home")}
    return {**copied, **own}


def _find_changed(place: TarPlace, shards: Sequence[Shard], facts: dict[str, Any]) -> str | None:
    """Return the name of a tar that has changed since its index was published; ``None``: of none.

    A copy is no change, but its tars may all have other times or ETags, and its index another time
    or address. A tar that changed later is recognised by a long pause before it was written.
    """
    versions: list[int] = facts.get("versions", [])  # earlier releases recorded none
    if versions:
        pairs = zip(shards, versions, strict=True)
        changed = [shard.file.name for shard, then in pairs if shard.file.mtime_ns != then]
        if not changed:
            return None
        home = place.url if isinstance(place, RemoteTar) else place.stat().st_mtime_ns
        if facts["home"] == home or len(changed) < len(shards):
            return changed[0]
    published_s, *tars_s = _modified(place, shards)
    named = zip(tars_s, (shard.file.name for shard in shards), strict=True)
    newer = sorted((time_s, name) for time_s, name in named if time_s > published_s)
    for (before_s, _), (time_s, name) in pairwise([(published_s, ""), *newer]):
        if time_s - before_s > _PAUSE_S:
            return name
    return None


def _modified(place: TarPlace, shards: Sequence[Shard]) -> list[float]:
    """Return when an index and its tars were modified, in seconds."""
    if not isinstance(place, RemoteTar):
        return [place.stat().st_mtime, *(shard.file.mtime_ns / 1e9 for shard in shards)]
    urls = [place.url, *(str(shard.path) for shard in shards)]
    return Patience(PATIENCE_S).retry(lambda: find_times(urls), place.url)


def _require_rows(entries: NDArray[np.void], shards: Sequence[Shard], labels: int) -> None:
    """Refuse rows that refer to no place in the files."""
    bounds = np.array([shard.file.size for shard in shards], np.uint64)
    # In Parquet an offset is the number of a row, and a size that of an image once decompressed.
    are_tars = not is_parquet(shards[0].file.name)
    for at in range(0, len(entries), _ROWS_AT_ONCE):
        rows = entries[at : at + _ROWS_AT_ONCE]
        if rows["shard"].max() >= len(bounds) or rows["label"].max() >= labels:
            raise ValueError("it names tars or labels that do not exist")
        if are_tars and (rows["offset"] + rows["size"] > bounds[rows["shard"]]).any():
            raise ValueError("it names images beyond the end of their tar")
