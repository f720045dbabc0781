"""The linear probe: a grid of settings trained at once, the best chosen on held-out rows.

Legend: n rows of this rank, B rows of a step over all ranks, D width, C classes, S settings.

Source: MAE (arXiv 2111.06377), features standardised in place of its batch norm; a grid of learning
rates in one run as in DINOv2 (arXiv 2304.07193). SGD with momentum in place of MAE's LARS, which
is for batches of 16,384.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from cmtmae_scale.errors import ConfigError
from cmtmae_scale.evaluation.across import gather_from_ranks, sum_over_ranks
from cmtmae_scale.evaluation.features import (
    Column,
    FeatureTable,
    Standardiser,
    fit_standardiser,
    refuse_non_finite,
)
from cmtmae_scale.evaluation.images import stratified_sample
from cmtmae_scale.evaluation.result import TOP, Score, rank_of_truth
from cmtmae_scale.method.schedules import learning_rate
from cmtmae_scale.runtime.log import progress_bar
from dataloading.order import sample_ids

BASE_LRS = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
"""Per 256 rows."""
WEIGHT_DECAYS = (0.0, 1e-3)
MOMENTUM = 0.9
BATCH = 1024
ROWS = 4096
"""Rows per block outside training."""


class Setting(NamedTuple):
    """Hyperparameters of one head."""

    base_lr: float
    weight_decay: float


SETTINGS = tuple(Setting(lr, decay) for lr in BASE_LRS for decay in WEIGHT_DECAYS)


class ProbeResult(NamedTuple):
    """Result of a probe."""

    score: Score
    """On the test set."""
    setting: Setting
    """The chosen hyperparameters."""
    held_out: float
    """Its accuracy on the held-out part of train."""
    hits: Tensor
    """Whether each test image is classified correctly, bool on the CPU, in test-set order."""


class Rows(NamedTuple):
    """Some of this rank's rows, standardised."""

    features: Tensor
    """float32 ``[n, D]``."""
    labels: Tensor
    """int64 ``[n]``."""
    numbers: Tensor
    """Index of each row among the training rows of all ranks; -1: not a training row."""

    def where(self, chosen: Tensor) -> "Rows":
        """Select rows by a mask, bool ``[n]``."""
        return Rows(*(part[chosen] for part in self))


def linear_probe(
    train: FeatureTable,
    test: FeatureTable,
    column: Column,
    num_classes: int,
    epochs: int,
    held_out: float,
    seed: int,
) -> ProbeResult:
    """Train all heads on a part of train, choose one on the rest, test it. A collective.

    ``held_out`` is the fraction of each class to choose on, in (0, 1); the seed determines the
    order and the held-out part.

    Returns:
        The chosen head's result, the same on every rank, and, up to the order of sums, at any
        number of ranks.

    Raises:
        ConfigError: if no class has an image to hold out.
        DataError: if features are not finite.
    """
    refuse_non_finite({"training": train, "test": test}, column)
    numbers, count = number_training_rows(train, 1 - held_out, seed)
    standard = fit_standardiser(train.columns[column][numbers >= 0])
    train_rows = standardise(train, column, standard, numbers)
    heads = train_heads(train_rows.where(numbers >= 0), count, num_classes, epochs, seed)
    hits, losses = score_heads(heads, train_rows.where(numbers < 0))
    # A loss of NaN compares as neither larger nor smaller, and would win every tie.
    losses = [loss if math.isfinite(loss) else math.inf for loss in losses]
    best = max(range(len(SETTINGS)), key=lambda s: (hits[s].correct, -losses[s]))
    test_rows = standardise(test, column, standard, torch.full_like(test.labels, -1))
    tested, _ = score_heads(heads[best : best + 1], test_rows)
    share = hits[best].correct / hits[best].total
    return ProbeResult(
        tested[0], SETTINGS[best], share, correct_images(heads[best], test_rows, test.positions)
    )


def number_training_rows(train: FeatureTable, share: float, seed: int) -> tuple[Tensor, int]:
    """Choose the training rows: the same images at any number of ranks.

    Returns:
        Per row of this rank its index among the training rows of all ranks, or -1 for held-out
        rows, ``[n]``; and the number of training rows.

    Raises:
        ConfigError: if nothing is held out.
    """
    places, labels = (gather_from_ranks(one) for one in (train.positions, train.labels))
    order = places.argsort()
    places, labels = places[order], labels[order]
    chosen = torch.as_tensor(stratified_sample(labels.cpu().numpy(), share, seed)).to(places.device)
    if bool(chosen.all()):
        raise ConfigError(
            "no class has two training images: none can be held out to choose a learning rate; "
            "use knn, or more images"
        )
    numbers = torch.where(chosen, chosen.cumsum(0) - 1, -1)
    return numbers[torch.searchsorted(places, train.positions)], int(chosen.sum())


