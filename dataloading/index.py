"""The list of samples: what there is, how large it is, and a digest that names it."""

import errno
import hashlib
import json
import logging
import os
import re
import socket
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from dataloading import index_file
from dataloading.addresses import hide_secrets
from dataloading.columns import FileNames, NewBuffer, folders_of, new_memory
from dataloading.entries import MAX_PIXELS, UNREADABLE, Passed, count_turned
from dataloading.errors import DataError, ReadError
from dataloading.folders import gather_folder, is_readable, list_folder
from dataloading.headers import LACKED, has_avif
from dataloading.index_build import build_parts, help_build, make_pieces, write_listing
from dataloading.listing import Files, collect_files
from dataloading.name_checks import find_equal_labels, find_split_folders, find_splits
from dataloading.parquet import ParquetSource, require_pyarrow
from dataloading.parts import Part, Parts
from dataloading.passed_over import Counts, format_count, format_passed, lost_images, sort_counts
from dataloading.published import take_published, write_published
from dataloading.shards import (
    Shard,
    ShardSource,
    TarNames,
    detect_source,
    is_listed,
    is_parquet,
    list_shards,
)
from dataloading.sources import FolderSource, Source, TarSource
from dataloading.store_cache import StoreCache
from dataloading.stores import (
    RemoteTar,
    StoreSource,
    TarPlace,
    as_root,
    place_from_text,
    place_to_text,
)
from dataloading.webdataset import gather_shards

logger = logging.getLogger(__name__)

SourceName = Literal["auto", "folder", "webdataset", "parquet"]
Shards = Sequence[tuple[str, str]]
"""Name and path of every shard; none for a folder."""

Verify = Literal["never", "changed", "always"]
"""What of a kept index is verified before it is used."""

UNITS = {"folder": "file", "webdataset": "member", "parquet": "row"}
"""What is counted where an index passes it over, by ``Index.source``."""

PARTS = "parts"
MANY_FILES = 2_000_000
"""Files of a folder above which tars are recommended."""


@dataclass(frozen=True, eq=False)
class Index:
    """Usable samples of a data set; row i is sample id i.

    Its shards are tars or Parquet files.

    Attributes:
        root: the data set as the caller named it: folder, shard or pattern; the address of such.
        source: layout under it.
        entries: structured array of ``ENTRY``, one row per sample, ordered by path in a folder, by
            shard and offset in shards; in a Parquet file the offset is the row.
        names: name of each row, made when asked for. Folder: path relative to the root, with
            ``/``. Shards: the place, "byte 1536 of train-000.tar", "row 15 of train-000.parquet".
        labels: names of the labels, sorted. Folder: the folders directly under the root. Tars: the
            texts of ``.cls`` members. Parquet: the values of a column, or the names of a
            ClassLabel, in its order.
        excluded: (name, reason) of files and members that look like images and cannot be used.
        digest: sha256 over keys and sizes (bytes, width, height) of all rows, and their turns if
            there are any, hexadecimal; the same for every copy of the data set.
        passed_over: counts of the files and members that are not taken as images, by extension.
        row_group: of Parquet files the largest row group: bytes of its images, and its place.
        shards: the files that hold the samples, in order; none for a folder.
    """

    root: Path | str
    source: Literal["folder", "webdataset", "parquet"]
    entries: NDArray[np.void]
    names: Sequence[str]
    labels: tuple[str, ...]
    excluded: tuple[tuple[str, str], ...]
    digest: str
    passed_over: tuple[Passed, ...] = ()
    row_group: tuple[int, str] | None = None
    shards: tuple[TarPlace, ...] = ()

    def __len__(self) -> int:
        return len(self.entries)

    def labels_digest(self) -> str:
        """Return the sha256, hexadecimal, of names and rows' labels, which ``digest`` lacks."""
        total = hashlib.sha256(json.dumps(self.labels).encode("ascii"))
        total.update(self.entries["label"].tobytes())
        return total.hexdigest()

    def is_remote(self) -> bool:
        """Return whether the samples are in a store."""
        return bool(self.shards) and isinstance(self.shards[0], RemoteTar)

    def open(self, store_cache: Path | None = None) -> Source:
        """Open the samples; those of a store through a ``StoreCache`` in a folder, if any."""
        if self.source == "folder":
            return FolderSource(self.root, self.names, self.entries)
        remote = [tar for tar in self.shards if isinstance(tar, RemoteTar)]
        if remote:
            cached = None if store_cache is None else StoreCache(store_cache).read
            return StoreSource(remote, self.entries, read_cached=cached)
        files = [shard for shard in self.shards if isinstance(shard, Path)]
        make = ParquetSource if self.source == "parquet" else TarSource
        return make(files, self.entries)

    def list_shards(self) -> Shards:
        """Return name and path of every shard, for ``open_kept``."""
        if not isinstance(self.names, TarNames):
            return []
        places = map(place_to_text, self.shards)
        return list(zip(self.names.shards, places, strict=True))

    def where(self, i: int) -> tuple[TarPlace, int | None]:
        """Return the file of row ``i`` and, in a shard, the byte at which it begins, or the row."""
        row = self.entries[i]
        if self.source == "folder":
            return Path(self.root, self.names[i]), None
        return self.shards[int(row["shard"])], int(row["offset"])


