"""Samples in WebDataset tars: members of equal key, one of them an image."""

import hashlib
import logging
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dataloading.columns import NewBuffer, new_columns, new_memory
from dataloading.entries import (
    ENTRY,
    EXTENSIONS,
    NO_LABEL,
    SECOND_CLASS,
    Findings,
    Passed,
    concerns_label,
    depends_on_machine,
    encode_name,
    examine,
    turns_bytes,
)
from dataloading.errors import DataError
from dataloading.files import Readable, read_at
from dataloading.headers import header_of_range
from dataloading.name_checks import find_split_folders
from dataloading.parts import Part
from dataloading.passed_over import (
    Counts,
    count_passed,
    extension_of,
    format_count,
    format_passed,
    is_image_like,
    kind_of_bare,
    lost_images,
    may_hold_label,
    sort_counts,
)
from dataloading.patience import PATIENCE_S, Patience
from dataloading.shard_names import TarNames, is_parquet, place
from dataloading.shards import Shard, open_shard
from dataloading.tars import NOT_A_FILE, find_tar_problem, list_members

logger = logging.getLogger(__name__)

_IMAGES = frozenset(name.encode("ascii") for name in EXTENSIONS)
_CLASS = b".cls"
MAX_CLASS = 256
"""Most bytes of a class's text."""
_INTEGER = re.compile(r"-?[0-9]+")


class _Words(NamedTuple):
    """Words of messages for the files of a data set and their contents."""

    file: str
    unit: str
    expected: str


_TAR_WORDS = _Words(
    "tar file", "member", "WebDataset tars with members such as KEY.jpg and KEY.cls"
)
_PARQUET_WORDS = _Words(
    "Parquet file", "row", "Parquet files with encoded images, as Hugging Face datasets writes"
)


def examine_shards(path: Path, shards: Sequence[Shard], max_pixels: int) -> Findings:
    """Walk tars and read the headers of their images, in this thread; see ``gather_shards``.

    Raises:
        DataError, ReadError: see ``examine_shard`` and ``gather_shards``.
    """
    patience = Patience(PATIENCE_S)
    parts = [examine_shard(shard, max_pixels, True, patience) for shard in shards]
    return gather_shards(path, shards, parts.__getitem__, new_memory)


def examine_shard(
    shard: Shard, max_pixels: int, exif_orientation: bool, patience: Patience
) -> Part:
    """Walk a tar and read the headers of its images.

    The key of a member is its name up to the first dot behind the last slash; the image of a sample
    is its first member whose extension is one of an image, its label the text of ``KEY.cls``.
    Images with more than ``max_pixels`` are excluded.

    Returns:
        Rows whose labels are rows of the fact ``classes`` and whose shard is 0.

    Raises:
        DataError: if the file is not a tar or cannot be read.
        ReadError: if storage fails for longer than reads are retried.
    """
    return patience.retry(
        lambda: _examine_shard(shard, max_pixels, exif_orientation), str(shard.path)
    )


def gather_shards(
    path: Path | str,
    shards: Sequence[Shard],
    recall: Callable[[int], Part],
    new_buffer: NewBuffer,
    beside: Counts | None = None,
    refuse_splits: bool = False,
) -> Findings:
    """Combine the parts of tars, or of Parquet files; messages name ``path``.

    ``beside`` counts the files beside the tars that are passed over. With ``refuse_splits`` the
    images must not be in folders of a training and of a test set.

    Returns:
        Rows in the order of shard and offset; labels are the distinct texts of ``.cls`` members or
        of a column, in numerical order if all are integers, or the names of a ClassLabel column in
        its order.

    Raises:
        DataError: if no image is usable, more than half of the images are passed over, there
            are images of two sets, or files have different ClassLabels.
    """
    totals = _add_up(shards, recall, dict(beside or {}))
    passed = _report(path, shards, totals, refuse_splits)
    named = next(iter(totals.class_lists), None)
    labels = _in_order(totals.texts) if named is None else named
    label_of = {label: i for i, label in enumerate(labels)}
    entries, _ = new_columns(totals.rows, 0, new_buffer)
    names = [shard.file.name for shard in shards]
    total = _begin_digest(names, [shard.file.size for shard in shards])
    at = 0
    for number in range(len(shards)):
        part = recall(number)
        own = entries[at : at + len(part.rows)]
        own[:] = part.rows
        own["shard"] = number
        classes = [*(label_of[text] for text in part.facts["classes"]), -1]
        own["label"] = np.array(classes)[part.rows["label"]]  # -1 takes the last, which is -1
        _feed(total, own)
        at += len(own)
    total.update(turns_bytes(entries))
    return Findings(
        entries,
        TarNames(names, entries),
        labels,
        tuple(totals.excluded),
        total.hexdigest(),
        passed,
        totals.row_group,
    )


class _Totals(NamedTuple):
    """What all files of a data set have."""

    rows: int
    excluded: list[tuple[str, str]]
    passed: Counts
    texts: set[str]
    """Labels."""
    folders: set[str]
    class_lists: dict[tuple[str, ...] | None, str]
    """The first file of each ClassLabel; ``None``: of labels without one."""
    row_group: tuple[int, str] | None
    """Bytes and place of the largest."""
    columns: list[str]
    """The different ones, in order."""
    unread: list[str]
    """Columns that could hold labels and are not read."""


