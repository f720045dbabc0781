"""Logistic regression with L2 penalty, full batch, by L-BFGS: its optimum is scikit-learn's.

Legend: n rows of this rank, D width, C classes.
"""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from cmtmae_scale.evaluation.across import sum_over_ranks
from cmtmae_scale.evaluation.features import (
    Column,
    FeatureTable,
    fit_standardiser,
    refuse_non_finite,
)
from cmtmae_scale.evaluation.result import Score, score_predictions
from cmtmae_scale.runtime.log import progress_bar

STRENGTH = 1.0
ITERATIONS = 100
"""scikit-learn's defaults of C and max_iter."""
ROWS = 8192
"""Rows per block."""


class LinearClassifier(NamedTuple):
    """``x @ weight + bias``, float64."""

    weight: Tensor
    """``[D, C]``."""
    bias: Tensor
    """``[C]``."""

    def __call__(self, rows: Tensor) -> Tensor:
        """Compute logits ``[n, C]`` of standardised rows."""
        return rows @ self.weight + self.bias


def logistic_score(
    train: FeatureTable, test: FeatureTable, column: Column, num_classes: int
) -> Score:
    """Train on all training rows, score all test rows; the same on every rank. A collective.

    Channels are standardised with the statistics of the training rows. The penalty is
    scikit-learn's default, C = 1.

    Raises:
        DataError: if features are not finite.
    """
    refuse_non_finite({"training": train, "test": test}, column)
    standard = fit_standardiser(train.columns[column])
    classifier = fit_logistic(standard(train.columns[column]), train.labels, num_classes)
    own = Score(0, 0, 0)
    for rows, labels in zip(test.columns[column].split(ROWS), test.labels.split(ROWS), strict=True):
        own = own.plus(score_predictions(classifier(standard(rows)), labels))
    return Score(*sum_over_ranks(torch.tensor(own, device=test.labels.device)).tolist())


def fit_logistic(
    rows: Tensor,
    labels: Tensor,
    num_classes: int,
    strength: float = STRENGTH,
    iterations: int = ITERATIONS,
) -> LinearClassifier:
    """Minimise ``strength * sum of cross-entropies + |weight|^2 / 2`` over all ranks' rows.

    Args:
        rows: float64 ``[n, D]``, standardised.
        labels: int64 ``[n]``.
        num_classes: C; one weight vector per class, for two classes too.
        strength: scikit-learn's C; the bias is not penalised.
        iterations: L-BFGS iterations at most.

    Returns:
        The classifier, the same on every rank. A collective.
    """
    width, device = rows.shape[1], rows.device
    both = torch.zeros(width + 1, num_classes, dtype=torch.float64, device=device)
    both.requires_grad_()
    count = sum_over_ranks(torch.tensor(float(len(rows)), dtype=torch.float64, device=device))
    optimizer = torch.optim.LBFGS(
        [both],
        max_iter=iterations,
        max_eval=2 * iterations,
        tolerance_grad=1e-8,
        tolerance_change=1e-12,
        history_size=10,
        line_search_fn="strong_wolfe",
    )

    passes = itertools.count(1)

    def closure() -> Tensor:
        """Return the mean loss and set its gradient, summed over ranks."""
        packed = torch.zeros(both.numel() + 1, dtype=torch.float64, device=device)
        for part, truth in zip(rows.split(ROWS), labels.split(ROWS), strict=True):
            with torch.enable_grad():
                loss = cross_entropy(part @ both[:-1] + both[-1], truth, reduction="sum")
                (gradient,) = torch.autograd.grad(loss, both)
            packed += torch.cat([gradient.flatten(), loss.detach().reshape(1)])
        packed = sum_over_ranks(packed) / count
        weight = both.detach()[:-1]
        gradient = packed[:-1].view_as(both)
        gradient[:-1] += weight / (strength * count)
        both.grad = gradient
        report_done(min(next(passes), 2 * iterations))
        return packed[-1] + weight.square().sum() / (2 * strength * count)

    with progress_bar("logistic regression, at most", 2 * iterations, "passes") as report_done:
        optimizer.step(closure)
    return LinearClassifier(both.detach()[:-1], both.detach()[-1])
