"""What both linear probes share: standardised features and losses over rows of all ranks.

Legend: n rows of this rank, D width, C classes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from cmtmae_scale.evaluation.across import sum_over_ranks

EPSILON = 1e-6
"""Added to the variance, as MAE's probe does in its batch norm."""


class Standard(NamedTuple):
    """Mean and deviation of each channel over the rows that are learnt from, float64 ``[D]``.

    What MAE's probe does with a batch norm without affine parameters, with the statistics of all
    training rows in place of a batch's: ``(x - mean) / sqrt(var + 1e-6)``, var biased.
    """

    mean: Tensor
    deviation: Tensor

    def __call__(self, rows: Tensor) -> Tensor:
        """Standardise rows ``[n, D]``; float64."""
        return (rows.double() - self.mean) / self.deviation


def standard_of(rows: Tensor) -> Standard:
    """Statistics over the rows ``[n, D]`` of all ranks. A collective."""
    count = sum_over_ranks(torch.tensor(float(len(rows)), device=rows.device).double())
    mean = sum_over_ranks(rows.double().sum(0)) / count
    variance = sum_over_ranks((rows.double() - mean).square().sum(0)) / count
    return Standard(mean, (variance + EPSILON).sqrt())
