"""Which files are the shards of a data set: tars or Parquet files, local or in a store."""

import functools
import itertools
import logging
import os
import re
import stat
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

from dataloading.addresses import split_address
from dataloading.entries import File
from dataloading.errors import DataError
from dataloading.files import Readable, open_regular
from dataloading.folders import explain_path, walk
from dataloading.passed_over import (
    Counts,
    count_files,
    count_passed,
    extension_of,
    format_passed,
    is_archive,
    sort_counts,
)
from dataloading.patience import LASTING, PATIENCE_S, Patience, retry_listing
from dataloading.shard_names import is_parquet
from dataloading.shard_patterns import expand_braces, expand_wildcards, is_glob
from dataloading.stores import (
    HeaderReader,
    RemoteTar,
    TarPlace,
    explain_remedy,
    find_tars,
    has_magic,
    list_tars,
    require_address,
)

logger = logging.getLogger(__name__)

PUBLISHED = "image-index-"
"""Prefix of the names of indexes that are published beside tars; see ``published``."""

_TAR_FILE = re.compile(r"\.(tar|tgz|tbz2?|txz|tar\.\w+)$", re.IGNORECASE)
_BESIDE_IMAGES = "metadata.parquet"  # of an image folder of Hugging Face datasets

ShardSource = Literal["webdataset", "parquet"]
ENDINGS: dict[ShardSource, str] = {"webdataset": ".tar", "parquet": ".parquet"}


class Shard(NamedTuple):
    """A tar or Parquet file: its place, and its facts under a name that copies share."""

    path: TarPlace
    file: File


def detect_source(path: Path) -> ShardSource | None:
    """Return the kind of shards of a path (file, pattern or folder); ``None``: no shards.

    Raises:
        DataError: if a folder holds both, or images beside them, or cannot be listed.
        ReadError: if storage fails for longer than reads are retried.
    """
    if not os.path.isdir(path):
        if is_parquet(path.name):
            return "parquet"
        if _TAR_FILE.search(path.name) is not None:
            return "webdataset"
        if not is_glob(path):
            return None
    found: dict[ShardSource, str] = {}

    def find_kinds() -> File | None:
        for source, ending in ENDINGS.items():
            files = _files_in(path, ending) if os.path.isdir(path) else _match(path, ending)
            if files:
                found[source] = f"{ending} files ({files[0].name} ...)"
        if not found or not os.path.isdir(path):
            return None
        return next((file for file in walk(path) if file.fault is None), None)

    image = retry_listing(find_kinds, str(path))
    if not os.path.isdir(path):
        return "parquet" if list(found) == ["parquet"] else "webdataset"
    sources: list[str] = [*found]
    if image is not None:
        sources.append("folder")
    if len(sources) > 1:
        images = [f"images ({image.name} ...)"] if image is not None else []
        raise DataError(
            f"{path}: holds both {' and '.join([*found.values(), *images])}; "
            f"set data.source to {' or '.join(sources)}"
        )
    return next(iter(found), None)


def is_listed(path: Path | str) -> bool:
    """Return whether all files of a path are found by listing, and none is named."""
    is_pattern = is_glob(path) if isinstance(path, Path) else _is_remote_list(path)
    return (is_pattern and "{" not in str(path)) or (isinstance(path, Path) and os.path.isdir(path))


