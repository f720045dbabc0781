"""Rows and sums of all ranks, on the device where they are."""

import torch
import torch.distributed as dist
from torch import Tensor

from cmtmae_scale.runtime.collectives import ranks


def rows_of_all(mine: Tensor) -> Tensor:
    """Every rank's rows, in the order of ranks; their numbers may differ. A collective.

    Args:
        mine: ``[n, ...]``, of one type and width on all ranks.
    """
    if ranks() == 1:
        return mine
    count = torch.tensor([len(mine)], device=mine.device)
    counts = [torch.zeros_like(count) for _ in range(ranks())]
    dist.all_gather(counts, count)
    lengths = [int(one) for one in counts]
    padded = mine.new_zeros(max(lengths), *mine.shape[1:])
    padded[: len(mine)] = mine
    everyone = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(everyone, padded)
    return torch.cat([rows[:length] for rows, length in zip(everyone, lengths, strict=True)])


def sum_over_ranks(mine: Tensor) -> Tensor:
    """Sum of every rank's tensor of one shape, in place. A collective."""
    if ranks() > 1:
        dist.all_reduce(mine)
    return mine
