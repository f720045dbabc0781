"""Few copies move what all ranks hold of a parameter, at every stage and number of ranks."""

import numpy as np
import pytest

from cmtmae_scale.backends.gathered_momentum import join_ranges

SIZES = (1, 64, 64 * 48, 48, 3 * 48 * 48, 1000)


def layout_of_stage3(ranks: int) -> np.ndarray:
    """Each parameter in equal shards, the last ones cut: ``[ranks, parameters, 2]``."""
    table = np.zeros((ranks, len(SIZES), 2), np.int64)
    for number, size in enumerate(SIZES):
        part = -(-size // ranks)
        offsets = np.minimum(np.arange(ranks) * part, size)
        table[:, number, 0] = offsets
        table[:, number, 1] = np.minimum(part, size - offsets)
    return table


def layout_of_stage1(ranks: int) -> np.ndarray:
    """One flat tensor in equal shards."""
    table = np.zeros((ranks, len(SIZES), 2), np.int64)
    part, begin = -(-sum(SIZES) // ranks), 0
    for number, size in enumerate(SIZES):
        low = np.clip(np.arange(ranks) * part - begin, 0, size)
        high = np.clip((np.arange(ranks) + 1) * part - begin, 0, size)
        table[:, number, 0], table[:, number, 1] = low * (high > low), high - low
        begin += size
    return table


@pytest.mark.parametrize("layout", [layout_of_stage1, layout_of_stage3])
@pytest.mark.parametrize("ranks", [1, 2, 8, 512])
def test_strips_move_every_value_with_few_copies(layout, ranks: int) -> None:  # pyright: ignore
    table = layout(ranks)
    generator = np.random.default_rng(0)
    whole = [generator.random(size) for size in SIZES]
    rows = np.full((ranks, table[:, :, 1].sum(axis=1).max()), np.nan)
    for rank in range(ranks):
        held = [whole[n][o : o + k] for n, (o, k) in enumerate(table[rank])]
        rows[rank, : sum(map(len, held))] = np.concatenate(held)
    for number, values in enumerate(whole):
        found, strips = np.full(len(values), np.nan), join_ranges(table, number)
        assert len(strips) <= 6
        for first, count, start, offset, length in strips:
            target = found[offset : offset + count * length].reshape(count, length)
            target[:] = rows[first : first + count, start : start + length]
        assert np.array_equal(found, values)
