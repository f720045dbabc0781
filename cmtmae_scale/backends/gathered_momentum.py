"""Momentum encoder whose EMA weights are sharded in float32, replicated in the compute dtype."""

from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from cmtmae_scale.method.momentum import update_momentum
from cmtmae_scale.runtime.collectives import gather_bytes


class Shard(NamedTuple):
    """This rank's range of one flattened parameter."""

    name: str
    offset: int
    length: int


class Strip(NamedTuple):
    """A range of a flattened parameter, within the rows that successive ranks send."""

    rank: int
    """The first rank."""
    ranks: int
    """Number of ranks."""
    start: int
    """Place within the row of each rank."""
    offset: int
    """First value within the parameter."""
    length: int
    """Values of each rank."""


FEW_RANKS = 16
"""Maximum number of ranks whose ranges of one parameter are copied one by one, in a fused copy."""


class GatheredMomentum:
    """EMA weights whose float32 values are sharded over the ranks.

    Each rank updates its shards without communication. One all-gather in the compute dtype then
    renews the whole encoder on every rank.

    Args:
        module: the momentum encoder, on its device, in the compute dtype; ``renew`` gives it its
            first weights, once ``views`` have their values.
        shards: this rank's shard of every updated parameter.
        ema_device: device of the float32 shards: that of the student's float32 weights.
        group: the ranks that share one copy of the shards; ``None``: all.
    """

    def __init__(
        self,
        module: nn.Module,
        shards: list[Shard],
        ema_device: torch.device,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        weights = dict(module.named_parameters())
        lengths = [shard.length for shard in shards]
        self.ema = torch.zeros(sum(lengths), device=ema_device)
        self.views = list(self.ema.split(lengths))
        self.module = module
        self.group = group
        table = gather_ranges(shards, group)
        self.size = len(table)
        self.longest = int(table[:, :, 1].sum(axis=1).max())
        self.strided: list[tuple[Tensor, Strip]] = []
        pieces: list[tuple[int, Tensor]] = []  # place in the gathered rows, target
        for number, shard in enumerate(shards):
            weight = weights[shard.name].detach().view(-1)
            for strip in join_ranges(table, number):
                rank, count, start, offset, length = strip
                target = weight[offset : offset + count * length].view(count, length)
                if count > FEW_RANKS:
                    self.strided.append((target, strip))
                    continue
                begins = range(rank * self.longest + start, self.size * self.longest, self.longest)
                pieces += zip(begins, target.unbind(), strict=False)
        pieces.sort(key=lambda piece: piece[0])
        self.targets = [target for _, target in pieces]
        self.cuts = cut_rows([(place, target.numel()) for place, target in pieces])
        like = next(module.parameters())
        self.device, self.dtype = like.device, like.dtype

    def update(self, weights: list[Tensor], momentum: float) -> None:
        """Update this rank's shards and renew the whole encoder; a collective.

        Args:
            weights: the student's float32 values of ``shards``, in their order.
            momentum: m in ``m * old + (1 - m) * new``.
        """
        update_momentum(self.views, weights, momentum)
        self.renew()

    @torch.no_grad()
    def renew(self) -> None:
        """Copy all ranks' shards into the whole encoder; a collective."""
        if self.size == 1:
            torch._foreach_copy_(self.targets, self.views)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
            return
        rows, _ = self.gather_rows()
        self.fill(rows)

    def gather_rows(self, waits: bool = True) -> tuple[Tensor, dist.Work | None]:
        """Gather all ranks' shards in the compute dtype, ``[ranks, longest]``; a collective.

        Args:
            waits: ``False`` returns at once, with the work to wait for before rows are read.
        """
        own = torch.zeros(self.longest, dtype=self.dtype, device=self.device)
        own[: self.ema.numel()].copy_(self.ema)
        rows = own.new_empty(self.size, self.longest)
        work = dist.all_gather_into_tensor(rows.view(-1), own, self.group, async_op=not waits)
        return rows, work

    @torch.no_grad()
    def fill(self, rows: Tensor) -> None:
        """Copy gathered shards into the parameters."""
        if self.targets:
            flat = rows.view(-1)[: sum(self.cuts)]
            torch._foreach_copy_(self.targets, flat.split(self.cuts)[1::2])  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
        for target, (rank, count, start, _, length) in self.strided:
            target.copy_(rows[rank : rank + count, start : start + length])

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.module(images.to(self.dtype))


def cut_rows(pieces: list[tuple[int, int]]) -> list[int]:
    """Return the lengths of pieces and of the gaps before them: gap, piece, gap, piece, ...

    Args:
        pieces: place and length of each, sorted by place.
    """
    cuts: list[int] = []
    end = 0
    for place, length in pieces:
        cuts += [place - end, length]
        end = place + length
    return cuts


def gather_ranges(shards: list[Shard], group: dist.ProcessGroup | None) -> NDArray[np.int64]:
    """Gather offsets and lengths of all ranks of a group, ``[ranks, shards, 2]``; a collective.

    Args:
        shards: this rank's shards; the parameters and their order are the same on every rank.
        group: the ranks; ``None``: all.
    """
    mine = np.array([shard[1:] for shard in shards], dtype=np.int64)
    everyone = gather_bytes(mine.tobytes(), group)
    return np.stack([np.frombuffer(one, np.int64).reshape(-1, 2) for one in everyone])


def join_ranges(table: NDArray[np.int64], number: int) -> list[Strip]:
    """Join one parameter's ranges on successive ranks where one strided copy moves them all.

    The number of copies would otherwise grow with the number of ranks: at stage 3 each rank holds
    a range of every parameter.

    Args:
        table: from ``gather_ranges``.
        number: the parameter.
    """
    starts = table[:, :number, 1].sum(axis=1)
    offsets, lengths = table[:, number].T
    strips: list[Strip] = []
    for rank in np.flatnonzero(lengths).tolist():
        one = Strip(rank, 1, int(starts[rank]), int(offsets[rank]), int(lengths[rank]))
        last = strips[-1] if strips else None
        if last is not None and one == Strip(
            last.rank + last.ranks,
            1,
            last.start,
            last.offset + last.ranks * last.length,
            last.length,
        ):
            strips[-1] = last._replace(ranks=last.ranks + 1)
        else:
            strips.append(one)
    return strips