class Request(NamedTuple):
    """What an index is built from; the arguments of ``build_index``."""

    path: Path | str
    source: str = "auto"
    max_pixels: int = MAX_PIXELS
    exif_orientation: bool = True


class Listing(NamedTuple):
    """The files of a data set before they are examined.

    Attributes:
        request: what was asked for.
        files: images of a folder, or shards.
        shards: tars or Parquet files; none for a folder.
        passed: counts of what is passed over beside them.
    """

    request: Request
    files: Files
    shards: list[Shard]
    passed: Counts

    @property
    def source(self) -> Literal["folder", "webdataset", "parquet"]:
        if not self.shards:
            return "folder"
        return "parquet" if is_parquet(self.shards[0].file.name) else "webdataset"

    def digest(self, with_times: bool) -> str:
        """Hash settings, names and sizes, and times if wanted, hexadecimal."""
        settings = (index_file.FORMAT, *self.request[2:], self.source, with_times)
        total = hashlib.sha256(repr(settings).encode("ascii"))
        total.update(self.files.digest_of(0, len(self.files), with_times))
        return total.hexdigest()


def build_index(
    path: str | os.PathLike[str],
    source: SourceName = "auto",
    max_pixels: int = MAX_PIXELS,
    exif_orientation: bool = True,
) -> Index:
    """List the images of a folder, WebDataset tars or Parquet files; no image is decoded.

    Files are taken by their extension, links are followed, hidden files are skipped. Empty,
    unreadable and oversized images are excluded and reported in ``Index.excluded``, as are damaged
    parts of tars. Other files and members are counted by extension in one log line. Headers are
    read, but a Parquet file whole: pyarrow reads no part of an image.

    Args:
        path: folder of images, the folders directly under it are labels; or tars: a folder that
            holds them directly, one of them, or a pattern such as ``train-{000..146}.tar`` or
            ``train-*.tar``; or the address of such tars, ``s3://``, ``gs://``, ``https://``; or
            Parquet files, in the same ways but without an address.
        source: "folder", "webdataset", "parquet", or "auto", which detects it, and refuses to mix
            folders or shards of a training and of a test set.
        max_pixels: images with more pixels (width x height) are excluded.
        exif_orientation: turn images upright as their EXIF orientation says; rows then have width
            and height of the upright image. The orientation is recorded in any case.

    Raises:
        DataError: if the data are missing, not what ``source`` says, or hold no usable image, or
            if more than half of the files or members are passed over.
        ReadError: if storage fails for longer than reads are retried.
        ValueError: if ``source`` is not a known layout.
    """
    return build_listed(list_data(Request(as_root(path), source, max_pixels, exif_orientation)))


def build_listed(listing: Listing) -> Index:
    """Build the index of a listing in memory.

    Raises:
        DataError, ReadError: as ``build_index``.
    """
    parts = _parts(listing, None)
    recall = build_parts(listing.request.path, listing.shards, parts, *listing.request[2:])
    return _gather(listing, recall, new_memory)


