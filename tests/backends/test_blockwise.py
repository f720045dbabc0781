"""A momentum encoder that is gathered block by block computes what a whole one does."""

import pytest
import torch
import torch.distributed as dist

from cmtmae_scale.backends.blockwise_momentum import BlockwiseMomentum
from cmtmae_scale.backends.gathered_momentum import Shard
from tests.backends import backend_case as case
from tests.processes import run_ranks


def compare_with_whole(layer: int) -> tuple[bool, list[int], int]:
    """Forward of both: equal bits, bytes that are kept afterwards, blocks gathered in vain."""
    config = case.make_config(attention__layers=[layer])
    config.target.student.feature, config.target.student.layers = "block", [layer]
    (_, whole), (_, encoder) = case.make_models(config), case.make_models(config)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    shards: list[Shard] = []
    values: list[torch.Tensor] = []
    for name, one in whole.named_parameters():
        part = -(-one.numel() // ranks)
        own = one.detach().flatten()[rank * part : (rank + 1) * part]
        shards.append(Shard(name, min(rank * part, one.numel()), own.numel()))
        values.append(own)
    cpu = torch.device("cpu")
    momentum = BlockwiseMomentum(encoder.to("meta"), shards, cpu, cpu)
    momentum.update(values, 0.0)
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    momentum.forward(images)
    pairs = zip(momentum.forward(images), whole(images), strict=True)
    equal = all(torch.equal(found, expected) for found, expected in pairs)
    kept = [one.untyped_storage().nbytes() for one in momentum.module.parameters()]
    return equal, kept, len(momentum.ahead)


@pytest.mark.gloo
@pytest.mark.parametrize("layer", [0, -1])
def test_a_forward_by_blocks_has_the_bits_of_a_whole_one_and_keeps_nothing(layer: int) -> None:
    for equal, kept, ahead in run_ranks(2, compare_with_whole, layer):
        assert equal and not any(kept) and not ahead
