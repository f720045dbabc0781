"""Labelled training and test images: two sets, or one set split in two."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cmtmae_scale.runtime.collectives import (
    all_ranks_agree,
    broadcast_bytes,
    broadcast_text,
    is_first,
    on_all_ranks_for_long,
    ranks,
)
from cmtmae_scale.runtime.shared_index import open_on_all_ranks
from dataloading.data_set import Request
from dataloading.errors import DataError, ReadError
from dataloading.exchange import index_from_bytes, index_to_bytes
from dataloading.index import Index, build_index
from dataloading.kept_index import Verify
from dataloading.name_checks import as_integer, find_equal_labels
from dataloading.order import sample_ids
from dataloading.reading import Reader, UndecodableError
from dataloading.stores import as_root
from dataloading.torch_decode import find_codec, make_decode

logger = logging.getLogger(__name__)

SPLIT_SALT = 0x5B117
CHECK_PATIENCE_S = 1.0
"""Seconds for which a failed read is retried when a set is checked for a decodable image."""


@dataclass
class ImageSet:
    """Some images of an index, with labels."""

    index: Index
    ids: NDArray[np.int64]
    """Rows of the index, ascending ``[n]``."""
    labels: NDArray[np.int64]
    """Index of each image's class in ``Sets.classes``, ``[n]``."""

    def __len__(self) -> int:
        return len(self.ids)


class Sets(NamedTuple):
    """Training and test images of a probe."""

    train: ImageSet
    test: ImageSet
    classes: tuple[str, ...]
    """Names of the labels, sorted."""
    split: str
    """Description of the split of one set; empty for two sets."""


def open_shared_index(
    path: str,
    kept: Path | None,
    exif_orientation: bool = True,
    verify: Verify = "changed",
    recheck_excluded: bool = True,
) -> Index:
    """Open an index on all ranks. A collective.

    Args:
        path: the images.
        kept: folder that keeps the index between launches, for all ranks, which map it;
            ``None``: rank 0 builds it and broadcasts it.
        exif_orientation: as for ``build_index``.
        verify: as for ``load_or_build``.
        recheck_excluded: as for ``open_on_all_ranks``.

    Raises:
        DataError: on every rank, if there is no usable image.
    """
    if kept is not None:
        request = Request(as_root(path), exif_orientation=exif_orientation)
        return open_on_all_ranks(request, kept, verify, recheck_excluded)
    index = on_all_ranks_for_long(
        lambda: build_index(path, exif_orientation=exif_orientation) if is_first() else None
    )
    data = broadcast_bytes(b"" if index is None or ranks() == 1 else index_to_bytes(index))
    return index_from_bytes(data) if index is None else index


def open_pair(
    train: str,
    test: str,
    kept: Path | None = None,
    exif_orientation: bool = True,
    verify: Verify = "changed",
    recheck_excluded: bool = True,
) -> Sets:
    """Open two sets with the same class names; see ``open_shared_index``. A collective.

    Raises:
        DataError: images without labels, or a label of the test set that the training set lacks.
    """
    settings = exif_orientation, verify, recheck_excluded
    train_index = open_shared_index(train, kept and kept / "train-index", *settings)
    train_set = label_images(train_index, train, np.arange(len(train_index.labels)))
    require_classes(train_index, train)
    test_index = open_shared_index(test, kept and kept / "test-index", *settings)
    classes = train_index.labels
    for name in sorted(set(test_index.labels) - set(classes)):
        number = as_integer(name)
        same = [label for label in classes if number is not None and as_integer(label) == number]
        remedy = (
            f"write {name} as {same[0]} in both" if same else "use two sets of the same classes"
        )
        raise DataError(
            f"{test}: the label {name} is not among the {len(classes)} of {train}; {remedy}"
        )
    if test_index.digest == train_index.digest and is_first():
        logger.warning(
            "%s: the test images are the training images, each its own nearest neighbour, so "
            "accuracies say nothing about other images; set eval.test_path, data.test_path or "
            "--test to other images",
            test,
        )
    if len(test_index.labels) == 1 and is_first():
        logger.warning(
            "%s: all %d images have the label %s, one of %d classes, so accuracies are of this "
            "class only; set eval.test_path, data.test_path or --test to images of all classes",
            test,
            len(test_index),
            test_index.labels[0],
            len(classes),
        )
    number = {name: i for i, name in enumerate(classes)}
    numbers = np.array([number[name] for name in test_index.labels], dtype=np.int64)
    return Sets(train_set, label_images(test_index, test, numbers), tuple(classes), "")


