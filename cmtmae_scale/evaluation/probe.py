"""Standardisation of features over the rows of all ranks, for both linear probes.

Legend: n rows of this rank, D width, C classes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from cmtmae_scale.evaluation.across import sum_over_ranks

EPSILON = 1e-6
"""Added to the variance, as MAE's probe does in its batch norm."""


class Standardiser(NamedTuple):
    """Mean and standard deviation per channel over the training rows, float64 ``[D]``.

    MAE's probe uses a batch norm without affine parameters; here the statistics are those of all
    training rows in place of a batch's: ``(x - mean) / sqrt(var + 1e-6)``, var biased.
    """

    mean: Tensor
    std: Tensor

    def __call__(self, rows: Tensor) -> Tensor:
        """Standardise rows ``[n, D]``; float64."""
        return (rows.double() - self.mean) / self.std


def fit_standardiser(rows: Tensor) -> Standardiser:
    """Compute the statistics of the rows ``[n, D]`` of all ranks. A collective."""
    count = sum_over_ranks(torch.tensor(float(len(rows)), device=rows.device).double())
    mean = sum_over_ranks(rows.double().sum(0)) / count
    variance = sum_over_ranks((rows.double() - mean).square().sum(0)) / count
    return Standardiser(mean, (variance + EPSILON).sqrt())
