"""An index that is kept in a folder: used while its files are unchanged, else built there."""

import errno
import logging
import os
import socket
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from dataloading import index_file
from dataloading.columns import FileNames
from dataloading.data_set import (
    Listing,
    Request,
    SourceName,
    list_data,
    shard_source_of,
    warn_of_many_files,
)
from dataloading.entries import MAX_PIXELS, UNREADABLE, Passed
from dataloading.errors import DataError, ReadError
from dataloading.folders import is_readable
from dataloading.headers import LACKED, has_avif
from dataloading.index import UNITS, Index, Shards, examine, gather, log_passed
from dataloading.index_build import help_build, write_listing
from dataloading.passed_over import format_count, sort_counts
from dataloading.published import take_published, write_published
from dataloading.shard_names import TarNames
from dataloading.stores import TarPlace, as_root, place_from_text

logger = logging.getLogger(__name__)

Verify = Literal["never", "changed", "always"]
"""How a kept index is verified before it is used."""

_PARTS = "parts"


def load_or_build(
    path: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    source: SourceName = "auto",
    max_pixels: int = MAX_PIXELS,
    exif_orientation: bool = True,
    verify: Verify = "changed",
    recheck_excluded: bool = True,
) -> Index:
    """Open the index kept in a directory, or build it there.

    It is kept as ``index.json`` and one file of columns, which processes map, so that they share
    its memory. Until the index is complete, a folder ``parts`` keeps the finished pieces, so that a
    build that is killed continues. An index that is published beside tars is copied to
    ``directory``, and no header is read. ``directory`` is created if it does not exist; the other
    arguments are those of ``build_index``.

    Args:
        path: the data set.
        directory: the folder that keeps the index.
        source: as for ``build_index``.
        max_pixels: as for ``build_index``.
        exif_orientation: as for ``build_index``.
        verify: never: a kept index of this path and these settings is used as it is; a folder is
            not listed, of tars only names and sizes are compared; an index of another path is
            verified as for changed. changed: it is used while names, sizes and times of all files
            (images or tars) are unchanged, and excluded images still cannot be read. always: as
            changed, and the digests of its columns are verified.
        recheck_excluded: as for ``find_kept``.

    Raises:
        DataError: as ``build_index``, or if the directory cannot be written.
        ReadError: as ``build_index``, or if the directory's store is full or fails.
        ValueError: if ``source`` is not a known layout.
    """
    request, folder = Request(as_root(path), source, max_pixels, exif_orientation), Path(directory)
    found = find_kept(request, folder, verify, recheck_excluded)
    return found[0] if found[0] is not None else build_kept(found[1], folder)


def find_kept(
    request: Request,
    folder: Path,
    verify: Verify,
    recheck_excluded: bool = True,
    published: bool = True,
) -> tuple[Index, Listing | None] | tuple[None, Listing]:
    """Return the index that may be used as it is, and the listing that it was compared with.

    That is the index that ``folder`` keeps, or else the index that is published beside the tars,
    unless the tars have changed since the kept index was built. A published index is copied to
    ``folder``; without ``published`` it is not used. With ``verify="never"`` an index of the same
    folder of images is not compared with a listing. Without ``recheck_excluded`` excluded images
    stay excluded even if they can be read now.

    Raises:
        DataError, ReadError, ValueError: as ``load_or_build``.
    """
    kept, problem = _open(folder, request)
    if kept is not None and verify == "always" and not kept.is_intact():
        kept, problem = None, "its columns are damaged"
    root = _name_root(request)
    is_trusted = kept is not None and verify == "never" and kept.facts.get("root") == root
    is_folder = kept is not None and kept.facts["source"] == "folder"
    if kept is not None and is_trusted and is_folder and shard_source_of(request) is None:
        return _use(request, kept, None, folder), None
    listing = list_data(request)
    warn_of_many_files(listing)
    own, have_changed = _own_facts(listing), False
    if kept is not None:
        compared = "contents" if is_trusted else "listing"
        of = kept.facts.get("root", root)
        if kept.facts[compared] != own[compared]:
            have_changed = of == root
            problem = "the files have changed" if have_changed else f"it is the index of {of}"
        elif not is_trusted and recheck_excluded:
            problem = _find_regained(listing, kept.facts["excluded"])
        if problem is None:
            return _use(request, kept, listing, folder), listing
    if problem is not None:
        logger.warning("%s: the index is built again: %s", folder, problem)
    if published and listing.shards and not have_changed:
        with _written(folder):
            kept = take_published(listing.shards, own, folder)
        if kept is not None:
            return _use(request, kept, listing, folder), listing
    return None, listing


