"""Test whether a stored data set is shuffled or sorted by class."""

import logging
import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dataloading.errors import DataError
from dataloading.index import Index
from dataloading.order import BLOCK

logger = logging.getLogger(__name__)

_MOST_BLOCKS = 1 << 14
_LEAST_MIXED = 0.5
_LEAST_EXPECTED = 0.1


class Mixing(NamedTuple):
    """Number of classes among neighbours.

    Attributes:
        block: number of consecutive samples.
        found: different labels per block, mean over the data set.
        expected: the same of a shuffled data set.
    """

    block: int
    found: float
    expected: float

    @property
    def is_sorted(self) -> bool:
        """Whether the data are closer to sorted than to shuffled."""
        return self.found - 1 < _LEAST_MIXED * (self.expected - 1)

    def __str__(self) -> str:
        word = "sorted by class" if self.is_sorted else "shuffled"
        return (
            f"{word}: {self.block} neighbours have {self.found:.1f} labels on average, "
            f"{self.expected:.1f} in a full shuffle"
        )


def class_mixing(labels: NDArray[np.int32]) -> Mixing | None:
    """Count the labels of neighbours.

    Args:
        labels: label of every sample in index order, ``[n]``; -1 (no label) is skipped.

    Returns:
        The counts, over blocks of 64 samples (of sqrt(n) where that is less); ``None`` where labels
        cannot decide: fewer than two labels, almost all samples of one, or about one sample each.
    """
    known = labels[labels >= 0]
    sizes = np.bincount(known)
    sizes = sizes[sizes > 0]
    block = min(BLOCK, max(2, math.isqrt(len(known))))
    expected = expected_labels(sizes, block) if len(sizes) > 1 else 1.0
    lowest = 1 + max(len(sizes) - 1, 0) * (block - 1) / max(len(known) - 1, 1)  # were it sorted
    if expected - 1 < _LEAST_EXPECTED or not Mixing(block, lowest, expected).is_sorted:
        return None
    blocks = known[: len(known) // block * block].reshape(-1, block)
    some = np.linspace(0, len(blocks) - 1, min(len(blocks), _MOST_BLOCKS)).astype(np.int64)
    ordered = np.sort(blocks[some], axis=1)
    changes = (ordered[:, 1:] != ordered[:, :-1]).sum(axis=1)
    return Mixing(block, 1 + float(changes.mean()), expected)


def expected_labels(sizes: NDArray[np.int64], draws: int) -> float:
    """Return the mean number of different labels among draws without replacement.

    ``sizes`` counts the samples of each label; ``draws`` is at most their sum.
    """
    total = int(sizes.sum())
    absent = np.ones(len(sizes))  # probability that a label is not drawn
    for drawn in range(draws):
        absent *= np.maximum(total - sizes - drawn, 0) / (total - drawn)
    return float((1 - absent).sum())


def require_mixed(index: Index, on_sorted: bool) -> None:
    """Refuse a data set whose neighbours are of one class, for ``data.shuffle=window``.

    With ``on_sorted`` only warn.

    Raises:
        DataError: names the data set, the figures and the remedy.
    """
    mixing = class_mixing(index.entries["label"])
    if mixing is None:
        logger.info(
            "%s: no labels that show whether the stored data are shuffled; "
            "data.shuffle=window mixes them well only if they are",
            index.root,
        )
    elif not mixing.is_sorted:
        logger.info("%s: %s", index.root, mixing)
    elif on_sorted:
        logger.warning("%s: %s; data.window_on_sorted=true allows it", index.root, mixing)
    else:
        raise DataError(
            f"{index.root}: {mixing}; with data.shuffle=window batches would have few classes. "
            f"Pack it shuffled (cmtmae check-data {index.root} --pack OUT), use "
            "data.shuffle=full, or force it with data.window_on_sorted=true"
        )
