import numpy as np
import pytest

from dataloading.order import BLOCK, WINDOW, sample_ids, sequential_ids, window_ids

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


def slow_permute(value, n, *name):
    """Plain Python integers, one value at a time."""
    half = 1
    while 4**half < n:
        half += 1
    low = 2**half - 1
    while True:
        left, right = value >> half, value & low
        for r in range(6):
            left, right = right, left ^ (slow_mix(right ^ slow_fold(*name, r)) & low)
        value = (left << half) | right
        if value < n:
            return value


def slow_sample(n, seed, position):
    epoch, value = divmod(position, n)
    return slow_permute(value, n, 0xFE15, seed, epoch), epoch


def slow_window(n, seed, position):
    """Windows of 65,536 draws, each of 1,024 blocks of 64; the last window takes the rest."""
    epoch, offset = divmod(position, n)
    windows = n // 65536
    window = min(offset // 65536, max(windows - 1, 0))
    size = 65536 if window < windows - 1 else n - 65536 * window
    inside = slow_permute(offset - 65536 * window, size, 0x51DE, seed, epoch, window)
    block, within = divmod(65536 * window + inside, 64)
    if block < n // 64:
        block = slow_permute(block, n // 64, 0xB10C, seed, epoch)
    return (slow_fold(0x57A7, seed, epoch) + 64 * block + within) % n, epoch


@pytest.mark.parametrize("n", [1, 2, 5, 1000])
def test_every_sample_occurs_once_an_epoch(n):
    for epoch in (0, 1, 2, 10**9):
        ids, epochs = sample_ids(n, 7, epoch * n + np.arange(n))
        assert ids.dtype == epochs.dtype == np.int64
        assert sorted(ids.tolist()) == list(range(n))
        assert (epochs == epoch).all()


@pytest.mark.parametrize("n", [1, 17, 65537, 1281167])
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


@pytest.mark.parametrize("order", [sample_ids, window_ids])
def test_wrong_arguments_are_refused(order):
    with pytest.raises(ValueError, match="n is 0"):
        order(0, 0, [0])
    with pytest.raises(ValueError, match="position -1 is negative"):
        order(3, 0, [2, -1])


SIZES = [1, 2, 5, 63, 64, 65, 1000, 65535, 65536, 65537, 131071, 131072, 200001]


@pytest.mark.parametrize("n", SIZES)
def test_windows_give_every_sample_once_an_epoch(n):
    for epoch in (0, 1, 10**9):
        ids, epochs = window_ids(n, 7, epoch * n + np.arange(n))
        assert ids.dtype == epochs.dtype == np.int64
        assert (np.bincount(ids, minlength=n) == 1).all() and len(ids) == n
        assert (epochs == epoch).all()


@pytest.mark.parametrize("n", [1, 65537, 131075, 10**9 + 7])
def test_windows_are_those_of_plain_integers(n):
    last = n - n % 65536
    positions = [0, 1, n // 2, max(last - 1, 0), last, n - 1, n, 3 * n + n // 3, 10**12]
    ids, epochs = window_ids(n, -5, positions)
    assert list(zip(ids.tolist(), epochs.tolist(), strict=True)) == [
        slow_window(n, -5, position) for position in positions
    ]


def test_windows_are_a_function_of_the_position_alone():
    n, start = 150_000, 10**12 + 150_000 - 500  # over an epoch's edge and into a window
    whole, epochs = window_ids(n, 1, start + np.arange(1000))
    order = np.random.default_rng(0).permutation(1000)
    pieces = np.concatenate([window_ids(n, 1, start + part)[0] for part in np.split(order, 8)])
    assert np.array_equal(pieces, whole[order])
    assert np.array_equal(epochs, (start + np.arange(1000)) // n)
    shaped, _ = window_ids(n, 1, start + np.arange(1000).reshape(8, 125))
    assert np.array_equal(shaped, whole.reshape(8, 125))


def pieces_read(ids, n):
    """Number of stretches of neighbouring samples that are read."""
    held = np.zeros(n, dtype=bool)
    held[ids] = True
    return int((held & ~np.roll(held, 1)).sum())


@pytest.mark.parametrize("epoch", [0, 3])
def test_a_window_reads_few_blocks_and_reads_them_whole(epoch):
    n = 5 * WINDOW + 12_345
    for window in range(5):
        size = WINDOW if window < 4 else WINDOW + 12_345
        ids, _ = window_ids(n, 2, epoch * n + window * WINDOW + np.arange(size))
        blocks = -(-size // BLOCK)
        assert blocks / 2 < pieces_read(ids, n) <= blocks  # neighbouring blocks may join
    scattered, _ = sample_ids(n, 2, epoch * n + np.arange(WINDOW))
    assert pieces_read(scattered, n) > 40 * WINDOW / BLOCK


def test_windows_mix_blocks_and_their_samples():
    n = 4 * WINDOW
    ids, _ = window_ids(n, 0, np.arange(n))
    for at in range(0, n, WINDOW):
        inside = ids[at : at + WINDOW]
        assert abs(np.corrcoef(np.arange(WINDOW), inside)[0, 1]) < 5 / WINDOW**0.5
        batch = inside[:1024] // BLOCK
        # A draw of 1,024 among 1,024 blocks meets 1024 * (1 - 1/e) = 647 of them, deviation 10;
        # a block that straddles two multiples of 64 counts as two here.
        assert 550 < len(np.unique(batch)) <= 1024


def test_windows_differ_between_epochs_and_seeds():
    n = 2 * WINDOW + 777
    first = window_ids(n, 0, np.arange(n))[0]
    second = window_ids(n, 0, n + np.arange(n))[0]
    other = window_ids(n, 1, np.arange(n))[0]
    for a, b in ((first, second), (first, other)):
        assert (a == b).sum() < 20  # 1 is expected
        together = np.intersect1d(a[:WINDOW], b[:WINDOW]).size / WINDOW
        assert together == pytest.approx(WINDOW / n, abs=0.1)  # other blocks in the window


def test_every_sample_can_come_last():
    """What fills no block ends the epoch: it must not always be the same samples."""
    n = 65 * 3
    last = {int(window_ids(n, 0, [epoch * n + n - 1])[0][0]) for epoch in range(40)}
    assert len(last) > 30