def _find_regained(listing: Listing, excluded: Sequence[tuple[str, str]]) -> str | None:
    """Return which image was excluded and may be usable now, though its file is unchanged."""
    (root, *_), files = listing.request, listing.files
    compared = {files.names[row] for row in files.faults}  # with the listing
    for name, reason in excluded:
        is_unread = reason.startswith(UNREADABLE) and name not in compared
        if (LACKED in reason and has_avif()) or (is_unread and is_readable(Path(root, name))):
            return f"{name} was excluded and may be usable now"
    return None


def require_publishable(listing: Listing, into_folder: bool) -> None:
    """Refuse to publish the index of a folder of images, or to write to a store.

    Raises:
        DataError: names the remedy.
    """
    path = listing.request.path
    if not listing.shards:
        raise DataError(
            f"{path}: an index is published beside tars only; keep it for data.index (--index "
            "FOLDER), or pack the images (--pack OUT)"
        )
    if isinstance(path, str) and not into_folder:
        raise DataError(
            f"{path}: nothing is written to stores; write the index into a folder (--write-index "
            "FOLDER) and copy it beside the tars"
        )


def write_index(listing: Listing, index: Index, folder: Path | None = None) -> Path:
    """Publish an index beside its tars, or write it into a folder to be copied there.

    Returns:
        The file.

    Raises:
        DataError: as ``require_publishable``, or if it cannot be written.
    """
    require_publishable(listing, folder is not None)
    facts = {**_own_facts(listing), **_facts_of(index)}
    del facts["root"]  # copies are elsewhere
    return write_published(facts, index.entries, listing.shards, folder)


def require_files(request: Request, contents: str) -> None:
    """Compare names and sizes of the files here with those of another machine.

    Times are not compared: those of a copy differ.

    Args:
        request: data set and settings of the index.
        contents: ``Listing.digest(with_times=False)`` there.

    Raises:
        DataError: if they differ, or as ``build_index``.
    """
    listing = list_data(request)
    if listing.digest(with_times=False) != contents:
        raise DataError(
            f"{request.path}: names or sizes of the {len(listing.files)} files on host "
            f"{socket.gethostname()} differ from those that rank 0 found; copy them again, or set "
            "data.path to a folder that all machines share"
        )


def share_listing(listing: Listing, folder: Path) -> None:
    """Write what ``help_index`` needs beside an index that is to be built."""
    write_listing(listing.files, listing.shards, folder / _PARTS)


def help_index(request: Request, folder: Path, share: tuple[int, int]) -> None:
    """Examine a share of the pieces of a shared listing, before ``build_kept`` combines them.

    Args:
        request: data set and settings of the index.
        folder: the folder that keeps the index.
        share: number of this process, and number of processes.

    Raises:
        ReadError: if storage fails for longer than reads are retried.
    """
    help_build(request.path, folder / _PARTS, share, *request[2:])


def build_kept(listing: Listing, folder: Path) -> Index:
    """Build an index and keep it in a folder.

    Raises:
        DataError: as ``build_index``, or if the folder cannot be written, or has an ``index.json``
            of another program.
        ReadError: as ``build_index``, or if the folder's store is full or fails.
    """
    _open(folder, listing.request)  # refuses the folder of another program before the work
    own = _own_facts(listing)
    with _written(folder):
        parts, recall = examine(listing, folder / _PARTS)
        with index_file.new_file(folder, own["listing"]) as new_buffer:
            index = gather(listing, recall, new_buffer)
        kept = index_file.publish(folder, {**own, **_facts_of(index)})
        parts.remove()
    index = _make(listing.request, kept, listing)
    _log_excluded(index, folder)
    return index


