"""What an index is built from: the requested data set, and the files that are found."""

import hashlib
import logging
import os
import re
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from dataloading import index_file
from dataloading.addresses import hide_secrets
from dataloading.columns import folders_of
from dataloading.entries import MAX_PIXELS
from dataloading.errors import DataError
from dataloading.folders import list_folder
from dataloading.listing import Files, collect_files
from dataloading.name_checks import find_split_folders, find_splits
from dataloading.parquet import require_pyarrow
from dataloading.passed_over import Counts
from dataloading.shard_names import is_parquet
from dataloading.shard_patterns import require_reachable
from dataloading.shards import Shard, ShardSource, detect_source, is_listed, list_shards

logger = logging.getLogger(__name__)

SourceName = Literal["auto", "folder", "webdataset", "parquet"]

MANY_FILES = 2_000_000
"""Files of a folder above which tars are recommended."""


class Request(NamedTuple):
    """What an index is built from; the arguments of ``build_index``."""

    path: Path | str
    source: str = "auto"
    max_pixels: int = MAX_PIXELS
    exif_orientation: bool = True


class Listing(NamedTuple):
    """The files of a data set before they are examined.

    Attributes:
        request: data set and settings.
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
        """Hash settings, names and sizes, and times if requested, hexadecimal."""
        settings = (index_file.FORMAT, *self.request[2:], self.source, with_times)
        total = hashlib.sha256(repr(settings).encode("ascii"))
        total.update(self.files.digest_of(0, len(self.files), with_times))
        return total.hexdigest()


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
    shard_source = shard_source_of(request)
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


def shard_source_of(request: Request) -> ShardSource | None:
    """Return the kind of shards to read; ``None``: the files of a folder.

    Raises:
        DataError, ReadError: if the path cannot be looked up, or holds several kinds.
    """
    root, source = request.path, request.source
    if isinstance(root, Path):
        require_reachable(root)
    if source == "webdataset" or source == "parquet":
        return source
    if isinstance(root, str):
        return "webdataset"
    return detect_source(root) if source == "auto" else None


def warn_of_many_files(listing: Listing) -> None:
    """Recommend tars for a folder of millions of files."""
    if not listing.shards and len(listing.files) > MANY_FILES:
        text = "%s: %d files, which every launch lists; pack them into tars (cmtmae check-data %s "
        text += "--pack OUT), or set data.verify_index=never"
        logger.warning(text, listing.request.path, len(listing.files), listing.request.path)


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
