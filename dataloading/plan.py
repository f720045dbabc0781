"""Samples, views and crops of a micro-batch: a pure function of positions."""

from typing import NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from dataloading.index import Index
from dataloading.order import Shuffle, sample_ids, sequential_ids, window_ids
from dataloading.views import Boxes, Flips, crop_boxes


class Plan(NamedTuple):
    """Draws of one micro-batch, B of them.

    Attributes:
        positions: global sample indices, int64 ``[B]``.
        ids: rows of the index, int64 ``[B]``.
        views: number of the view of each sample, int64 ``[B]``.
        boxes: x, y, w, h in pixels of the upright image, int32 ``[B, 4]``.
        flips: flipped or not, bool ``[B]``.
    """

    positions: NDArray[np.int64]
    ids: NDArray[np.int64]
    views: NDArray[np.int64]
    boxes: Boxes
    flips: Flips


class Planner:
    """Plans any positions, in any order; arguments as in ``Stream``.

    Raises:
        ValueError: for arguments out of range.
    """

    def __init__(
        self,
        index: Index,
        *,
        seed: int,
        scale: tuple[float, float],
        ratio: tuple[float, float],
        flip: bool,
        count: int | None,
        shuffle: Shuffle,
    ) -> None:
        if shuffle not in get_args(Shuffle):
            raise ValueError(f"shuffle is {shuffle!r}; expected one of {get_args(Shuffle)}")
        self._index, self._seed, self._count, self._shuffle = index, seed, count, shuffle
        self._scale, self._ratio, self._flip = scale, ratio, flip
        crop_boxes(seed, [0], [0], [1], [1], scale, ratio)  # raise here, not at the first batch

    def __call__(self, positions: NDArray[np.int64]) -> Plan:
        """Plan the draws at ``positions`` ``[B]``."""
        n = len(self._index)
        if self._shuffle == "full":
            ids, epochs = sample_ids(n, self._seed, positions)
        elif self._shuffle == "window":
            ids, epochs = window_ids(n, self._seed, positions)
        else:
            ids, epochs = sequential_ids(n, positions)
        return self.cut(positions, ids, epochs if self._count is None else epochs % self._count)

    def cut(
        self, positions: NDArray[np.int64], ids: NDArray[np.int64], views: NDArray[np.int64]
    ) -> Plan:
        """Plan given views of given samples, ``[B]`` each, independent of the order."""
        rows = self._index.entries[ids]
        boxes, flips = crop_boxes(
            self._seed, ids, views, rows["width"], rows["height"], self._scale, self._ratio
        )
        return Plan(positions, ids, views, boxes, flips & self._flip)