def _add_up(shards: Sequence[Shard], recall: Callable[[int], Part], counts: Counts) -> _Totals:
    """Add the parts of all files; ``counts`` has what is passed over beside them."""
    excluded: list[tuple[str, str]] = []
    texts: set[str] = set()
    folders: set[str] = set()
    class_lists: dict[tuple[str, ...] | None, str] = {}
    row_group: tuple[int, str] | None = None
    columns: dict[str, None] = {}  # in order
    unread: list[str] = []
    rows = 0
    for number, shard in enumerate(shards):
        part = recall(number)
        rows += len(part.rows)
        if part.facts.get("is_named"):
            class_lists.setdefault(tuple(part.facts["classes"]), shard.file.name)
        elif part.facts["classes"]:
            class_lists.setdefault(None, shard.file.name)
        if "row_group" in part.facts:
            columns[part.facts["columns"]] = None
            unread += part.facts.get("unread", [])  # earlier releases kept none
            group_bytes, first = part.facts["row_group"]
            if row_group is None or group_bytes > row_group[0]:
                row_group = group_bytes, place(shard.file.name, first)
        excluded += [(name, reason) for name, reason in part.facts["excluded"]]
        for one in part.facts["passed"]:
            item = Passed(*one)
            count_passed(counts, item.kind, item.extension, item.first, item.number)
        texts.update(part.facts["classes"])
        folders.update(part.facts["folders"])
    return _Totals(
        rows, excluded, counts, texts, folders, class_lists, row_group, list(columns), unread
    )


def _report(
    path: Path | str, shards: Sequence[Shard], totals: _Totals, refuse_splits: bool
) -> tuple[Passed, ...]:
    """Log what is not used, and refuse what is no data set; returns what is passed over."""
    words = _PARQUET_WORDS if is_parquet(shards[0].file.name) else _TAR_WORDS
    rows, excluded, unread = totals.rows, totals.excluded, totals.unread
    if totals.columns:
        logger.info("%s: columns: %s", path, "; ".join(totals.columns))
    if unread:
        text = "%s: no labels are read from %s%s; write them as integers or texts"
        more = f" and {len(unread) - 1} more" if len(unread) > 1 else ""
        logger.warning(text, path, unread[0], more)
    if excluded:
        bad = format_count(len(excluded), words.unit)
        text = "%s: %s, %s excluded or damaged; first: %s (%s)"
        logger.warning(text, path, format_count(rows, "image"), bad, *excluded[0])
    passed = sort_counts([totals.passed])
    others = f"; {format_passed(passed, words.unit)}" if passed else ""
    if not rows:
        first = f"; first problem: {excluded[0][0]} ({excluded[0][1]})" if excluded else ""
        raise DataError(
            f"{path}: no usable image in {format_count(len(shards), words.file)}{first}{others}; "
            f"set data.path to {words.expected}"
        )
    lost = lost_images(passed)
    images = rows + sum(not concerns_label(reason) for _, reason in excluded)
    if lost > images:
        raise DataError(
            f"{path}: more than half of the {words.unit}s, {lost} of {lost + images}, are not "
            f"taken as images{others}; correct them, or set data.path to other {words.file}s"
        )
    _check_splits(path, totals.folders, refuse_splits)
    if len(totals.class_lists) > 1:
        raise DataError(
            f"{path}: {' and '.join(list(totals.class_lists.values())[:2])} have other classes "
            "(ClassLabel); write them as one data set, or set data.path to files of one"
        )
    return passed


def _begin_digest(names: Sequence[str], sizes: Sequence[int]) -> Any:
    kind = b"parquet" if is_parquet(names[0]) else b"tars"
    total = hashlib.sha256(b"dataloading index of %s 1\n" % kind)
    for name, size in zip(names, sizes, strict=True):
        total.update(encode_name(name) + b"\0%d\n" % size)
    return total


def _feed(total: Any, entries: NDArray[np.void]) -> None:
    rows = entries.copy()
    rows["label"], rows["flags"] = 0, 0
    total.update(rows.tobytes())


def _check_splits(path: Path | str, folders: set[str], refuse: bool) -> None:
    splits = find_split_folders({tuple(folder.split("/")[:-1]) for folder in folders})
    if splits is None:
        return
    text = f"{path}: the members are of {splits[0]}/ and {splits[1]}/, a training and a test set"
    if refuse:
        raise DataError(
            f"{text}; write the members of {splits[0]}/ into tars of their own, or set "
            "data.source=webdataset to use all images"
        )
    logger.info("%s; all are used, since data.source=webdataset", text)


def _in_order(texts: set[str]) -> tuple[str, ...]:
    if all(_INTEGER.fullmatch(text) for text in texts):
        return tuple(sorted(texts, key=lambda text: (int(text), text)))
    return tuple(sorted(texts))