def standardise(
    table: FeatureTable, column: Column, standard: Standardiser, numbers: Tensor
) -> Rows:
    """Standardise all rows of a table."""
    parts = [standard(part).float() for part in table.columns[column].split(ROWS)]
    features = torch.cat(parts) if parts else table.columns[column]
    return Rows(features, table.labels, numbers)


def train_heads(rows: Rows, count: int, num_classes: int, epochs: int, seed: int) -> Tensor:
    """Train one head per setting, all on the same batches, from zero weights. A collective.

    ``rows`` are this rank's part of ``count`` training rows; the seed determines their order.

    Returns:
        Heads ``[S, D + 1, C]``, the last row the bias.
    """
    device = rows.features.device
    inputs = with_ones(rows.features)
    mine = torch.full((count,), -1, dtype=torch.int64, device=device)
    mine[rows.numbers] = torch.arange(len(rows.numbers), device=device)
    batch = min(BATCH, count)
    steps = -(-epochs * count // batch)
    heads = torch.zeros(len(SETTINGS), inputs.shape[1], num_classes, device=device)
    velocity = torch.zeros_like(heads)
    lrs, decays = (
        torch.tensor(values, device=device)[:, None, None] for values in zip(*SETTINGS, strict=True)
    )
    with progress_bar("linear probe", steps, "steps") as report_done:
        for step in range(steps):
            ids, _ = sample_ids(count, seed, np.arange(step * batch, (step + 1) * batch))
            own = mine[torch.as_tensor(ids, device=device)]
            own = own[own >= 0]
            gradient = sum_over_ranks(head_gradients(heads, inputs[own], rows.labels[own])) / batch
            gradient[:, :-1] += decays * heads[:, :-1]
            velocity.mul_(MOMENTUM).add_(gradient)
            heads -= learning_rate(step / steps, 1.0, 0.0) * batch / 256 * lrs * velocity
            report_done(step + 1)
    return heads


def head_gradients(heads: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:
    """Compute the gradient of every head's summed cross-entropy, ``[S, D + 1, C]``."""
    errors = (inputs @ heads).softmax(-1)  # [S, B, C]
    errors[:, torch.arange(len(labels), device=labels.device), labels] -= 1
    return inputs.T @ errors


def score_heads(heads: Tensor, rows: Rows) -> tuple[list[Score], list[float]]:
    """Compute score and mean loss of every head on the rows of all ranks. A collective.

    A head that is not finite, because its learning rate was too large, scores 0.
    """
    totals = torch.zeros(len(heads), 4, dtype=torch.float64, device=heads.device)
    for features, labels in zip(rows.features.split(ROWS), rows.labels.split(ROWS), strict=True):
        logits = with_ones(features) @ heads  # [S, n, C]
        finite = logits.isfinite().all(-1)
        places = rank_of_truth(logits, labels)
        truth = labels.expand(len(heads), -1)
        losses = cross_entropy(logits.transpose(1, 2), truth, reduction="none").double().sum(1)
        hits = ((places < limit) & finite for limit in (1, TOP))
        count = torch.full_like(losses, len(labels))
        totals += torch.stack([*(hit.sum(1).double() for hit in hits), count, losses], dim=1)
    found = sum_over_ranks(totals).tolist()
    return [Score(*map(int, one[:3])) for one in found], [one[3] / one[2] for one in found]


def correct_images(head: Tensor, rows: Rows, positions: Tensor) -> Tensor:
    """Return which images one head classifies correctly, in test-set order. A collective."""
    places: list[Tensor] = []
    for features, labels in zip(rows.features.split(ROWS), rows.labels.split(ROWS), strict=True):
        logits = with_ones(features) @ head
        places.append((rank_of_truth(logits, labels) < 1) & logits.isfinite().all(-1))
    order = gather_from_ranks(positions).argsort()
    return gather_from_ranks(torch.cat(places).byte())[order].bool().cpu()


def with_ones(features: Tensor) -> Tensor:
    """Append a constant 1 for the bias, ``[n, D + 1]``."""
    return torch.cat([features, features.new_ones(len(features), 1)], dim=1)
