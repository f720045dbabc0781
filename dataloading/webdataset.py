"""Samples in WebDataset tars: members of equal key, one of them an image."""

import hashlib
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dataloading.entries import (
    ENTRY,
    EXTENSIONS,
    Findings,
    Passed,
    encode_name,
    examine,
    map_in_threads,
    turns_bytes,
)
from dataloading.errors import DataError
from dataloading.files import Readable, read_at
from dataloading.headers import header_of_range
from dataloading.name_checks import find_split_folders
from dataloading.parts import Parts
from dataloading.passed_over import (
    Counts,
    count_passed,
    extension_of,
    format_passed,
    is_image_like,
    kind_of_bare,
    lost_images,
    may_hold_label,
    sort_counts,
)
from dataloading.patience import PATIENCE_S, Patience
from dataloading.shards import Shard, TarNames, open_shard, place
from dataloading.stores import LISTING_IN_FLIGHT, RemoteTar
from dataloading.tars import NOT_A_FILE, find_tar_problem, list_members

logger = logging.getLogger(__name__)

_IMAGES = frozenset(name.encode("ascii") for name in EXTENSIONS)
_CLASS = b".cls"
_MAX_CLASS = 256  # bytes of a class's text
_INTEGER = re.compile(r"-?[0-9]+")


class _Samples(NamedTuple):
    """Usable samples of one shard; a label is a row of ``classes``."""

    entries: NDArray[np.void]
    classes: tuple[str, ...]
    excluded: list[tuple[str, str]]
    passed: Counts
    folders: set[bytes]
    """In the names of the images, with a slash at the end."""


def examine_shards(
    path: Path | str,
    shards: Sequence[Shard],
    max_pixels: int,
    exif_orientation: bool = True,
    beside: Counts | None = None,
    refuse_splits: bool = False,
    parts: Parts | None = None,
) -> Findings:
    """Walk tars and read the headers of their images.

    The key of a member is its name up to the first dot behind the last slash; the image of a sample
    is its first member whose extension is one of an image, its label the text of ``KEY.cls``.
    Images with more than ``max_pixels`` are excluded; messages name ``path``. ``beside`` counts the
    files beside the tars that are passed over. With ``refuse_splits`` the images must not be in
    folders of a training and of a test set. ``parts`` keeps what is known of each tar.

    Returns:
        Rows in the order of shard and offset; labels are the distinct texts of ``.cls`` members,
        in numerical order if all are integers.

    Raises:
        DataError: if a file is not a tar or cannot be read, no image is usable, more than half of
            the images are passed over, or there are images of two sets.
        ReadError: if storage fails for longer than reads are retried.
    """
    patience = Patience(PATIENCE_S)

    def work(number: int) -> _Samples:
        shard = shards[number]
        known = parts.recall([shard.file]) if parts else None
        if known is not None:
            return _samples_from_json(known, number)
        samples = patience.retry(
            lambda: _examine_shard(number, shard, max_pixels, exif_orientation), str(shard.path)
        )
        if parts:
            parts.keep([shard.file], _samples_to_json(samples))
        return samples

    threads = LISTING_IN_FLIGHT if isinstance(shards[0].path, RemoteTar) else None
    found = map_in_threads(work, range(len(shards)), [1] * len(shards), "tars", threads)
    excluded = tuple(fault for samples in found for fault in samples.excluded)
    entries = np.concatenate([samples.entries for samples in found])
    if excluded:
        text = "%s: %d images, %d members excluded or damaged; first: %s (%s)"
        logger.warning(text, path, len(entries), len(excluded), *excluded[0])
    passed = sort_counts([beside or {}, *(samples.passed for samples in found)])
    others = f"; {format_passed(passed, 'member')}" if passed else ""
    if not len(entries):
        first = f"; first problem: {excluded[0][0]} ({excluded[0][1]})" if excluded else ""
        raise DataError(
            f"{path}: no usable image in {len(shards)} tar files{first}{others}; "
            "set data.path to WebDataset tars with members such as KEY.jpg and KEY.cls"
        )
    lost, images = lost_images(passed), len(entries) + len(excluded)
    if lost > images:
        raise DataError(
            f"{path}: more than half of the members, {lost} of {lost + images}, are not taken as "
            f"images{others}; correct them, or set data.path to other tars"
        )
    folders = {folder for samples in found for folder in samples.folders}
    _check_splits(path, folders, refuse_splits)
    labels = _in_order({text for samples in found for text in samples.classes})
    number = {label: i for i, label in enumerate(labels)}
    entries["label"] = np.concatenate(
        [
            np.array([*(number[text] for text in samples.classes), -1])[samples.entries["label"]]
            for samples in found  # -1 takes the last, which is -1
        ]
    )
    names = [shard.file.name for shard in shards]
    digest = shards_digest(names, [shard.file.size for shard in shards], entries)
    return Findings(entries, TarNames(names, entries), labels, excluded, digest, passed)