def _examine_shard(shard: Shard, max_pixels: int, exif_orientation: bool) -> Part:
    with open_shard(shard.path) as (file, size):
        fault = find_tar_problem(file, size)
        if fault is not None:
            raise DataError(
                f"{shard.path}: {fault}; data.source=webdataset expects plain .tar files"
            )
        return _read_samples(file, size, shard.file.name, max_pixels, exif_orientation)


def _read_samples(
    file: int | Readable, size: int, shard: str, max_pixels: int, exif_orientation: bool
) -> Part:
    rows: list[tuple[int, int, int, int, int, int, int]] = []
    keys: list[bytes] = []  # of the rows
    images: set[bytes] = set()
    classes: dict[bytes, str] = {}
    others: list[tuple[bytes, bytes, bytes]] = []  # key, extension and name
    excluded: list[tuple[str, str]] = []
    links: list[tuple[bytes, bytes]] = []  # end from the first dot on, and name
    folders: set[bytes] = set()

    def exclude(offset: int, name: bytes, reason: str) -> None:
        text = _text(name)
        excluded.append((place(shard, offset) + (f" ({text})" if text else ""), reason))

    for name, offset, length, fault in list_members(file, size):
        if not name:
            exclude(offset, name, fault or "a member without a name")
            continue
        base = name.rfind(b"/") + 1
        dot = name.find(b".", base)
        key, extension = name[:dot], name[dot:].lower()
        if fault == NOT_A_FILE and dot > base and extension == _CLASS:
            exclude(offset, name, f"a link, which is not followed; {NO_LABEL}")
        elif fault == NOT_A_FILE:
            links.append((extension if dot > base else b"", name))
        elif fault is not None:
            exclude(offset, name, fault)
        elif dot <= base:  # no extension, or a hidden file
            others.append((b"", b"", name))
        elif extension in _IMAGES:
            if key in images:
                exclude(offset, name, "a second image of its sample; the first is used")
                continue
            images.add(key)
            folders.add(name[:base])
            width, height, unfit, flags = examine(
                length,
                lambda o=offset, n=length: header_of_range(file, o, n),
                max_pixels,
                exif_orientation,
            )
            if unfit is None:
                keys.append(key)
                rows.append((0, offset, length, width, height, -1, flags))
            else:
                exclude(offset, name, unfit)
        elif extension == _CLASS:
            if key in classes:
                exclude(offset, name, SECOND_CLASS)
            elif 0 < length <= MAX_CLASS:
                classes[key] = decode_class(read_at(file, length, offset))
                if not classes[key]:
                    exclude(offset, name, f"a class without text; {NO_LABEL}")
            else:
                exclude(offset, name, f"a class of {length} bytes; {NO_LABEL}")
        else:
            others.append((key, extension, name))

    texts = [classes.get(key, "") for key in keys]
    labels = {text: i for i, text in enumerate(dict.fromkeys(filter(None, texts)))}
    entries = np.array(rows, dtype=ENTRY)
    entries["label"] = [labels.get(text, -1) for text in texts]
    passed = _count_others(others, shard, images, {key for key in classes if classes[key]})
    for key in classes.keys() - images:
        count_passed(passed, "file", ".cls", f"{shard}/{_text(key)}.cls")
    for end, name in links:
        last = os.path.splitext(f"a{_text(end)}")[1]
        kind, extension = (
            ("link", last) if last in EXTENSIONS else ("beside", extension_of(f"a{last}"))
        )
        count_passed(passed, kind, extension, f"{shard}/{_text(name)}")
    facts: dict[str, Any] = {
        "classes": list(labels),
        "excluded": excluded,
        "is_final": not any(depends_on_machine(reason) for _, reason in excluded),
        "passed": list(passed.values()),
        "folders": [_text(folder) for folder in sorted(folders)],
    }
    return Part(facts, entries)


def decode_class(data: bytes) -> str:
    """Decode the text of a ``.cls`` member: UTF-8, or UTF-16 with a byte-order mark."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16", "replace").strip()
    return data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape").strip()


def _count_others(
    others: Sequence[tuple[bytes, bytes, bytes]],
    shard: str,
    images: set[bytes],
    labelled: set[bytes],
) -> Counts:
    """Count members that are neither an image nor a class; other members of a sample are not."""
    passed: Counts = {}
    known: dict[bytes, tuple[str, bool, bool, bool]] = {}
    for key, whole, name in others:
        if not whole:
            kind = kind_of_bare(_text(name.rpartition(b"/")[2]))
            count_passed(passed, kind, "", f"{shard}/{_text(name)}")
            continue
        if whole not in known:
            text = _text(whole)
            last = os.path.splitext(text)[1]
            extension = extension_of(f"a{text}")
            near, label = is_image_like(extension), may_hold_label(extension)
            is_image = last in EXTENSIONS
            known[whole] = (last if is_image else extension, is_image, near, label)
        extension, is_image, near, label = known[whole]
        if is_image:
            kind = "second" if key in images else "key"
        elif near or key not in images:
            kind = "file"
        elif label and key not in labelled:
            kind = "label"
        else:
            continue
        count_passed(passed, kind, extension, f"{shard}/{_text(name)}")
    return passed


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")