def open_split(path: str, fraction: float, seed: int, exif_orientation: bool = True) -> Sets:
    """Split one set of images, a fraction in (0, 1) of each class to train on. A collective.

    Raises:
        DataError: images without labels, or no class of two images.
    """
    index = open_shared_index(path, None, exif_orientation)
    whole = label_images(index, path, np.arange(len(index.labels)))
    require_classes(index, path)
    in_train = stratified_sample(whole.labels, fraction, seed)
    if in_train.all():
        raise DataError(f"{path}: no class has two images; nothing is left to test on")
    train, test = (
        ImageSet(index, whole.ids[chosen], whole.labels[chosen]) for chosen in (in_train, ~in_train)
    )
    text = f"a split of images, not of sources: {fraction:.0%} of each class to train, seed {seed}"
    return Sets(train, test, tuple(index.labels), text)


def label_images(index: Index, path: str, numbers: NDArray[np.int64]) -> ImageSet:
    """Return all images of an index with renumbered labels.

    Raises:
        DataError: if an image has no label, or two labels are the same number.
    """
    labels = index.entries["label"].astype(np.int64)
    bare = np.flatnonzero(labels < 0)
    if len(bare):
        raise DataError(
            f"{path}: {len(bare)} of {len(index)} images have no label ({index.names[bare[0]]}); "
            "put each into the folder of its class, or give each a .cls member"
        )
    equal = find_equal_labels(index.labels)
    if equal is not None:
        raise DataError(
            f"{path}: the labels {equal[0]} and {equal[1]} are the same number and would be two "
            "classes; write one form"
        )
    return ImageSet(index, np.arange(len(index), dtype=np.int64), numbers[labels])


def require_classes(index: Index, path: str) -> None:
    """Require two classes to learn from.

    Raises:
        DataError: if all images have the same label.
    """
    if len(index.labels) < 2:
        raise DataError(
            f"{path}: all images have one label, {''.join(index.labels)}; a probe needs two "
            "classes: set eval.train_path, data.path or --train to a folder of class folders"
        )


def require_decodable(images: ImageSet, name: str) -> None:
    """Refuse a set of which no image can be decoded; the first that can ends the search.

    Rank 0 decodes; a collective.

    Args:
        images: the set.
        name: its key and path, for the message.

    Raises:
        DataError: on every rank, with the reason of the first image.
        ReadError: on every rank, if storage did not return some images and no other decodes.
    """
    problem, unread = "", False
    if is_first():
        problem, unread = find_no_decodable(images, name)
    problem, unread = broadcast_text(problem), not all_ranks_agree(not unread)
    if problem:
        raise (ReadError if unread else DataError)(problem)


def find_no_decodable(images: ImageSet, name: str) -> tuple[str, bool]:
    """Return why no image of a set can be decoded, or ``""``, and whether some cannot be read."""
    reader, decode = Reader(images.index, CHECK_PATIENCE_S), make_decode(find_codec())
    first, unread = "", False
    try:
        for row in images.ids.tolist():
            try:
                decode(reader.read(row))
            except ReadError as error:
                unread, first = True, first or str(error)
            except UndecodableError as error:
                first = first or f"{images.index.names[row]}: {error}"
            else:
                return "", False
    finally:
        reader.close()
    remedy = "try again when they can be read" if unread else "name a folder of intact images"
    return f"{name}: none of {len(images)} images can be decoded ({first}); {remedy}", unread


def stratified_sample(labels: NDArray[np.int64], fraction: float, seed: int) -> NDArray[np.bool_]:
    """Choose a fraction in (0, 1) of each class, as bool ``[n]``; labels are ``[n]``.

    Of each class at least one image is chosen, and not all where there are two.
    """
    chosen = np.zeros(len(labels), dtype=np.bool_)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        order, _ = sample_ids(len(rows), seed + SPLIT_SALT * int(label), np.arange(len(rows)))
        count = min(max(round(fraction * len(rows)), 1), max(len(rows) - 1, 1))
        chosen[rows[order[:count]]] = True
    return chosen
