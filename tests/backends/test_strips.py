"""Few copies move what all ranks hold of a parameter, at every stage and number of ranks."""

import numpy as np
import pytest
import torch
from torch import nn

from cmtmae_scale.backends import gathered_momentum
from cmtmae_scale.backends.gathered_momentum import GatheredMomentum, Shard, join_ranges
from tests.processes import run_ranks

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


def renewed(few_ranks: int) -> list[float]:
    """Weights that three ranks have after an update; each holds a third of each, the last less."""
    rank = torch.distributed.get_rank()
    gathered_momentum.FEW_RANKS = few_ranks
    module = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5))
    shards: list[Shard] = []
    values: list[torch.Tensor] = []
    for name, one in module.named_parameters():
        part = -(-one.numel() // 3)
        offset = min(rank * part, one.numel())
        length = min(part, one.numel() - offset)
        shards.append(Shard(name, offset, length))
        values.append(torch.arange(offset, offset + length, dtype=torch.float32))
    momentum = GatheredMomentum(module, shards, torch.device("cpu"))
    momentum.update(values, 0.0)
    return [value for one in module.parameters() for value in one.flatten().tolist()]


@pytest.mark.gloo
@pytest.mark.parametrize("few_ranks", [1, 16])
def test_all_ranks_have_all_weights_after_an_update(few_ranks: int) -> None:
    expected = [float(k) for size in (12, 3, 15, 5) for k in range(size)]
    assert run_ranks(3, renewed, few_ranks) == [expected] * 3
