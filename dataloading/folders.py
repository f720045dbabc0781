"""A folder of images: its files and their headers."""

import hashlib
import logging
import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataloading.columns import NewBuffer, new_columns
from dataloading.entries import (
    ENTRY,
    EXTENSIONS,
    UNREADABLE,
    Examined,
    File,
    Findings,
    depends_on_machine,
    encode_name,
    examine,
    turns_bytes,
)
from dataloading.errors import DataError
from dataloading.headers import HeaderError, header_of_file
from dataloading.listing import Files, collect_files
from dataloading.parts import Part
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
from dataloading.patience import LASTING, Patience, retry_listing

logger = logging.getLogger(__name__)

FOLDER_PIECE = 4096
"""Files whose headers are read in one piece of work."""

_DIGEST_BEGINS = b"dataloading index 1\n"


def list_folder(root: Path) -> tuple[Files, Counts]:
    """List the image files under a folder, by name.

    Returns:
        The files, and the counts of what is passed over.

    Raises:
        DataError: if it is missing, cannot be listed, holds no image files, or if more than half of
            its files are passed over.
        ReadError: if storage fails for longer than reads are retried.
    """
    if not os.path.isdir(root):
        found = "is not a folder" if os.path.exists(root) else "does not exist"
        raise DataError(
            f"{root}: {found}{explain_path(root)}; set data.path to a folder of images, "
            "sub-folders are labels, or to WebDataset .tar files"
        )
    passed: Counts = {}

    def listed() -> Files:
        passed.clear()
        return collect_files(walk(root, passed=passed))

    files = retry_listing(listed, str(root))
    counts = sort_counts([passed])
    others = f"; {format_passed(counts)}" if counts else ""
    if len(files.faults) == len(files):
        first = f" (but {files.names[0]}: {files.faults[0]})" if len(files) else ""
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
    """Return why a path is neither a folder nor a tar; empty if unknown."""
    text = str(path)
    if os.path.exists(path):
        if extension_of(path.name) in EXTENSIONS:
            return " but an image: put it, or a link to it, into a folder"
        is_packed = is_archive(extension_of(path.name))
        return " but an archive, which is not unpacked: unpack it first" if is_packed else ""
    if re.match(r"[A-Za-z][\w+.-]+:(/|\S+ )", text):
        return " (an address or a command is not read: copy or mount the data as files)"
    if text.startswith("~"):
        return " (~ is not expanded: write the full path)"
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
    """Yield the image files under a folder, by name; hidden files are skipped.

    Links are followed, also out of the folder, since many copies of a data set consist of links
    into one store. A link to a folder above and a dangling link are yielded with their fault.

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
    images: list[File] = []
    others: list[str] = []
    folders: list[str] = []
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
                    images.append(File(name, -1, 0, f"{UNREADABLE}{error.strerror}"))
                else:
                    others.append(item.name)
                continue
            if stat.S_ISDIR(status.st_mode):
                if (status.st_dev, status.st_ino) in above:
                    images.append(File(name, -1, 0, "a link to a folder above it"))
                    continue
                if is_image:
                    images.append(File(name, -1, 0, "a folder; the files in it are listed"))
                folders.append(f"{name}/")
            elif is_image and stat.S_ISREG(status.st_mode):
                images.append(File(name, status.st_size, status.st_mtime_ns))
            elif is_image:
                images.append(File(name, -1, 0, "not a regular file"))
            else:
                others.append(item.name)
    if passed is not None and item is None and prefix:
        count_passed(passed, "empty", "", prefix)
    if passed is not None and others:
        beside = [file.name[len(prefix) :] for file in images if file.fault is None]
        count_files(passed, prefix, others, beside)
    del others
    # A folder sorts by its name with a slash, so that all files together are in order.
    images.sort(key=lambda file: file.name, reverse=True)
    for name in sorted(folders):
        while images and images[-1].name < name:
            yield images.pop()
        yield from walk(folder / name[len(prefix) : -1], name, above, passed)
    while images:
        yield images.pop()


def examine_files(
    root: Path,
    files: Files,
    rows: range,
    max_pixels: int,
    exif_orientation: bool,
    patience: Patience,
) -> Part:
    """Read the headers of some listed files; images with more than ``max_pixels`` are excluded.

    Raises:
        ReadError: if storage fails for longer than reads are retried.
    """
    found: list[tuple[int, int, int, int]] = []
    excluded: list[tuple[int, str]] = []
    is_final = True  # what the listing excludes is in its digest
    names = files.names.encoded(rows.start, rows.stop)
    sizes = files.sizes[rows.start : rows.stop].tolist()
    for place, (encoded, size) in enumerate(zip(names, sizes, strict=True)):
        fault = files.faults.get(rows[place]) if size < 0 else None
        file = File(encoded.decode("utf-8", "surrogateescape"), size, 0, fault)
        result = _examine(root, file, max_pixels, exif_orientation, patience)
        if result.fault is None:
            found.append((size, result.width, result.height, result.flags))
        else:
            excluded.append((place, result.fault))
            is_final &= fault is not None or not depends_on_machine(result.fault)
    entries = np.zeros(len(found), ENTRY)
    if found:
        columns = ("size", "width", "height", "flags")
        for column, values in zip(columns, zip(*found, strict=True), strict=True):
            entries[column] = values
    return Part({"excluded": excluded, "is_final": is_final}, entries)


def gather_folder(
    root: Path,
    files: Files,
    pieces: Sequence[range],
    recall: Callable[[int], Part],
    new_buffer: NewBuffer,
) -> Findings:
    """Combine the parts of a folder.

    Returns:
        Rows in the order of ``files``; labels are the folders directly under the root. The columns
        are in one buffer.

    Raises:
        DataError: if no file is usable.
    """
    excluded: list[tuple[str, str]] = []
    labels: set[bytes] = set()

    def usable_names(piece: int, part: Part) -> list[bytes]:
        rows = pieces[piece]
        names = files.names.encoded(rows.start, rows.stop)
        bad = {place for place, _ in part.facts["excluded"]}
        return [name for place, name in enumerate(names) if place not in bad] if bad else names

    number, name_bytes = 0, 0
    for piece, rows in enumerate(pieces):
        part = recall(piece)
        names = usable_names(piece, part)
        number += len(names)
        name_bytes += sum(map(len, names))
        labels.update(name.partition(b"/")[0] for name in names if b"/" in name)
        for place, reason in part.facts["excluded"]:
            excluded.append((files.names[rows.start + int(place)], reason))
    if excluded:
        name, reason = excluded[0]
        text = "%s: excluded files: %d of %d; first: %s (%s)"
        logger.warning(text, root, len(excluded), len(files), name, reason)
        if not number:
            raise DataError(
                f"{root}: none of {len(files)} image files is usable; first: {name} ({reason}); "
                "replace them, raise data.max_pixels or set data.path to another folder"
            )
    sorted_labels = sorted(label.decode("utf-8", "surrogateescape") for label in labels)
    label_of = {encode_name(label): i for i, label in enumerate(sorted_labels)}
    entries, stored = new_columns(number, name_bytes, new_buffer)
    total = hashlib.sha256(_DIGEST_BEGINS)
    at, end = 0, 0
    for piece in range(len(pieces)):
        part = recall(piece)
        names = usable_names(piece, part)
        rows = entries[at : at + len(names)]
        rows[:] = part.rows
        rows["label"] = [
            label_of[name.partition(b"/")[0]] if b"/" in name else -1 for name in names
        ]
        text = b"".join(names)
        stored.text[end : end + len(text)] = np.frombuffer(text, np.uint8)
        stored.ends[at : at + len(names)] = end + np.cumsum([*map(len, names)], dtype=np.uint64)
        _feed(total, names, rows)
        at += len(names)
        end += len(text)
    total.update(turns_bytes(entries))
    found = tuple(excluded)
    return Findings(entries, stored, tuple(sorted_labels), found, total.hexdigest())


def is_readable(path: Path) -> bool:
    """Return whether the system can read an image file, whatever its content."""
    try:
        header_of_file(path)
    except HeaderError:
        return True
    except OSError:
        return False
    return True


def _feed(total: Any, names: Sequence[bytes], rows: NDArray[np.void]) -> None:
    columns = (rows[column].tolist() for column in ("size", "width", "height"))
    for name, size, width, height in zip(names, *columns, strict=True):
        total.update(name + b"\0%d %d %d\n" % (size, width, height))


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
            return Examined(0, 0, f"{UNREADABLE}{error.strerror}")

    return patience.retry(examined, str(path))
