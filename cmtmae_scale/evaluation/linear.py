"""The linear probe: many learning rates at once, the best chosen on a held-out part of train.

Legend: n rows of this rank, B rows of a step over all ranks, D width, C classes, S settings.

Source: MAE (arXiv 2111.06377), features standardised in place of its batch norm; a grid of learning
rates in one pass as in DINOv2 (arXiv 2304.07193). SGD with momentum in place of MAE's LARS, which
is for batches of 16,384.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from cmtmae_scale.errors import ConfigError
from cmtmae_scale.evaluation.across import rows_of_all, sum_over_ranks
from cmtmae_scale.evaluation.features import Column, Table
from cmtmae_scale.evaluation.images import stratified
from cmtmae_scale.evaluation.probe import Standard, standard_of
from cmtmae_scale.evaluation.result import TOP, Score, places_of_truth
from cmtmae_scale.method.schedules import learning_rate
from dataloading.order import sample_ids

BASE_LRS = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
"""Per 256 rows."""
WEIGHT_DECAYS = (0.0, 1e-3)
MOMENTUM = 0.9
BATCH = 1024
ROWS = 4096
"""Rows in work at a time where nothing is learnt."""


class Setting(NamedTuple):
    """What one of the heads is trained with."""

    base_lr: float
    weight_decay: float


SETTINGS = tuple(Setting(lr, decay) for lr in BASE_LRS for decay in WEIGHT_DECAYS)


class Probed(NamedTuple):
    """What came of a probe."""

    score: Score
    """On the test set."""
    setting: Setting
    """The one that was chosen."""
    held_out: float
    """Its accuracy on the held-out part of train."""
    hits: Tensor
    """Whether each test image was right, bool on the CPU, in the order of the test set."""


class Rows(NamedTuple):
    """Some of this rank's rows, standardised."""

    features: Tensor
    """float32 ``[n, D]``."""
    labels: Tensor
    """int64 ``[n]``."""
    numbers: Tensor
    """Number of each among the rows that are learnt from, over all ranks; -1: not among them."""

    def where(self, chosen: Tensor) -> "Rows":
        """The chosen rows, bool ``[n]``."""
        return Rows(*(part[chosen] for part in self))


def linear_probe(
    train: Table,
    test: Table,
    column: Column,
    num_classes: int,
    epochs: int,
    held_out: float,
    seed: int,
) -> Probed:
    """Train all heads on a part of train, choose one on the rest, test it. A collective.

    Args:
        train: rows to learn from and to choose on.
        test: rows that are looked at once, with the chosen head.
        column: features.
        num_classes: C.
        epochs: passes over the rows that are learnt from.
        held_out: share of each class to choose on, in (0, 1).
        seed: of the order and of the held-out part.

    Returns:
        The chosen head's result, the same on every rank, and up to the order of sums at any number
        of ranks.

    Raises:
        ConfigError: if no class has an image to spare for the choice.
    """
    numbers, count = number_learnt(train, 1 - held_out, seed)
    standard = standard_of(train.columns[column][numbers >= 0])
    known = standardised(train, column, standard, numbers)
    heads = fit(known.where(numbers >= 0), count, num_classes, epochs, seed)
    hits, losses = judge(heads, known.where(numbers < 0))
    best = max(range(len(SETTINGS)), key=lambda s: (hits[s].correct, -losses[s]))
    asked = standardised(test, column, standard, torch.full_like(test.labels, -1))
    tested, _ = judge(heads[best : best + 1], asked)
    share = hits[best].correct / hits[best].total
    return Probed(tested[0], SETTINGS[best], share, hits_of(heads[best], asked, test.positions))