def load_or_build(
    path: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    source: SourceName = "auto",
    max_pixels: int = MAX_PIXELS,
    exif_orientation: bool = True,
    verify: Verify = "changed",
) -> Index:
    """Open the index kept in a directory, or build it there.

    It is kept as ``index.json`` and one file of columns, which is mapped, so that processes share
    its memory. Until it is complete, a folder ``parts`` keeps what is known, so that a build that
    is killed continues. An index that is published beside tars is copied there, and no header read.
    ``directory`` is made if it does not exist; the other arguments are those of ``build_index``.

    Args:
        path: the data set.
        directory: the folder that keeps the index.
        source: as for ``build_index``.
        max_pixels: as for ``build_index``.
        exif_orientation: as for ``build_index``.
        verify: never: a kept index of this path and these settings is used as it is; a folder is
            not listed, of tars names and sizes are compared; of another path as changed. changed:
            it is used while names, sizes and times of all files (images or tars) are as they were,
            and what could not be read still cannot. always: the same, and its digests too.

    Raises:
        DataError: as ``build_index``, or if the directory cannot be written.
        ReadError: as ``build_index``, or if the directory's store is full or fails.
        ValueError: if ``source`` is not a known layout.
    """
    request, folder = Request(as_root(path), source, max_pixels, exif_orientation), Path(directory)
    found = find_kept(request, folder, verify)
    return found[0] if found[0] is not None else build_kept(found[1], folder)


def find_kept(
    request: Request, folder: Path, verify: Verify, look_again: bool = True
) -> tuple[Index, Listing | None] | tuple[None, Listing]:
    """Return the index that may be used as it is, and the listing it was compared with.

    That is the index that ``folder`` keeps, or else the one that is published beside the tars,
    unless the tars have changed since the former. With ``verify="never"`` an index of this very
    folder is compared with none. Without ``look_again`` images that could not be read stay excluded
    though they can be read by now.

    Raises:
        DataError, ReadError, ValueError: as ``load_or_build``.
    """
    kept, problem = _open(folder, request)
    if kept is not None and verify == "always" and not kept.is_intact():
        kept, problem = None, "its columns are damaged"
    root = _name_root(request)
    is_trusted = kept is not None and verify == "never" and kept.facts.get("root") == root
    is_folder = kept is not None and kept.facts["source"] == "folder"
    if kept is not None and is_trusted and is_folder and _shard_source(request) is None:
        return _use(request, kept, None, folder), None
    listing = list_data(request)
    warn_of_many_files(listing)
    own, have_changed = _own_facts(listing), False
    if kept is not None:
        compared = "contents" if is_trusted else "listing"
        of = kept.facts.get("root", root)
        if kept.facts[compared] != own[compared]:
            have_changed = of == root
            problem = "the files have changed" if have_changed else f"it is that of {of}"
        elif not is_trusted and look_again:
            problem = _find_regained(listing, kept.facts["excluded"])
        if problem is None:
            return _use(request, kept, listing, folder), listing
    if problem is not None:
        logger.warning("%s: the index is built again: %s", folder, problem)
    if listing.shards and not have_changed:
        with _written(folder):
            kept = take_published(listing.shards, own, folder)
        if kept is not None:
            return _use(request, kept, listing, folder), listing
    return None, listing


def _find_regained(listing: Listing, excluded: Sequence[tuple[str, str]]) -> str | None:
    """Return which image was excluded and may be usable now, though its file is as it was."""
    (root, *_), files = listing.request, listing.files
    compared = {files.names[row] for row in files.faults}  # with the listing
    for name, reason in excluded:
        is_unread = reason.startswith(UNREADABLE) and name not in compared
        if (LACKED in reason and has_avif()) or (is_unread and is_readable(Path(root, name))):
            return f"{name} was excluded and may be usable now"
    return None


def warn_of_many_files(listing: Listing) -> None:
    """Recommend tars for a folder of millions of files."""
    if not listing.shards and len(listing.files) > MANY_FILES:
        text = "%s: %d files, which every launch lists; pack them into tars (cmtmae check-data %s "
        text += "--pack OUT), or set data.verify_index=never"
        logger.warning(text, listing.request.path, len(listing.files), listing.request.path)


