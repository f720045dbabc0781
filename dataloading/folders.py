"""A folder of images: which files there are, and what their headers say."""

import hashlib
import logging
import os
import re
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dataloading.entries import (
    ENTRY,
    EXTENSIONS,
    Examined,
    File,
    Findings,
    encode_name,
    examine,
    map_in_threads,
    turns_bytes,
)
from dataloading.errors import DataError
from dataloading.headers import header_of_file
from dataloading.parts import Parts
from dataloading.passed_over import (
    Counts,
    count_files,
    count_passed,
    extension_of,
    format_passed,
    is_archive,
    lost_images,
    sort_counts,
)
from dataloading.patience import LASTING, PATIENCE_S, Patience

logger = logging.getLogger(__name__)

_CHUNK = 512


def list_folder(root: Path) -> tuple[list[File], Counts]:
    """List the image files under a folder, by name.

    Returns:
        The files, and the counts of what is passed over.

    Raises:
        DataError: if it is missing, cannot be listed, holds no image files, or if more than half of
            its files are passed over.
        ReadError: if storage fails for longer than reads are retried.
    """
    if not root.is_dir():
        found = "is not a folder" if root.exists() else "does not exist"
        raise DataError(
            f"{root}: {found}{explain_path(root)}; set data.path to a folder of images, "
            "sub-folders are labels, or to WebDataset .tar files"
        )
    passed: Counts = {}

    def listed() -> list[File]:
        passed.clear()
        try:
            return sorted(walk(root, passed=passed), key=lambda file: file.name)
        except OSError as error:
            if error.errno not in LASTING:
                raise
            raise DataError(
                f"{error.filename}: cannot be listed ({error.strerror}); "
                "make the whole of data.path readable"
            ) from error

    files = Patience(PATIENCE_S).retry(listed, str(root))
    counts = sort_counts([passed])
    others = f"; {format_passed(counts)}" if counts else ""
    if all(file.fault is not None for file in files):
        first = f" (but {files[0].name}: {files[0].fault})" if files else ""
        raise DataError(
            f"{root}: no image files (.jpg, .png, .webp ...) found{first}{others}; "
            "set data.path to a folder of images, sub-folders are labels"
        )
    lost = lost_images(item for item in counts if item.extension != ".tar")  # data.source=folder
    if lost > len(files):
        raise DataError(
            f"{root}: more than half of the files, {lost} of {lost + len(files)}, are not taken as "
            f"images{others}; correct them, or set data.path to a folder of images only"
        )
    return files, passed


def explain_path(path: Path) -> str:
    """Return why a path that is no folder and no tar was written in vain; empty if unknown."""
    text = str(path)
    if path.exists():
        if extension_of(path.name) in EXTENSIONS:
            return " but an image: put it, or a link to it, into a folder"
        is_packed = is_archive(extension_of(path.name))
        return " but an archive, which is not unpacked: unpack it first" if is_packed else ""
    if re.match(r"[A-Za-z][\w+.-]+:(/|\S+ )", text):
        return " (an address or a command is not read: copy or mount the data as files)"
    if text.startswith("~"):
        return " (~ is not expanded here: write the home folder out)"
    if re.search(r"(,|;|::|\.tar\s)(?![^{]*\})", text):
        return (
            " (is it a list? data.path is one path: a pattern such as /data/{a,b}-*.tar, or a "
            "folder with links to all)"
        )
    return ""


def walk(
    folder: Path,
    prefix: str = "",
    above: frozenset[tuple[int, int]] = frozenset(),
    passed: Counts | None = None,
) -> Iterator[File]:
    """Yield the image files under a folder; hidden files are skipped.

    Links are followed wherever they lead, since many copies of a data set are made of links into
    one store; but not back to a folder above, and a link to nothing is yielded with its fault.

    Args:
        folder: the folder.
        prefix: put before every name.
        above: device and inode of the folders above.
        passed: takes the counts of the other files.

    Raises:
        OSError: if a folder cannot be listed.
    """
    facts = folder.stat()
    above |= {(facts.st_dev, facts.st_ino)}
    images: list[str] = []
    others: list[str] = []
    item = None
    with os.scandir(folder) as items:
        for item in items:
            name, ending = prefix + item.name, os.path.splitext(item.name)[1].lower()
            is_image = ending in EXTENSIONS
            if item.name.startswith(".") or (not is_image and item.is_file(follow_symlinks=False)):
                others.append(item.name)
                continue
            try:
                status = os.stat(item.path)
            except OSError as error:
                if error.errno not in LASTING:
                    raise
                if is_image or not ending:  # the latter may have been a folder of a whole class
                    yield File(name, -1, 0, f"cannot be read: {error.strerror}")
                else:
                    others.append(item.name)
                continue
            if stat.S_ISDIR(status.st_mode):
                if (status.st_dev, status.st_ino) in above:
                    yield File(name, -1, 0, "a link to a folder above it")
                    continue
                if is_image:
                    yield File(name, -1, 0, "a folder; the files in it are listed")
                yield from walk(Path(item.path), f"{name}/", above, passed)
            elif is_image and stat.S_ISREG(status.st_mode):
                images.append(item.name)
                yield File(name, status.st_size, status.st_mtime_ns)
            elif is_image:
                yield File(name, -1, 0, "not a regular file")
            else:
                others.append(item.name)
    if passed is not None and item is None and prefix:
        count_passed(passed, "empty", "", prefix)
    if passed is not None and others:
        count_files(passed, prefix, others, images)