def list_shards(
    path: Path | str, passed: Counts | None = None, source: ShardSource = "webdataset"
) -> list[Shard]:
    """List the tars, or the Parquet files, of a data set.

    Args:
        path: folder (its .tar files by name), one tar, or a pattern with ``{000..146}`` or
            ``{a,b}`` (in the order written; of several braces the last varies fastest), with ``*``,
            ``?`` or ``[...]`` (by name), or with both; or such an address in a store.
        passed: takes the counts of other files in the folder or of the pattern.
        source: "parquet" lists .parquet files, which are not read from stores.

    Returns:
        The shards in order. Names are relative to the folder that all have in common.

    Raises:
        DataError: if there is no shard, a shard is named twice or missing, or there are more
            archives of other kinds than tars.
        ReadError: if storage fails for longer than reads are retried.
    """
    if isinstance(path, str):
        return list_remote_shards(path, passed)
    counts: Counts = {}
    ending = ENDINGS[source]

    def listed() -> list[Path]:
        counts.clear()
        if os.path.isdir(path):
            return _files_in(path, ending, counts)
        if os.path.exists(path):
            return [path]
        texts = expand_braces(path) if "{" in str(path) else [str(path)]
        return [tar for text in texts for tar in _match(Path(text), ending, counts)]

    tars = retry_listing(listed, str(path))
    _require_files(path, len(tars), counts, f"{explain_path(path)}{_near(path, ending)}", ending)
    odd = next((tar for tar in tars if is_parquet(tar.name) != (source == "parquet")), None)
    if odd is not None:
        raise DataError(
            f"{odd}: data.source={source} reads {ending} files; "
            + ("rename it" if source == "parquet" else "set data.source=parquet")
        )
    if passed is not None:
        passed.update(counts)
    parents = [os.path.dirname(os.path.abspath(tar)) for tar in tars]
    common = os.path.commonpath(parents)
    patience = Patience(PATIENCE_S)
    shards: list[Shard] = []

    def look_up(tar: Path) -> os.stat_result:
        try:
            return tar.stat()
        except OSError as error:
            if error.errno not in LASTING:
                raise
            raise _unreadable(tar, error, explain_path(path)) from error

    for tar in tars:
        facts = patience.retry(functools.partial(look_up, tar), str(tar))
        if not stat.S_ISREG(facts.st_mode):
            raise DataError(f"{tar}: is not a regular file; set data.path to {ending} files")
        name = Path(os.path.relpath(os.path.abspath(tar), common)).as_posix()
        shards.append(Shard(tar, File(name, facts.st_size, facts.st_mtime_ns)))
    return _require_distinct(path, shards)


def list_remote_shards(url: str, passed: Counts | None) -> list[Shard]:
    """List the tars of a data set in a store, as ``list_shards``; folders never end with ``.tar``.

    Raises:
        DataError: as ``list_shards``, or for an address or a store that cannot be used as it is.
        ReadError: if the store fails for longer than reads are retried.
    """
    require_address(url)
    texts = list(expand_braces(url)) if "{" in url else [url]
    counts: Counts = {}

    def listed() -> list[RemoteTar]:
        counts.clear()
        tars: list[RemoteTar] = []
        for is_list, some in itertools.groupby(texts, key=_is_remote_list):
            if not is_list:
                tars += find_tars(list(some))
                continue
            for text in some:
                found, others = list_tars(text)
                tars += found
                others = [key for key in others if not key.rpartition("/")[2].startswith(PUBLISHED)]
                count_files(counts, "", others, [])
        return tars

    def refused() -> list[RemoteTar]:
        try:
            return listed()
        except OSError as error:
            if error.errno not in LASTING:
                raise
            name = error.filename
            raise DataError(f"{name}: {error.strerror}; {explain_remedy(name, error)}") from error

    tars = Patience(PATIENCE_S).retry(refused, url)
    _require_files(url, len(tars), counts, "", ".tar")
    if passed is not None:
        passed.update(counts)
    unversioned = [tar.url for tar in tars if not tar.version]
    if unversioned:
        text = "%s: the server gives neither ETag nor Last-Modified (%d of %d tars); a tar that is "
        text += "replaced by another of equal size is not noticed"
        logger.warning(text, unversioned[0], len(unversioned), len(tars))
    common = os.path.commonpath([os.path.dirname(_key_path(tar.url)) for tar in tars])
    return _require_distinct(
        url,
        [
            Shard(
                tar,
                File(os.path.relpath(_key_path(tar.url), common), tar.size, tar.version_number()),
            )
            for tar in tars
        ],
    )


@contextmanager
def open_shard(path: TarPlace) -> Generator[tuple[int | Readable, int], None, None]:
    """Open a tar for reading its headers; yields it for ``read_at``, and its size.

    Raises:
        DataError: if it does not exist or may not be read.
        OSError: if storage fails.
    """
    try:
        if isinstance(path, RemoteTar):
            yield HeaderReader(path), path.size
            return
        descriptor = open_regular(path)
    except OSError as error:
        if error.errno not in LASTING:
            raise
        raise _unreadable(path, error) from error
    try:
        yield descriptor, os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)