def require_publishable(listing: Listing, into_folder: bool) -> None:
    """Refuse to publish the index of a folder of images, or to write to a store.

    Raises:
        DataError: with what to do.
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
        request: what the index is of.
        contents: ``Listing.digest(with_times=False)`` there.

    Raises:
        DataError: if they differ, or as ``build_index``.
    """
    listing = list_data(request)
    if listing.digest(with_times=False) != contents:
        raise DataError(
            f"{request.path}: names or sizes of the {len(listing.files)} files on host "
            f"{socket.gethostname()} are not those that rank 0 found; copy them again, or set "
            "data.path to a folder that all machines share"
        )


def share_listing(listing: Listing, folder: Path) -> None:
    """Write what is needed to ``help_index`` beside an index that is to be built."""
    write_listing(listing.files, listing.shards, folder / PARTS)


def help_index(request: Request, folder: Path, share: tuple[int, int]) -> None:
    """Examine a share of what ``build_kept`` would, of a listing that is shared.

    Args:
        request: what the index is of.
        folder: that keeps the index.
        share: number of this process, and how many there are.

    Raises:
        ReadError: if storage fails for longer than reads are retried.
    """
    help_build(request.path, folder / PARTS, share, *request[2:])


def build_kept(listing: Listing, folder: Path) -> Index:
    """Build an index and keep it in a folder.

    Raises:
        DataError: as ``build_index``, or if the folder cannot be written.
        ReadError: as ``build_index``, or if the folder's store is full or fails.
    """
    request, parts = listing.request, _parts(listing, folder / PARTS)
    recall = build_parts(request.path, listing.shards, parts, *request[2:])
    own = _own_facts(listing)
    with _written(folder):
        with index_file.new_file(folder, own["listing"]) as new_buffer:
            index = _gather(listing, recall, new_buffer)
        kept = index_file.publish(folder, {**own, **_facts_of(index)})
        parts.remove()
    index = _make(request, kept, listing)
    _log_excluded(index, folder)
    return index


@contextmanager
def _written(folder: Path) -> Generator[None, None, None]:
    """Say what to do where the folder of an index cannot be written."""
    try:
        yield
    except OSError as error:
        text = f"{folder}: the index cannot be written ({error.strerror})"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise ReadError(f"{text}; make room there and try again") from error
        raise DataError(f"{text}; set data.index to a folder that can") from error


def _parts(listing: Listing, folder: Path | None) -> Parts:
    pieces = make_pieces(listing.files, listing.shards)
    return Parts(folder, listing.files, pieces, *listing.request[2:])


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
    """Return the index of a folder if it is of these settings; else why it is not, if there is one.

    Whether its files are as they were is not looked at.
    """
    try:
        kept = index_file.open_file(folder)
        if kept.facts["settings"] != [*request[2:]]:
            return None, "it is of other settings"
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
    """Make an index that was not built by this launch, and log what is not in it."""
    index = _make(request, kept, listing)
    _log_passed(index, logging.INFO)
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
    """Return what an index is of: path, settings, digests of the files with and without times."""
    return {
        "root": _name_root(listing.request),
        "settings": [*listing.request[2:]],
        "listing": listing.digest(with_times=True),
        "contents": listing.digest(with_times=False),
    }


def _name_root(request: Request) -> str:
    """Return the path of a data set, or its pattern or address, whatever the working folder is."""
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