def examine_folder(
    root: Path,
    files: Sequence[File],
    max_pixels: int,
    exif_orientation: bool = True,
    parts: Parts | None = None,
) -> Findings:
    """Read the headers of listed files; images with more than ``max_pixels`` are excluded.

    ``parts`` keeps what is known of the files.

    Returns:
        Rows in the order of ``files``; labels are the folders directly under the root.

    Raises:
        DataError: if no file is usable.
        ReadError: if storage fails for longer than reads are retried.
    """
    patience = Patience(PATIENCE_S)
    chunks = [files[at : at + _CHUNK] for at in range(0, len(files), _CHUNK)]

    def work(chunk: Sequence[File]) -> list[Examined]:
        known = parts.recall(chunk) if parts else None
        if known is not None:
            return [Examined(*one) for one in known]
        found = [_examine(root, file, max_pixels, exif_orientation, patience) for file in chunk]
        if parts:
            parts.keep(chunk, found)
        return found

    parted = map_in_threads(work, chunks, [*map(len, chunks)], "files")
    examined = [result for results in parted for result in results]
    excluded = tuple(
        (file.name, result.fault)
        for file, result in zip(files, examined, strict=True)
        if result.fault is not None
    )
    usable = [(f, r) for f, r in zip(files, examined, strict=True) if r.fault is None]
    if excluded:
        name, reason = excluded[0]
        text = "%s: %d of %d files are excluded; first: %s (%s)"
        logger.warning(text, root, len(excluded), len(files), name, reason)
        if not usable:
            raise DataError(
                f"{root}: none of {len(files)} image files is usable; first: {name} ({reason}); "
                "replace them, raise data.max_pixels or set data.path to another folder"
            )
    names = [file.name for file, _ in usable]
    labels = tuple(sorted({name.partition("/")[0] for name in names if "/" in name}))
    number = {label: i for i, label in enumerate(labels)}
    entries = np.zeros(len(usable), dtype=ENTRY)
    entries["size"] = [file.size for file, _ in usable]
    entries["width"] = [result.width for _, result in usable]
    entries["height"] = [result.height for _, result in usable]
    entries["flags"] = [result.flags for _, result in usable]
    entries["label"] = [number[n.partition("/")[0]] if "/" in n else -1 for n in names]
    return Findings(entries, names, labels, excluded, folder_digest(names, entries))


def folder_digest(names: Sequence[str], entries: NDArray[np.void]) -> str:
    """Hash keys, sizes (bytes, width, height) and turns of all rows, sha256, hexadecimal."""
    total = hashlib.sha256(b"dataloading index 1\n")
    columns = (entries[column].tolist() for column in ("size", "width", "height"))
    for name, size, width, height in zip(names, *columns, strict=True):
        total.update(encode_name(name) + b"\0%d %d %d\n" % (size, width, height))
    total.update(turns_bytes(entries))
    return total.hexdigest()


def _examine(
    root: Path, file: File, max_pixels: int, exif_orientation: bool, patience: Patience
) -> Examined:
    if file.fault is not None:
        return Examined(0, 0, file.fault)
    path = root / file.name

    def examined() -> Examined:
        try:
            return examine(file.size, lambda: header_of_file(path), max_pixels, exif_orientation)
        except OSError as error:
            if error.errno not in LASTING:
                raise
            return Examined(0, 0, f"cannot be read: {error.strerror}")

    return patience.retry(examined, str(path))
