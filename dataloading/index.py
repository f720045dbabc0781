"""The list of samples: what there is, how large it is, and a digest that names it."""

import errno
import hashlib
import io
import json
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from dataloading.addresses import hide_secrets
from dataloading.entries import ENTRY, MAX_PIXELS, File, Findings, Passed, count_turned, encode_name
from dataloading.errors import DataError, ReadError
from dataloading.files import atomic_path
from dataloading.folders import examine_folder, list_folder
from dataloading.name_checks import find_equal_labels, find_split_folders, find_splits
from dataloading.parts import Parts
from dataloading.passed_over import Counts, format_passed, lost_images, sort_counts
from dataloading.shards import Shard, TarNames, is_listed, is_tar_path, list_shards
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
from dataloading.webdataset import examine_shards

logger = logging.getLogger(__name__)

SourceName = Literal["auto", "folder", "webdataset"]
Shards = Sequence[tuple[str, str]]
"""Name and path of every tar; none for a folder."""

_FORMAT = 3


@dataclass(frozen=True, eq=False)
class Index:
    """Usable samples of a data set; row i is sample id i.

    Attributes:
        root: the data set as the caller named it: folder, tar or pattern; the address of such.
        source: layout under it.
        entries: structured array of ``ENTRY``, one row per sample, ordered by path in a folder, by
            shard and offset in tars.
        names: name of each row. Folder: path relative to the root, with ``/``. Tars: the place,
            "byte 1536 of train-000.tar", made when asked for.
        labels: names of the labels, sorted. Folder: the folders directly under the root. Tars: the
            texts of ``.cls`` members.
        excluded: (name, reason) of files and members that look like images and cannot be used.
        digest: sha256 over keys and sizes (bytes, width, height) of all rows, and their turns if
            there are any, hexadecimal; the same for every copy of the data set.
        passed_over: counts of the files and members that are not taken as images, by extension.
        shards: the tars, in order; none for a folder.
    """

    root: Path | str
    source: Literal["folder", "webdataset"]
    entries: NDArray[np.void]
    names: Sequence[str]
    labels: tuple[str, ...]
    excluded: tuple[tuple[str, str], ...]
    digest: str
    passed_over: tuple[Passed, ...] = ()
    shards: tuple[TarPlace, ...] = ()

    def __len__(self) -> int:
        return len(self.entries)

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
        return TarSource([tar for tar in self.shards if isinstance(tar, Path)], self.entries)

    def list_shards(self) -> Shards:
        """Return name and path of every tar, for ``open_kept``."""
        if not isinstance(self.names, TarNames):
            return []
        places = map(place_to_text, self.shards)
        return list(zip(self.names.shards, places, strict=True))

    def where(self, i: int) -> tuple[TarPlace, int | None]:
        """Return the file of row ``i`` and, in a tar, the byte at which it begins."""
        row = self.entries[i]
        if self.source == "webdataset":
            return self.shards[int(row["shard"])], int(row["offset"])
        return Path(self.root, self.names[i]), None


class _Listing(NamedTuple):
    """The files of a data set before they are examined; one of the two lists is empty."""

    root: Path | str
    files: list[File]
    shards: list[Shard]
    passed: Counts
    is_detected: bool
    """Whether the layout is detected, and not named."""

    @property
    def source(self) -> Literal["folder", "webdataset"]:
        return "webdataset" if self.shards else "folder"


def build_index(
    path: str | os.PathLike[str],
    source: SourceName = "auto",
    max_pixels: int = MAX_PIXELS,
    exif_orientation: bool = True,
) -> Index:
    """List the images of a folder or of WebDataset tars; headers are read, nothing is decoded.

    Files are taken by their extension, links are followed, hidden files are skipped. Empty,
    unreadable and oversized images are excluded and reported in ``Index.excluded``, as are damaged
    parts of tars. Other files and members are counted by extension in one log line.

    Args:
        path: folder of images, the folders directly under it are labels; or tars: a folder that
            holds them directly, one of them, or a pattern such as ``train-{000..146}.tar`` or
            ``train-*.tar``; or the address of such tars, ``s3://``, ``gs://``, ``https://``.
        source: "folder", "webdataset", or "auto", which detects it, and refuses to mix folders or
            tars of a training and of a test set.
        max_pixels: images with more pixels (width x height) are excluded.
        exif_orientation: turn images upright as their EXIF orientation says; rows then have width
            and height of the upright image. The orientation is recorded in any case.

    Raises:
        DataError: if the data are missing, not what ``source`` says, or hold no usable image, or
            if more than half of the files or members are passed over.
        ReadError: if storage fails for longer than reads are retried.
        ValueError: if ``source`` is not a known layout.
    """
    return _examine(_list(as_root(path), source), max_pixels, exif_orientation)