def list_data(request: Request) -> Listing:
    """List the files of a data set.

    Raises:
        DataError, ReadError, ValueError: as ``build_index``.
    """
    root, source = request.path, request.source
    if source not in get_args(SourceName):
        raise ValueError(f"source is {source!r}; expected one of {get_args(SourceName)}")
    if isinstance(root, str) and (source in ("folder", "parquet") or is_parquet(root)):
        raise DataError(
            f"{hide_secrets(root)}: images are read from a store as tars only; pack them (cmtmae "
            "check-data FOLDER --pack OUT, of files on a disk) and set data.source=auto"
        )
    passed: Counts = {}
    shard_source = _shard_source(request)
    if shard_source is not None:
        if shard_source == "parquet":
            require_pyarrow(root)
        shards = list_shards(root, passed, shard_source)
        listing = Listing(request, collect_files(shard.file for shard in shards), shards, passed)
        problem = _mixed_shards(listing) if is_listed(root) else None
    else:
        files, passed = list_folder(Path(root))
        listing = Listing(request, files, [], passed)
        problem = _mixed_folders(listing)
    if problem is None:
        return listing
    if source == "auto":
        raise DataError(f"{root}: {problem}")
    logger.info("%s: all are used, since data.source=%s: %s", root, source, problem)
    return listing


def _shard_source(request: Request) -> ShardSource | None:
    """Return what kind of shards is to be read; ``None``: the files of a folder."""
    root, source = request.path, request.source
    if source == "webdataset" or source == "parquet":
        return source
    if isinstance(root, str):
        return "webdataset"
    return detect_source(root) if source == "auto" else None


def _mixed_folders(listing: Listing) -> str | None:
    """Return what to do if the folders are a training and a test set and no classes."""
    names = folders_of(listing.files.names)
    splits = find_split_folders({tuple(name.split("/")) if name else () for name in names})
    if splits is None:
        return None
    train, test = splits
    remedy = f"set data.path={Path(listing.request.path, train)}"
    if "*/" in train:
        remedy = "set data.path to a folder with links to the training images alone"
    return (
        f"holds {train}/ and {test}/, a training and a test set and no classes; {remedy}, or "
        "data.source=folder to use all images"
    )


def _mixed_shards(listing: Listing) -> str | None:
    """Return what to do if the shards are of a training and of a test set."""
    patterns = {re.sub(r"\d+", "*", shard.file.name) for shard in listing.shards}
    splits = find_splits(patterns)
    if splits is None:
        return None
    train, test = splits
    first = listing.shards[0]
    folder = str(first.path).removesuffix(first.file.name)
    files = "tars" if listing.source == "webdataset" else "files"
    return (
        f"holds {files} of a training and of a test set, {train} and {test}; set "
        f"data.path={os.path.join(folder, train)}, or data.source={listing.source} to use all "
        f"{files}"
    )


def _gather(listing: Listing, recall: Callable[[int], Part], new_buffer: NewBuffer) -> Index:
    """Put the parts together and log what was found."""
    (root, source, *_), files, shards, passed = listing
    if shards:
        findings = gather_shards(root, shards, recall, new_buffer, passed, source == "auto")
    else:
        pieces = make_pieces(files, shards)
        findings = gather_folder(Path(root), files, pieces, recall, new_buffer)
        findings = findings._replace(passed_over=sort_counts([passed]))
    images = format_count(len(findings.entries), "image")
    logger.info("%s: %s, %s", root, images, format_count(len(findings.labels), "label"))
    turned, as_stored = count_turned(findings.entries["flags"])
    if turned or as_stored:
        text = "%s: images turned by their EXIF orientation: %d; not turned by it: %d"
        logger.info(text, root, turned, as_stored)
    equal = find_equal_labels(findings.labels)
    if equal is not None:
        text = (
            "%s: the labels %s and %s are the same number and count as two classes; write one form"
        )
        logger.warning(text, root, *equal)
    index = Index(root, listing.source, *findings, shards=tuple(shard.path for shard in shards))
    _log_passed(index, logging.WARNING if lost_images(index.passed_over) else logging.INFO)
    return index


def _log_passed(index: Index, level: int) -> None:
    """Log what is passed over, in one line."""
    if index.passed_over:
        text = format_passed(index.passed_over, UNITS[index.source])
        logger.log(level, "%s: %s", index.root, text)


def _log_excluded(index: Index, folder: Path) -> None:
    """Log how many images are excluded, and where they are listed."""
    if index.excluded:
        number = format_count(len(index.excluded), UNITS[index.source])
        text = "%s: %s excluded or damaged; %s lists them with reasons"
        logger.info(text, index.root, number, folder / index_file.INDEX_JSON)
