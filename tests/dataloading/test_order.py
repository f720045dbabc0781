import numpy as np
import pytest

from dataloading.order import sample_ids, sequential_ids

M64 = (1 << 64) - 1


def slow_mix(x):
    x = (x + 0x9E3779B97F4A7C15) & M64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & M64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & M64
    return x ^ (x >> 31)


def slow_fold(*parts):
    state = 0x243F6A8885A308D3
    for part in parts:
        state = slow_mix(state ^ slow_mix(part & M64))
    return state


def slow_sample(n, seed, position):
    """Plain Python integers, one position at a time."""
    epoch, value = divmod(position, n)
    half = 1
    while 4**half < n:
        half += 1
    low = 2**half - 1
    while True:
        left, right = value >> half, value & low
        for r in range(6):
            left, right = right, left ^ (slow_mix(right ^ slow_fold(0xFE15, seed, epoch, r)) & low)
        value = (left << half) | right
        if value < n:
            return value, epoch


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 17, 1000])
def test_every_sample_occurs_once_an_epoch(n):
    for epoch in (0, 1, 2, 10**9):
        ids, epochs = sample_ids(n, 7, epoch * n + np.arange(n))
        assert ids.dtype == epochs.dtype == np.int64
        assert sorted(ids.tolist()) == list(range(n))
        assert (epochs == epoch).all()


@pytest.mark.parametrize("n", [1, 3, 17, 65537, 1281167])
def test_order_is_the_one_of_plain_integers(n):
    positions = [0, 1, n - 1, n, 3 * n + n // 2, 10**12]
    ids, epochs = sample_ids(n, -5, positions)
    assert list(zip(ids.tolist(), epochs.tolist(), strict=True)) == [
        slow_sample(n, -5, p) for p in positions
    ]


def test_batch_may_cross_epoch_edges_anywhere():
    whole, epochs = sample_ids(5, 1, np.arange(40))
    pieces = [sample_ids(5, 1, np.arange(at, min(at + 7, 40))) for at in range(0, 40, 7)]
    assert np.array_equal(np.concatenate([ids for ids, _ in pieces]), whole)
    assert np.array_equal(epochs, np.arange(40) // 5)
    shaped, _ = sample_ids(5, 1, np.arange(40).reshape(8, 5))
    assert np.array_equal(shaped, whole.reshape(8, 5))


def test_epochs_and_seeds_have_orders_of_their_own():
    n = 1000
    first = sample_ids(n, 0, np.arange(n))[0]
    second = sample_ids(n, 0, n + np.arange(n))[0]
    other = sample_ids(n, 1, np.arange(n))[0]
    for a, b in ((first, second), (first, other), (first, np.arange(n))):
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.13  # four deviations of a true shuffle
        assert (a == b).sum() < 10


def test_order_spreads_evenly():
    """Chi-square of position and value cells: 225 degrees of freedom, deviation 21."""
    n, cells = 20011, 16
    ids, _ = sample_ids(n, 3, np.arange(n))
    table = np.histogram2d(np.arange(n), ids, bins=cells)[0]
    expected = n / cells**2
    assert ((table - expected) ** 2 / expected).sum() < 225 + 5 * 21


def test_sequential_order_is_the_index_order():
    ids, epochs = sequential_ids(3, [0, 1, 2, 3, 7])
    assert ids.tolist() == [0, 1, 2, 0, 1]
    assert epochs.tolist() == [0, 0, 0, 1, 2]


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="n is 0"):
        sample_ids(0, 0, [0])
    with pytest.raises(ValueError, match="position -1 is negative"):
        sample_ids(3, 0, [2, -1])
