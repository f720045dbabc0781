"""Overlap of segmentation masks by class: pixels counted per image, mIoU and pixel accuracy.

Legend: B images of a batch, I images, S side, C classes.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cmtmae_scale.evaluation.masks import VOID
from cmtmae_scale.evaluation.measured import Measured, bootstrap_interval
from dataloading.errors import DataError

VALUES = 256
"""Possible values of a mask, void among them."""


def count_pixels(numbers: Tensor, masks: Tensor, predicted: Tensor) -> Tensor:
    """Count the pixels of each image by class, without void.

    Args:
        numbers: index of each image, ``[B]``.
        masks: truth, uint8 ``[B, S, S]``.
        predicted: uint8 ``[B, S, S]``.

    Returns:
        int64 ``[B, 1 + 3 * 256]``: the number, then hits, predicted and true pixels per value.
    """
    every = torch.arange(len(masks), device=masks.device)[:, None] * VALUES
    truth, known = masks.flatten(1).long(), masks.flatten(1) != VOID
    guess = predicted.flatten(1).long()

    def count(values: Tensor, chosen: Tensor) -> Tensor:
        found = (values + every)[chosen].bincount(minlength=len(masks) * VALUES)
        return found.view(len(masks), VALUES)

    three = (count(truth, known & (truth == guess)), count(guess, known), count(truth, known))
    return torch.cat([numbers[:, None], *three], dim=1)


def mean_iou(
    hits: NDArray[Any], predicted: NDArray[Any], truth: NDArray[Any]
) -> NDArray[np.float64]:
    """Return the mean IoU over the classes that are present or predicted, from pixels ``[..., C]``.

    NaN without any. The mean is scikit-learn's ``jaccard_score(average="macro")``, as CAPI's.
    """
    union = predicted + truth - hits
    with np.errstate(invalid="ignore", divide="ignore"):
        iou = np.where(union > 0, hits / union, 0.0)
        return iou.sum(-1) / (union > 0).sum(-1)


def score_rows(weights: str, method: str, counts: NDArray[np.int64]) -> list[Measured]:
    """Return mIoU and pixel accuracy from the counts ``[I, 3 * 256]`` of all images.

    Raises:
        DataError: if no test image has a pixel with a class.
    """
    images = len(counts)
    by_image = counts.reshape(images, 3, VALUES).astype(np.float64)
    whole = by_image.sum(0)
    if not whole[2].sum():
        raise DataError(f"no pixel of the {images} test images has a class; all are void")

    def resampled(draws: NDArray[np.float64]) -> NDArray[np.float64]:
        sums = draws @ by_image.reshape(images, -1)
        return sums.reshape(len(draws), 3, VALUES).transpose(1, 0, 2)

    def accuracy(draws: NDArray[np.float64]) -> NDArray[np.float64]:
        hits, _, truth = (one.sum(-1) for one in resampled(draws))
        with np.errstate(invalid="ignore"):  # NaN where all drawn images are void
            return hits / truth

    present = np.flatnonzero(whole[1] + whole[2] - whole[0])
    parts = {str(v): float(mean_iou(*whole[:, v : v + 1])) for v in present}
    interval = bootstrap_interval(lambda draws: mean_iou(*resampled(draws)), images)
    overlap = float(mean_iou(*whole))
    share = float(whole[0].sum() / whole[2].sum())
    between = bootstrap_interval(accuracy, images)
    return [
        Measured(weights, "patches", method, "mIoU", overlap, interval, images, parts),
        Measured(weights, "patches", method, "pixel accuracy", share, between, images),
    ]
