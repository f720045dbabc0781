"""Neighbours and votes: scikit-learn's, ties in order, the same at any number of ranks."""

from typing import Any

import numpy as np
import pytest
import torch

from cmtmae_scale.evaluation import knn
from cmtmae_scale.evaluation.knn import count_votes, find_neighbours, knn_scores, stable_topk
from tests.evaluation.evaluation_case import CLASSES, COLUMN, clusters, table_of
from tests.processes import run_ranks

TRAIN, TEST = clusters(150, 0), clusters(60, 1)


def predictions(k: int, temperature: float, block: int = 8192) -> np.ndarray:
    before, knn.ROWS = knn.ROWS, block
    try:
        near = find_neighbours(torch.tensor(TEST[0]), table_of(*TRAIN), COLUMN, 20)
    finally:
        knn.ROWS = before
    return count_votes(near, k, CLASSES, temperature).argmax(1).numpy()


@pytest.mark.parametrize("k", [1, 10, 20])
@pytest.mark.parametrize("temperature", [0.07, 0.0])
def test_predictions_are_scikit_learns(k: int, temperature: float) -> None:
    neighbors = pytest.importorskip("sklearn.neighbors", reason="scikit-learn is not installed")

    def weights(distances: np.ndarray) -> np.ndarray:
        return np.exp((1 - distances) / temperature)

    theirs = neighbors.KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=weights if temperature else "uniform"
    )
    theirs.fit(TRAIN[0].astype(np.float64), TRAIN[1])
    expected = theirs.predict(TEST[0].astype(np.float64))
    assert 0.4 < (expected == TEST[1]).mean() < 0.95
    for block in (8192, 16):
        assert np.array_equal(predictions(k, temperature, block), expected)
    scores = dict(knn_scores(table_of(*TRAIN), table_of(*TEST), COLUMN, [k], temperature))
    assert scores[k].correct == (expected == TEST[1]).sum()
    assert scores[k].total == 60


def test_of_equal_values_the_first_are_taken() -> None:
    values = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, 3.0, 2.0], [0.0, 1, 2, 3, 4, 5, 6]])
    largest, places = stable_topk(values, 4)
    assert [sorted(row) for row in places.tolist()] == [[1, 2, 3, 5], [3, 4, 5, 6]]
    assert largest.tolist() == [[3, 3, 2, 2], [6, 5, 4, 3]]
    assert stable_topk(values, 9)[1][0].tolist() == [1, 5, 2, 3, 4, 6, 0]


def tied(block: int) -> Any:
    """Sixty images, of which five are distinct, in mixed order."""
    rows = clusters(5, 3)[0][np.arange(60) * 7 % 5]
    train = table_of(rows * np.linspace(1, 2, 60, dtype=np.float32)[:, None], np.arange(60) % 7)
    before, knn.ROWS = knn.ROWS, block
    try:
        near = find_neighbours(torch.tensor(rows[:5]), train, COLUMN, 9)
    finally:
        knn.ROWS = before
    return near.positions.numpy(), near.similarity.numpy()


@pytest.mark.gloo
def test_equally_near_images_come_in_order_at_any_number_of_ranks() -> None:
    expected, similarity = tied(8192)
    for query in range(5):
        alike = [p for p in range(60) if p * 7 % 5 == query * 7 % 5]
        assert expected[query].tolist() == alike[:9]
    for size, block in ((1, 7), (2, 8192), (3, 7)):
        for positions, values in run_ranks(size, tied, block):
            assert np.array_equal(positions, expected)
            assert np.array_equal(values, similarity)


def scores_of_ranks(temperature: float) -> Any:
    found = knn_scores(table_of(*TRAIN), table_of(*TEST), COLUMN, temperature=temperature)
    return [(k, tuple(score)) for k, score in found]


@pytest.mark.gloo
def test_scores_do_not_depend_on_the_number_of_ranks() -> None:
    expected = scores_of_ranks(0.07)
    for size in (2, 3):
        assert run_ranks(size, scores_of_ranks, 0.07) == [expected] * size


def test_a_class_without_a_vote_is_no_hit() -> None:
    train = table_of(TRAIN[0][:7], np.zeros(7, dtype=np.int64))
    test = table_of(TEST[0], TEST[1])
    (_, score), *_ = knn_scores(train, test, COLUMN, [3])
    zeros = int((TEST[1] == 0).sum())
    assert (score.correct, score.correct_top5) == (zeros, zeros)


def test_k_falls_to_the_number_of_images_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    few, test = table_of(TRAIN[0][:13], TRAIN[1][:13]), table_of(*TEST)
    scores = dict(knn_scores(few, test, COLUMN))
    assert caplog.messages == [
        "k-NN with k=20: there are only 13 training images that can be decoded; k=13 is used"
    ]
    assert scores == {10: scores[10], 20: dict(knn_scores(few, test, COLUMN, [13]))[13]}