@contextmanager
def _written(folder: Path) -> Generator[None, None, None]:
    """Raise an error with a remedy where the folder of an index cannot be written."""
    try:
        yield
    except OSError as error:
        text = f"{folder}: the index cannot be written ({error.strerror})"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ReadError(f"{text}; make room there and try again") from error
        if error.errno in (errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ESHUTDOWN):
            raise ReadError(f"{text}; see that the storage works and try again") from error
        raise DataError(f"{text}; set data.index to a writable folder") from error


def open_kept(
    path: str | os.PathLike[str], directory: str | os.PathLike[str], digest: str, shards: Shards
) -> Index:
    """Open an index that another process has just verified; nothing is listed or hashed.

    Args:
        path: the data set.
        directory: the folder that keeps the index.
        digest: of the index that is expected.
        shards: names and paths of the tars, ``Index.list_shards()`` of that process.

    Raises:
        DataError: if another index is there, or none.
    """
    folder = Path(directory)
    try:
        kept = index_file.open_file(folder)
        if kept.facts["digest"] != digest:
            raise ValueError(f"its digest is {kept.facts['digest'][:12]}, not {digest[:12]}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder}: the index of {path} cannot be opened ({error}); set data.index to a folder "
            "that all machines share"
        ) from error
    places = [place_from_text(text) for _, text in shards]
    return _index_of(as_root(path), kept, [name for name, _ in shards], places)


def _open(folder: Path, request: Request) -> tuple[index_file.Kept | None, str | None]:
    """Return the index of a folder if it has these settings; else why an existing one is not used.

    Whether its files have changed is not checked.
    """
    try:
        kept = index_file.open_file(folder)
        if kept.facts["settings"] != [*request[2:]]:
            return None, "it has other settings"
        _ = kept.entries, *(kept.facts[name] for name in ("contents", "digest", "source", "tree"))
    except FileNotFoundError:
        return None, None
    except (OSError, ValueError, KeyError, TypeError) as error:
        return None, f"it cannot be used ({error})"
    return kept, None


def _make(request: Request, kept: index_file.Kept, listing: Listing | None) -> Index:
    shards = listing.shards if listing is not None else []
    names = [shard.file.name for shard in shards]
    index = _index_of(request.path, kept, names, [shard.path for shard in shards])
    if index.source == "folder" and listing is not None:
        return replace(index, passed_over=sort_counts([listing.passed]))
    return index


def _use(request: Request, kept: index_file.Kept, listing: Listing | None, folder: Path) -> Index:
    """Make an index that was not built by this launch, and log what it excludes."""
    index = _make(request, kept, listing)
    log_passed(index, logging.INFO)
    _log_excluded(index, folder)
    return index


def _index_of(
    root: Path | str, kept: index_file.Kept, names: Sequence[str], places: Sequence[TarPlace]
) -> Index:
    facts, entries = kept.facts, kept.entries
    return Index(
        root,
        facts["source"],
        entries,
        TarNames(names, entries) if names else kept.names,
        tuple(facts["labels"]),
        tuple((name, reason) for name, reason in facts["excluded"]),
        facts["digest"],
        tuple(Passed(*item) for item in facts["passed_over"]),
        tuple(facts["row_group"]) if facts.get("row_group") else None,
        tuple(places),
    )


def _own_facts(listing: Listing) -> dict[str, Any]:
    """Return the identity of an index: path, settings, digests of files with and without times."""
    return {
        "root": _name_root(listing.request),
        "settings": [*listing.request[2:]],
        "listing": listing.digest(with_times=True),
        "contents": listing.digest(with_times=False),
    }


def _name_root(request: Request) -> str:
    """Return the path, pattern or address of a data set, independent of the working folder."""
    path = request.path
    return path if isinstance(path, str) else os.path.abspath(path)


def _facts_of(index: Index) -> dict[str, Any]:
    return {
        "source": index.source,
        "digest": index.digest,
        "images": len(index),
        "name_bytes": len(index.names.text) if isinstance(index.names, FileNames) else 0,
        "labels": index.labels,
        "excluded": index.excluded,
        "passed_over": index.passed_over,
        "row_group": index.row_group,
    }


def _log_excluded(index: Index, folder: Path) -> None:
    """Log how many images are excluded, and where they are listed."""
    if index.excluded:
        number = format_count(len(index.excluded), UNITS[index.source])
        text = "%s: %s excluded or damaged; %s lists them with reasons"
        logger.info(text, index.root, number, folder / index_file.INDEX_JSON)
