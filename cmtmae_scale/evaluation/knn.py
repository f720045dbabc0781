"""k-nearest neighbours by cosine, exact at any number of ranks.

Legend: Q queries, n rows of this rank, D width, C classes, k neighbours.

Source: DINO (arXiv 2104.14294): votes weighted with exp(cosine / T), T = 0.07, k = 10 and 20.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from cmtmae_scale.evaluation.across import gather_from_ranks, sum_over_ranks
from cmtmae_scale.evaluation.features import Column, FeatureTable, refuse_non_finite
from cmtmae_scale.evaluation.result import Score, score_predictions
from cmtmae_scale.runtime.collectives import ranks
from cmtmae_scale.runtime.log import progress_bar

logger = logging.getLogger(__name__)

NEIGHBOURS = (10, 20)
TEMPERATURE = 0.07
QUERIES, ROWS = 1024, 8192
"""Size of the blocks in which similarities are computed."""
LARGEST_EXPONENT = 690.0
"""Of votes in float64; exp(709.8) is infinite and exp(-745.2) is 0."""


class Neighbours(NamedTuple):
    """Neighbours per query, nearest first; of equally near rows the lower position first."""

    similarity: Tensor
    """float32 ``[Q, k]``."""
    positions: Tensor
    """Index in the training set, int64 ``[Q, k]``."""
    labels: Tensor
    """Class, int64 ``[Q, k]``."""


def knn_scores(
    train: FeatureTable,
    test: FeatureTable,
    column: Column,
    neighbours: Sequence[int] = NEIGHBOURS,
    temperature: float = TEMPERATURE,
) -> Iterator[tuple[int, Score]]:
    """Classify every test image by its neighbours among all ranks' training images. A collective.

    ``neighbours`` are the values of k; with a temperature of 0 every neighbour has one vote.
    A k above the number of training images is reduced to it with a warning.

    Yields:
        Each given k with its score, the same on every rank. Of classes with equal votes the first
        wins, as in scikit-learn.

    Raises:
        DataError: if features are not finite.
    """
    refuse_non_finite({"training": train, "test": test}, column)
    found = count_images(train)
    totals = {k: Score(0, 0, 0) for k in neighbours}
    used = {k: min(k, found) for k in neighbours}
    warn_of_few_images(found, neighbours)
    num_classes = 1 + int(gather_from_ranks(torch.cat([train.labels, test.labels])).max())
    queries, truth = (gather_from_ranks(rows) for rows in (test.columns[column], test.labels))
    with progress_bar("k-NN", len(queries), "images") as report_done:
        for start in range(0, len(queries), QUERIES):
            part = slice(start, start + QUERIES)
            near = find_neighbours(queries[part], train, column, max(used.values()))
            for k in neighbours:
                votes = count_votes(near, used[k], num_classes, temperature)
                totals[k] = totals[k].plus(score_predictions(votes, truth[part]))
            report_done(min(part.stop, len(queries)))
    yield from totals.items()


def count_images(train: FeatureTable) -> int:
    """Return the number of training images over all ranks. A collective."""
    count = torch.tensor(len(train.positions), device=train.positions.device)
    return int(sum_over_ranks(count))


def warn_of_few_images(found: int, neighbours: Sequence[int]) -> None:
    """Warn that a k above the number of training images is reduced to that number."""
    larger = [str(k) for k in neighbours if k > found]
    if larger:
        text = "k-NN with k=%s: there are only %d training images that can be decoded; k=%d is used"
        logger.warning(text, " and ".join(larger), found, found)


def find_neighbours(queries: Tensor, train: FeatureTable, column: Column, k: int) -> Neighbours:
    """Find the k nearest training images of all ranks; queries ``[Q, D]`` are the same on each."""
    queries = normalize(queries.double(), dim=1)
    found = empty_neighbours(len(queries), k, queries.device)
    for start in range(0, len(train.positions), ROWS):
        part = slice(start, start + ROWS)
        rows = normalize(train.columns[column][part].double(), dim=1)
        # The float64 product rounded to float32 does not depend on how the rows are split, so that
        # equal images are equally near on any rank.
        similarity = (queries @ rows.T).float()  # [Q, rows]
        values, places = stable_topk(similarity, k)
        near = Neighbours(values, train.positions[part][places], train.labels[part][places])
        found = merge_neighbours([found, near], k)
    if ranks() == 1:
        return found
    # [Q, k] of every rank, concatenated along the first dimension
    gathered = [gather_from_ranks(field).split(len(queries)) for field in found]
    return merge_neighbours([Neighbours(*parts) for parts in zip(*gathered, strict=True)], k)


def empty_neighbours(queries: int, k: int, device: torch.device) -> Neighbours:
    """Return k neighbours per query that are farther than any row, to merge real ones into."""
    shape = (queries, k)
    zeros = torch.zeros(shape, dtype=torch.int64, device=device)
    last = torch.full_like(zeros, torch.iinfo(torch.int64).max)
    return Neighbours(torch.full(shape, -torch.inf, device=device), last, zeros)


def stable_topk(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest of each row ``[Q, n]`` and their indices; of equal values the first.

    ``topk`` chooses freely among equal values, so rows with a tie at the border are sorted.
    """
    if values.shape[1] <= k:
        return values.sort(dim=1, descending=True, stable=True)
    largest, places = values.topk(k + 1, dim=1)
    largest, places, border = largest[:, :k].clone(), places[:, :k].clone(), largest[:, k]
    tied = (largest[:, -1] == border).nonzero()[:, 0]
    if len(tied):
        in_order, where = values[tied].sort(dim=1, descending=True, stable=True)
        largest[tied], places[tied] = in_order[:, :k], where[:, :k]
    return largest, places


def merge_neighbours(groups: Sequence[Neighbours], k: int) -> Neighbours:
    """Return the k nearest of several groups, ordered by similarity and then by position."""
    whole = Neighbours(*(torch.cat(parts, dim=1) for parts in zip(*groups, strict=True)))
    first = whole.positions.argsort(dim=1, stable=True)
    whole = Neighbours(*(part.gather(1, first) for part in whole))
    order = whole.similarity.argsort(dim=1, descending=True, stable=True)[:, :k]
    return Neighbours(*(part.gather(1, order) for part in whole))


def count_votes(near: Neighbours, k: int, num_classes: int, temperature: float) -> Tensor:
    """Sum the votes of the k nearest per class, float64 ``[Q, C]``; ``-inf``: no vote."""
    similarity, labels = near.similarity[:, :k].double(), near.labels[:, :k]
    exponents = similarity / temperature if temperature else torch.zeros_like(similarity)
    if temperature and 1 / temperature > LARGEST_EXPONENT:
        # relative to the nearest neighbour: neither infinity nor 0, which is no vote
        exponents = (exponents - exponents[:, :1]).clamp_min(-LARGEST_EXPONENT)
    weights = torch.exp(exponents)
    votes = weights.new_zeros(len(labels), num_classes)
    for j in range(k):  # one addend per row and call: the order of sums is fixed on a GPU too
        votes.scatter_add_(1, labels[:, j : j + 1], weights[:, j : j + 1])
    return votes.masked_fill(votes == 0, -torch.inf)