def load_or_build(
    path: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    source: SourceName = "auto",
    max_pixels: int = MAX_PIXELS,
    exif_orientation: bool = True,
) -> Index:
    """Load the index kept in a directory, or build it there.

    It is kept as ``index.npy`` and ``index.json``, both replaced atomically, and used again while
    names, sizes and modification times of all files (images or tars), ``max_pixels`` and
    ``exif_orientation`` are as they were. The entries of a kept index are mapped, so that
    processes share their memory. Until it is complete, a folder ``parts`` keeps what is known, so
    that a build that is killed continues.

    ``directory`` is made if it does not exist; the other arguments are those of ``build_index``.

    Raises:
        DataError: as ``build_index``, or if the directory cannot be written.
        ReadError: as ``build_index``, or if the directory's store is full or fails.
        ValueError: if ``source`` is not a known layout.
    """
    folder = Path(directory)
    listing = _list(as_root(path), source)
    digest = _listing_digest(listing, max_pixels, exif_orientation)
    kept = _load(listing, folder, digest)
    parts = Parts(folder / "parts", _FORMAT, max_pixels, exif_orientation)
    if kept is not None:
        parts.remove()
        _log_passed(kept, logging.INFO)
        return kept
    index = _examine(listing, max_pixels, exif_orientation, parts)
    try:
        _save(index, folder, digest)
        parts.remove()
    except OSError as error:
        text = f"{folder}: the index cannot be written ({error.strerror})"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise ReadError(f"{text}; make room there and try again") from error
        raise DataError(f"{text}; set data.index to a folder that can") from error
    return index