def _files_in(folder: Path, ending: str, passed: Counts | None = None) -> list[Path]:
    names: list[str] = []
    others: list[str] = []
    with os.scandir(folder) as items:
        for item in items:
            is_hidden, is_shard = item.name.startswith("."), _is_shard(item.name, ending)
            if is_shard and not is_hidden and not _is_folder(item):
                names.append(item.name)
            elif passed is not None and not is_hidden and _is_folder(item):
                _count_folder(passed, Path(item.path), f"{item.name}/")
            elif is_hidden or not (item.name.startswith(PUBLISHED) or _is_folder(item)):
                others.append(item.name)
    if passed is not None:
        count_files(passed, "", others, [])
    return [folder / name for name in sorted(names)]


def _count_folder(passed: Counts, folder: Path, prefix: str) -> None:
    """Count the files of a folder beside shards, which is not read."""
    for file in walk(folder, prefix, passed=passed):
        count_passed(passed, "beside", extension_of(file.name), file.name)


def _is_folder(item: os.DirEntry[str]) -> bool:
    try:
        return item.is_dir()
    except OSError as error:
        if error.errno not in LASTING:
            raise
        return False  # a link to itself


def _is_shard(name: str, ending: str) -> bool:
    return name.lower().endswith(ending) and name.lower() != _BESIDE_IMAGES


def _match(path: Path, ending: str, passed: Counts | None = None) -> list[Path]:
    """Return the files that a pattern with ``*`` matches, by name; any other path as it is."""
    if not is_glob(path):
        return [path]
    tars: list[Path] = []
    for found in expand_wildcards(path):
        is_folder = os.path.isdir(found)
        if not is_folder and _is_shard(found.name, ending):
            tars.append(found)
        elif passed is None or (is_folder and "**" in path.parts):  # it matches their files too
            continue
        elif is_folder:
            _count_folder(passed, found, f"{found}/")
        else:
            extension = extension_of(str(found))
            kind = "file" if is_archive(extension) else "beside"
            count_passed(passed, kind, extension, str(found))
    return tars


def _near(path: Path, ending: str) -> str:
    """Return which files are in the folder of a pattern that matches none."""
    try:
        tars = _files_in(path.parent, ending) if is_glob(path) else []
    except OSError:
        return ""
    return f" ({path.parent} holds {len(tars)}: {tars[0].name} ...)" if tars else ""


def _is_remote_list(text: str) -> bool:
    """Return whether an address is that of a folder or of a pattern, and not of one tar."""
    return has_magic(text) or _TAR_FILE.search(text) is None


def _key_path(url: str) -> str:
    """Return the place of a tar behind scheme and host, as the path of a file."""
    root, key = split_address(url)
    return f"/{root.partition('://')[2]}/{key}"


def _require_files(
    path: Path | str, found: int, counts: Counts, explained: str, ending: str
) -> None:
    archives = sum(item.number for item in counts.values() if is_archive(item.extension))
    if found and archives <= found:
        return
    problem = f"no {ending} files found"
    if found:
        whole = found + archives
        problem = f"only {found} of {whole} archives are {ending} files named or held directly"
    others = f"; {format_passed(sort_counts([counts]))}" if counts else ""
    raise DataError(
        f"{path}: {problem}{explained}{others}; set data.path to a folder that holds them "
        f"directly, to one of them, or to a pattern such as train-{{000..146}}{ending} or "
        f"train-*{ending}"
    )


def _require_distinct(path: Path | str, shards: list[Shard]) -> list[Shard]:
    seen: set[str] = set()
    for shard in shards:
        if shard.file.name in seen:
            raise DataError(f"{path}: names {shard.file.name} twice; name each file once")
        seen.add(shard.file.name)
    return shards


def _unreadable(path: TarPlace, error: OSError, explained: str = "") -> DataError:
    if isinstance(path, RemoteTar):
        return DataError(f"{path}: {error.strerror}; {explain_remedy(path.url, error)}")
    kind, ending = ("file", ".parquet") if is_parquet(path.name) else ("tar", ".tar")
    return DataError(
        f"{path}: this {kind} cannot be read ({error.strerror}){explained}; "
        f"make it readable or correct data.path (a folder of {ending} files, one, or a pattern "
        f"such as train-{{000..146}}{ending} or train-*{ending})"
    )