def number_learnt(train: Table, share: float, seed: int) -> tuple[Tensor, int]:
    """Choose what is learnt from: the same images at any number of ranks.

    Returns:
        For each row of this rank its number among the chosen rows of all ranks, or -1 for what is
        held out, ``[n]``; and how many are chosen.

    Raises:
        ConfigError: if nothing is held out.
    """
    places, labels = (rows_of_all(one) for one in (train.positions, train.labels))
    order = places.argsort()
    places, labels = places[order], labels[order]
    chosen = torch.as_tensor(stratified(labels.cpu().numpy(), share, seed)).to(places.device)
    if bool(chosen.all()):
        raise ConfigError(
            "no class has two training images: none can be held out to choose a learning rate; "
            "use knn, or more images"
        )
    numbers = torch.where(chosen, chosen.cumsum(0) - 1, -1)
    return numbers[torch.searchsorted(places, train.positions)], int(chosen.sum())


def standardised(table: Table, column: Column, standard: Standard, numbers: Tensor) -> Rows:
    """All rows of a table."""
    parts = [standard(part).float() for part in table.columns[column].split(ROWS)]
    features = torch.cat(parts) if parts else table.columns[column]
    return Rows(features, table.labels, numbers)


def fit(rows: Rows, count: int, num_classes: int, epochs: int, seed: int) -> Tensor:
    """Train one head a setting, all in the same pass over the rows, from zero. A collective.

    Args:
        rows: this rank's part of the rows that are learnt from.
        count: their number over all ranks.
        num_classes: C.
        epochs: passes.
        seed: of the order.

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
    for step in range(steps):
        ids, _ = sample_ids(count, seed, np.arange(step * batch, (step + 1) * batch))
        own = mine[torch.as_tensor(ids, device=device)]
        own = own[own >= 0]
        gradient = sum_over_ranks(gradient_of(heads, inputs[own], rows.labels[own])) / batch
        gradient[:, :-1] += decays * heads[:, :-1]
        velocity.mul_(MOMENTUM).add_(gradient)
        heads -= learning_rate(step / steps, 1.0, 0.0) * batch / 256 * lrs * velocity
    return heads


def gradient_of(heads: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:
    """Gradient of the summed cross-entropy of every head, ``[S, D + 1, C]``."""
    errors = (inputs @ heads).softmax(-1)  # [S, B, C]
    errors[:, torch.arange(len(labels), device=labels.device), labels] -= 1
    return inputs.T @ errors


def judge(heads: Tensor, rows: Rows) -> tuple[list[Score], list[float]]:
    """Score and mean loss of every head on the rows of all ranks. A collective.

    A head that is not finite, for its learning rate was too large, has no hit.
    """
    totals = torch.zeros(len(heads), 4, dtype=torch.float64, device=heads.device)
    for features, labels in zip(rows.features.split(ROWS), rows.labels.split(ROWS), strict=True):
        logits = with_ones(features) @ heads  # [S, n, C]
        finite = logits.isfinite().all(-1)
        places = places_of_truth(logits, labels)
        truth = labels.expand(len(heads), -1)
        losses = cross_entropy(logits.transpose(1, 2), truth, reduction="none").double().sum(1)
        hits = ((places < limit) & finite for limit in (1, TOP))
        count = torch.full_like(losses, len(labels))
        totals += torch.stack([*(hit.sum(1).double() for hit in hits), count, losses], dim=1)
    found = sum_over_ranks(totals).tolist()
    return [Score(*map(int, one[:3])) for one in found], [one[3] / one[2] for one in found]


def hits_of(head: Tensor, rows: Rows, positions: Tensor) -> Tensor:
    """Which images of all ranks one head gets right, in the order of positions. A collective."""
    places: list[Tensor] = []
    for features, labels in zip(rows.features.split(ROWS), rows.labels.split(ROWS), strict=True):
        logits = with_ones(features) @ head
        places.append((places_of_truth(logits, labels) < 1) & logits.isfinite().all(-1))
    order = rows_of_all(positions).argsort()
    return rows_of_all(torch.cat(places).byte())[order].bool().cpu()


def with_ones(features: Tensor) -> Tensor:
    """Rows with a constant for the bias, ``[n, D + 1]``."""
    return torch.cat([features, features.new_ones(len(features), 1)], dim=1)
