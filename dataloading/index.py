"""The index of a data set: its samples, their sizes, and a digest that identifies them."""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dataloading.columns import NewBuffer, new_memory
from dataloading.data_set import Listing, Request, SourceName, list_data
from dataloading.entries import MAX_PIXELS, Passed, concerns_label, count_turned
from dataloading.folders import gather_folder
from dataloading.index_build import build_parts, make_pieces
from dataloading.name_checks import find_equal_labels
from dataloading.parquet import ParquetSource
from dataloading.parts import Part, Parts
from dataloading.passed_over import format_count, format_passed, lost_images, sort_counts
from dataloading.shard_names import TarNames
from dataloading.sources import FolderSource, Source, TarSource
from dataloading.store_cache import StoreCache
from dataloading.store_source import StoreSource
from dataloading.stores import RemoteTar, TarPlace, as_root, place_to_text
from dataloading.webdataset import gather_shards

logger = logging.getLogger(__name__)

Shards = Sequence[tuple[str, str]]
"""Name and path of every shard; empty for a folder."""

UNITS = {"folder": "file", "webdataset": "member", "parquet": "row"}
"""Unit in which an index counts what it passes over, by ``Index.source``."""


@dataclass(frozen=True, eq=False)
class Index:
    """Usable samples of a data set; row i is sample id i.

    Its shards are tars or Parquet files.

    Attributes:
        root: the data set as the caller named it: folder, shard, pattern or address.
        source: layout under it.
        entries: structured array of ``ENTRY``, one row per sample, ordered by path in a folder, by
            shard and offset in shards; in a Parquet file the offset is the row.
        names: name of each row, created on access. Folder: path relative to the root, with
            ``/``. Shards: the place, "byte 1536 of train-000.tar", "row 15 of train-000.parquet".
        labels: names of the labels, sorted. Folder: the folders directly under the root. Tars: the
            texts of ``.cls`` members. Parquet: the values of a column, or the names of a
            ClassLabel, in its order.
        excluded: (name, reason) of files and members that look like images and cannot be used, and
            of labels that cannot, whose images are used.
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
        """Return the hexadecimal sha256 of label names and rows' labels, which ``digest`` lacks."""
        total = hashlib.sha256(json.dumps(self.labels).encode("ascii"))
        total.update(self.entries["label"].tobytes())
        return total.hexdigest()

    def unused_images(self) -> list[tuple[str, str]]:
        """Return those of ``excluded`` that are not samples: images, and damaged parts of tars."""
        return [(name, why) for name, why in self.excluded if not concerns_label(why)]

    def label_faults(self) -> list[tuple[str, str]]:
        """Return those of ``excluded`` that are labels."""
        return [(name, why) for name, why in self.excluded if concerns_label(why)]

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


def build_index(
    path: str | os.PathLike[str],
    source: SourceName = "auto",
    max_pixels: int = MAX_PIXELS,
    exif_orientation: bool = True,
) -> Index:
    """List the images of a folder, WebDataset tars or Parquet files; no image is decoded.

    Files are taken by their extension, links are followed, hidden files are skipped. Empty,
    unreadable and oversized images are excluded and reported in ``Index.excluded``, as are damaged
    parts of tars. Other files and members are counted by extension in one log line. Only headers
    are read, but Parquet files are read whole: pyarrow cannot read a part of an image.

    Args:
        path: folder of images, the folders directly under it are labels; or tars: a folder that
            holds them directly, one of them, or a pattern such as ``train-{000..146}.tar`` or
            ``train-*.tar``; or the address of such tars, ``s3://``, ``gs://``, ``https://``; or
            Parquet files, in the same ways but without an address.
        source: "folder", "webdataset", "parquet", or "auto", which detects it, and refuses to mix
            folders or shards of a training and of a test set.
        max_pixels: images with more pixels (width x height) are excluded.
        exif_orientation: turn images upright by their EXIF orientation; rows then have width
            and height of the upright image. The orientation is recorded in any case.

    Raises:
        DataError: if the data are missing, not of the layout ``source``, or hold no usable image,
            or if more than half of the files or members are passed over.
        ReadError: if storage fails for longer than reads are retried.
        ValueError: if ``source`` is not a known layout.
    """
    return build_listed(list_data(Request(as_root(path), source, max_pixels, exif_orientation)))


def build_listed(listing: Listing) -> Index:
    """Build the index of a listing in memory.

    Raises:
        DataError, ReadError: as ``build_index``.
    """
    _, recall = examine(listing, None)
    return gather(listing, recall, new_memory)


def examine(listing: Listing, folder: Path | None) -> tuple[Parts, Callable[[int], Part]]:
    """Read the headers of all files, except of pieces whose part is in the folder of parts.

    Returns:
        The parts, and a function from the number of a piece to its part.

    Raises:
        DataError, ReadError: as ``build_index``.
    """
    request = listing.request
    pieces = make_pieces(listing.files, listing.shards)
    parts = Parts(folder, listing.files, pieces, *request[2:])
    return parts, build_parts(request.path, listing.shards, parts, *request[2:])


def gather(listing: Listing, recall: Callable[[int], Part], new_buffer: NewBuffer) -> Index:
    """Combine the parts and log what was found."""
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
    log_passed(index, logging.WARNING if lost_images(index.passed_over) else logging.INFO)
    return index


def log_passed(index: Index, level: int) -> None:
    """Log what is passed over, in one line."""
    if index.passed_over:
        text = format_passed(index.passed_over, UNITS[index.source])
        logger.log(level, "%s: %s", index.root, text)
