"""Gathers and sums over ranks, on the tensors' own device."""

import torch
import torch.distributed as dist
from torch import Tensor

from cmtmae_scale.runtime.collectives import ranks


def gather_from_ranks(mine: Tensor) -> Tensor:
    """Concatenate every rank's rows in the order of ranks; counts may differ. A collective.

    Args:
        mine: ``[n, ...]``, of one dtype and width on all ranks.
    """
    if ranks() == 1:
        return mine
    count = torch.tensor([len(mine)], device=mine.device)
    counts = [torch.zeros_like(count) for _ in range(ranks())]
    dist.all_gather(counts, count)
    lengths = [int(length) for length in counts]
    padded = mine.new_zeros(max(lengths), *mine.shape[1:])
    padded[: len(mine)] = mine
    gathered = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(gathered, padded)
    return torch.cat([rows[:length] for rows, length in zip(gathered, lengths, strict=True)])


def sum_over_ranks(mine: Tensor) -> Tensor:
    """Sum tensors of one shape over ranks, in place. A collective."""
    if ranks() > 1:
        dist.all_reduce(mine)
    return mine