def open_kept(
    path: str | os.PathLike[str], directory: str | os.PathLike[str], digest: str, shards: Shards
) -> Index:
    """Open an index that another process of this machine has just verified; nothing is hashed.

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
        facts: dict[str, Any] = json.loads((folder / "index.json").read_text(encoding="ascii"))
        entries = _map_entries(folder)
        if facts["digest"] != digest:
            raise ValueError(f"its digest is {facts['digest'][:12]}, not {digest[:12]}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder}: the index of {path} cannot be opened ({error})") from error
    names = [name for name, _ in shards]
    findings = _findings(facts, entries, TarNames(names, entries) if shards else facts["names"])
    places = tuple(place_from_text(text) for _, text in shards)
    return Index(as_root(path), facts["source"], *findings, shards=places)


def _list(root: Path | str, source: str) -> _Listing:
    if source not in get_args(SourceName):
        raise ValueError(f"source is {source!r}; expected one of {get_args(SourceName)}")
    if isinstance(root, str) and source == "folder":
        raise DataError(
            f"{hide_secrets(root)}: images are read from a store as tars only; pack them (cmtmae "
            "check-data FOLDER --pack OUT) and set data.source=auto"
        )
    if isinstance(root, str) or source == "webdataset" or (source == "auto" and is_tar_path(root)):
        passed: Counts = {}
        listing = _Listing(root, [], list_shards(root, passed), passed, source == "auto")
        problem = _mixed_tars(listing) if is_listed(root) else None
    else:
        files, passed = list_folder(root)
        listing = _Listing(root, files, [], passed, source == "auto")
        problem = _mixed_folders(listing)
    if problem is None:
        return listing
    if source == "auto":
        raise DataError(f"{root}: {problem}")
    logger.info("%s: all are used, since data.source=%s: %s", root, source, problem)
    return listing


def _mixed_folders(listing: _Listing) -> str | None:
    """Return what to do if the folders are a training and a test set and no classes."""
    names = {file.name.rpartition("/")[0] for file in listing.files}
    splits = find_split_folders({tuple(name.split("/")) if name else () for name in names})
    if splits is None:
        return None
    train, test = splits
    remedy = f"set data.path={Path(listing.root, train)}"
    if "*/" in train:
        remedy = "set data.path to a folder with links to the training images alone"
    return (
        f"holds {train}/ and {test}/, a training and a test set and no classes; {remedy}, or "
        "data.source=folder to use all images"
    )


def _mixed_tars(listing: _Listing) -> str | None:
    """Return what to do if the tars are of a training and of a test set."""
    patterns = {re.sub(r"\d+", "*", shard.file.name) for shard in listing.shards}
    splits = find_splits(patterns)
    if splits is None:
        return None
    train, test = splits
    first = listing.shards[0]
    folder = str(first.path).removesuffix(first.file.name)
    return (
        f"holds tars of a training and of a test set, {train} and {test}; set "
        f"data.path={os.path.join(folder, train)}, or data.source=webdataset to use all tars"
    )


def _examine(
    listing: _Listing, max_pixels: int, exif_orientation: bool, parts: Parts | None = None
) -> Index:
    root, files, shards, passed, is_detected = listing
    if shards:
        findings = examine_shards(
            root, shards, max_pixels, exif_orientation, passed, is_detected, parts
        )
    else:
        findings = examine_folder(Path(root), files, max_pixels, exif_orientation, parts)
        findings = findings._replace(passed_over=sort_counts([passed]))
    logger.info("%s: %d images, %d labels", root, len(findings.entries), len(findings.labels))
    turned, as_stored = count_turned(findings.entries["flags"])
    if turned or as_stored:
        text = "%s: %d images are turned by their EXIF orientation, of %d it is not applied"
        logger.info(text, root, turned, as_stored)
    equal = find_equal_labels(findings.labels)
    if equal is not None:
        text = (
            "%s: the labels %s and %s are the same number and count as two classes; write one form"
        )
        logger.warning(text, root, *equal)
    index = _make(listing, findings)
    _log_passed(index, logging.WARNING if lost_images(index.passed_over) else logging.INFO)
    return index


def _log_passed(index: Index, level: int) -> None:
    """Log what is passed over, in one line."""
    if index.passed_over:
        what = "member" if index.source == "webdataset" else "file"
        logger.log(level, "%s: %s", index.root, format_passed(index.passed_over, what))


def _make(listing: _Listing, findings: Findings) -> Index:
    paths = tuple(shard.path for shard in listing.shards)
    return Index(listing.root, listing.source, *findings, shards=paths)


def _listing_digest(listing: _Listing, max_pixels: int, exif_orientation: bool) -> str:
    total = hashlib.sha256(b"listing %d %d %d\n" % (_FORMAT, max_pixels, exif_orientation))
    for file in listing.files or [shard.file for shard in listing.shards]:
        total.update(encode_name(file.name) + b"\0%d %d\n" % (file.size, file.mtime_ns))
    return total.hexdigest()


def _load(listing: _Listing, folder: Path, digest: str) -> Index | None:
    """Return the kept index, or ``None`` if there is none, it is damaged or no longer true."""
    try:
        facts: dict[str, Any] = json.loads((folder / "index.json").read_text(encoding="ascii"))
        if facts["listing"] != digest:
            logger.info("%s: the files have changed, the index is built again", listing.root)
            return None
        with (folder / "index.npy").open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != facts["npy_sha256"]:
                raise ValueError("index.npy does not belong to index.json")
        entries = _map_entries(folder)
        shards = [shard.file.name for shard in listing.shards]
        findings = _findings(
            facts, entries, TarNames(shards, entries) if shards else facts["names"]
        )
        if not shards:
            findings = findings._replace(passed_over=sort_counts([listing.passed]))
        return _make(listing, findings)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s: the index cannot be used (%s) and is built again", folder, error)
        return None


def _map_entries(folder: Path) -> NDArray[np.void]:
    path = folder / "index.npy"
    entries: NDArray[np.void] = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    if entries.dtype != ENTRY:
        raise ValueError("index.npy has other columns")
    return entries


def _findings(facts: dict[str, Any], entries: NDArray[np.void], names: Sequence[str]) -> Findings:
    return Findings(
        entries=entries,
        names=names,
        labels=tuple(facts["labels"]),
        excluded=tuple((name, reason) for name, reason in facts["excluded"]),
        digest=facts["digest"],
        passed_over=tuple(Passed(*item) for item in facts["passed_over"]),
    )


def _save(index: Index, folder: Path, listing: str) -> None:
    buffer = io.BytesIO()
    np.save(buffer, index.entries, allow_pickle=False)
    facts: dict[str, Any] = {
        "format": _FORMAT,
        "source": index.source,
        "digest": index.digest,
        "listing": listing,
        "npy_sha256": hashlib.sha256(buffer.getvalue()).hexdigest(),
        "labels": index.labels,
        "excluded": index.excluded,
        "passed_over": index.passed_over,
        "names": [] if index.source == "webdataset" else index.names,  # made from the entries
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in (
        ("index.npy", buffer.getvalue()),
        ("index.json", json.dumps(facts, indent=0).encode("ascii")),
    ):
        with atomic_path(folder / name) as draft:
            draft.write_bytes(data)
