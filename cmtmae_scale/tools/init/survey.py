"""Properties of a folder of images that a recipe is derived from."""

import logging
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dataloading.errors import DataError, ReadError
from dataloading.index import Index, build_index
from dataloading.name_checks import find_splits
from dataloading.reading import Reader, UndecodableError
from dataloading.torch_decode import find_codec, make_decode

logger = logging.getLogger(__name__)

SAMPLE = 64
"""Images that are decoded, evenly spread over the index."""


class Survey(NamedTuple):
    """Images of a training set, from their headers, and of a test set where there is one."""

    path: str
    """As ``data.path``."""
    test_path: str | None
    """Labelled test images with the labels of the training set; ``None``: none found."""
    images: int
    shorter_side: int
    """Median in pixels."""
    elongation: float
    """Median of longer side / shorter side."""
    labels: int
    """Number of labels; 0 unless every image has one."""
    excluded: tuple[tuple[str, str], ...]
    """Name and reason of unusable images: all by their headers, of a sample by decoding."""


def survey_images(path: str) -> Survey:
    """Read the headers of all images and decode some.

    In a folder with ``train/`` and ``val/``, the training set is surveyed.

    Raises:
        DataError: no usable image; counts the files that were passed over.
        ReadError: if storage fails.
    """
    train, test = find_sets(path)
    index = build_index(train)
    faults = decode_sample(index)
    if len(faults) == min(SAMPLE, len(index)):
        name, reason = faults[0]
        raise DataError(
            f"{train}: none of {len(faults)} images can be decoded ({name}: {reason}); "
            "cmtmae check-data names all"
        )
    rows = index.entries
    sides = np.sort(np.stack([rows["width"], rows["height"]]).astype(np.int64), axis=0)
    is_labelled = len(index.labels) > 1 and bool((rows["label"] >= 0).all())
    return Survey(
        train,
        test if test is not None and is_labelled and has_labels(test, index) else None,
        len(index),
        int(np.median(sides[0])),
        float(np.median(sides[1] / sides[0])),
        len(index.labels) if is_labelled else 0,
        (*index.unused_images(), *faults),
    )


def find_sets(path: str) -> tuple[str, str | None]:
    """Return the training images and the test images below a path; ``None``: no test images."""
    folder = Path(path)
    try:
        with os.scandir(folder) as items:
            splits = find_splits(item.name for item in items if item.is_dir())
    except (OSError, ValueError):  # not a folder; listing the images reports the problem
        return path, None
    if splits is None:
        return path, None
    return str(folder / splits[0]), str(folder / splits[1])


def has_labels(path: str, train: Index) -> bool:
    """Return whether a test set is usable, with a label of the training set for each image.

    If not, the reason is logged.

    Raises:
        ReadError: if storage fails.
    """
    try:
        problem = find_label_problem(build_index(path), train)
    except ReadError:
        raise
    except DataError as error:
        problem = str(error)
    if problem:
        logger.warning("%s is not evaluated: %s", path, problem)
    return not problem


def find_label_problem(test: Index, train: Index) -> str:
    """Return why the labels of a test set are not those of the training set, or ``""``."""
    bare = int((test.entries["label"] < 0).sum())
    if bare:
        return f"{bare} of {len(test)} images have no label"
    other = sorted(set(test.labels) - set(train.labels))
    if other:
        return f"the label {other[0]} is not among the {len(train.labels)} of {train.root}"
    return ""


def decode_sample(index: Index) -> list[tuple[str, str]]:
    """Decode at most ``SAMPLE`` images; returns name and reason of those that cannot be.

    Raises:
        ReadError: if storage does not return an image.
    """
    faults: list[tuple[str, str]] = []
    reader, decode = Reader(index), make_decode(find_codec())
    try:
        rows: list[int] = np.linspace(0, len(index) - 1, SAMPLE).astype(np.int64).tolist()
        for row in dict.fromkeys(rows):
            try:
                decode(reader.read(row))
            except UndecodableError as error:
                faults.append((index.names[row], str(error)))
    finally:
        reader.close()
    return faults