def shards_digest(names: Sequence[str], sizes: Sequence[int], entries: NDArray[np.void]) -> str:
    """Hash names and sizes of shards and, of all rows, place, bytes, width, height and turn.

    Returns the sha256, hexadecimal.
    """
    total = hashlib.sha256(b"dataloading index of tars 1\n")
    for name, size in zip(names, sizes, strict=True):
        total.update(encode_name(name) + b"\0%d\n" % size)
    rows = entries.copy()
    rows["label"], rows["flags"] = 0, 0
    total.update(rows.tobytes())
    total.update(turns_bytes(entries))
    return total.hexdigest()


def _check_splits(path: Path | str, folders: set[bytes], refuse: bool) -> None:
    splits = find_split_folders({tuple(_text(folder).split("/")[:-1]) for folder in folders})
    if splits is None:
        return
    text = f"{path}: the members are of {splits[0]}/ and {splits[1]}/, a training and a test set"
    if refuse:
        raise DataError(
            f"{text}; write the members of {splits[0]}/ into tars of their own, or set "
            "data.source=webdataset to use all images"
        )
    logger.info("%s; all are used, since data.source=webdataset", text)


def _samples_to_json(samples: _Samples) -> list[Any]:
    entries, classes, excluded, passed, folders = samples
    names = [_text(folder) for folder in sorted(folders)]
    return [entries.tolist(), classes, excluded, list(passed.values()), names]


def _samples_from_json(tree: list[Any], number: int) -> _Samples:
    rows, classes, excluded, passed, folders = tree
    entries = np.array([tuple(row) for row in rows], dtype=ENTRY)
    entries["shard"] = number
    counts = [Passed(*one) for one in passed]
    return _Samples(
        entries,
        tuple(classes),
        [(name, reason) for name, reason in excluded],
        {(one.kind, one.extension): one for one in counts},
        {folder.encode("utf-8", "surrogateescape") for folder in folders},
    )


def _in_order(texts: set[str]) -> tuple[str, ...]:
    if all(_INTEGER.fullmatch(text) for text in texts):
        return tuple(sorted(texts, key=lambda text: (int(text), text)))
    return tuple(sorted(texts))


def _examine_shard(number: int, shard: Shard, max_pixels: int, exif_orientation: bool) -> _Samples:
    with open_shard(shard.path) as (file, size):
        fault = find_tar_problem(file, size)
        if fault is not None:
            raise DataError(
                f"{shard.path}: {fault}; data.source=webdataset expects plain .tar files"
            )
        return _read_samples(file, size, number, shard.file.name, max_pixels, exif_orientation)


def _read_samples(
    file: int | Readable,
    size: int,
    number: int,
    shard: str,
    max_pixels: int,
    exif_orientation: bool,
) -> _Samples:
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
        if fault == NOT_A_FILE:
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
                rows.append((number, offset, length, width, height, -1, flags))
            else:
                exclude(offset, name, unfit)
        elif extension == _CLASS:
            if key in classes:
                exclude(offset, name, "a second class of its sample; the first is used")
            elif 0 < length <= _MAX_CLASS:
                classes[key] = decode_class(read_at(file, length, offset))
                if not classes[key]:
                    exclude(offset, name, "a class without text; its image has no label")
            else:
                exclude(offset, name, f"a class of {length} bytes; its image has no label")
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
    return _Samples(entries, tuple(labels), excluded, passed, folders)


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
