"""Momentum encoder whose EMA weights are sharded in float32, replicated in the compute dtype."""

import json
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cmtmae_scale.method.momentum import update_momentum
from cmtmae_scale.runtime.collectives import gather_texts, ranks


class Shard(NamedTuple):
    """This rank's range of one flattened parameter."""

    name: str
    offset: int
    length: int


class GatheredMomentum:
    """EMA weights whose float32 values are sharded over the ranks.

    Each rank updates its shards without communication. One all-gather in the compute dtype then
    renews the whole encoder on every rank.

    Args:
        module: the momentum encoder, on its device, in float32.
        shards: this rank's shard of every updated parameter.
        dtype: compute dtype of the forward.
        ema_device: device of the float32 shards: that of the student's float32 weights.
        group: the ranks that share one copy of the shards; ``None``: all.
    """

    def __init__(
        self,
        module: nn.Module,
        shards: list[Shard],
        dtype: torch.dtype,
        ema_device: torch.device,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        weights = dict(module.named_parameters())
        values = [
            weights[shard.name].detach().reshape(-1).narrow(0, shard.offset, shard.length)
            for shard in shards
        ]
        self.ema = torch.cat(values).to(ema_device, torch.float32)
        self.views = list(self.ema.split([shard.length for shard in shards]))
        self.module = module.to(dtype)
        self.group = group
        texts = gather_texts(json.dumps(shards))
        members = range(ranks()) if group is None else dist.get_process_group_ranks(group)
        everyone = [[Shard(*one) for one in json.loads(texts[rank])] for rank in members]
        self.longest = max(sum(shard.length for shard in theirs) for theirs in everyone)
        # Lengths of a rank's shards, then the padding of its row up to the longest row.
        self.lengths: list[list[int]] = []
        self.targets: list[list[Tensor]] = []
        for theirs in everyone:
            lengths = [shard.length for shard in theirs]
            self.lengths.append([*lengths, self.longest - sum(lengths)])
            self.targets.append(
                [
                    weights[shard.name].detach().view(-1).narrow(0, shard.offset, shard.length)
                    for shard in theirs
                ]
            )
        self.device = next(module.parameters()).device
        self.dtype = dtype

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
        if len(self.targets) == 1:
            torch._foreach_copy_(self.targets[0], self.views)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
            return
        own = torch.zeros(self.longest, dtype=self.dtype, device=self.device)
        own[: self.ema.numel()].copy_(self.ema)
        rows = own.new_empty(len(self.targets) * self.longest)
        dist.all_gather_into_tensor(rows, own, self.group)
        for row, lengths, targets in zip(
            rows.split(self.longest), self.lengths, self.targets, strict=True
        ):
            if targets:
                torch._foreach_copy_(targets, list(row.split(lengths)[:-1]))  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.module(images.to(self.dtype))
