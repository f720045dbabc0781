"""Momentum encoder whose EMA weights stay sharded: its forward gathers them block by block."""

from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cmtmae_scale.backends.gathered_momentum import GatheredMomentum, Shard
from cmtmae_scale.backends.initial import materialise
from cmtmae_scale.method.momentum import update_momentum
from cmtmae_scale.method.student import MomentumEncoder


class BlockwiseMomentum:
    """EMA weights whose float32 values are sharded over all ranks, without a whole copy.

    A forward gathers, in the compute dtype, the parameters outside blocks, then each block, and
    releases them after their use. The next block is gathered while a block computes.

    Args:
        encoder: the momentum encoder on the meta device, in the compute dtype; here it is
            allocated. Parameters that are not in ``shards`` stay whole.
        shards: this rank's shard of every updated parameter, in the order of the encoder's.
        device: where the forward runs.
        ema_device: device of the float32 shards: that of the student's float32 weights.
    """

    def __init__(
        self,
        encoder: MomentumEncoder,
        shards: list[Shard],
        device: torch.device,
        ema_device: torch.device,
    ) -> None:
        self.module = encoder
        self.num_needed_blocks = encoder.num_needed_blocks
        blocks = encoder.transformer_blocks()
        numbers = {id(one): n for n, block in enumerate(blocks, 1) for one in block.parameters()}
        unit_of = {name: numbers.get(id(one), 0) for name, one in encoder.named_parameters()}
        within = {id(module) for block in blocks for module in block.modules()}
        for module in encoder.modules():
            if id(module) not in within:
                materialise(module, device, recurse=False)
        self.parts: list[GatheredMomentum] = []
        """First for the parameters outside blocks, then for each block."""
        self.weights: list[list[nn.Parameter]] = []
        """Parameters that each part fills."""
        views: dict[str, Tensor] = {}
        for number, unit in enumerate([encoder, *blocks]):
            if number:
                materialise(unit, device)
            own = [shard for shard in shards if unit_of[shard.name] == number]
            part = GatheredMomentum(encoder, own, ema_device)
            views |= {shard.name: view for shard, view in zip(own, part.views, strict=True)}
            self.parts.append(part)
            self.weights.append([encoder.get_parameter(shard.name) for shard in own])
            self.release(number)
            unit.register_forward_pre_hook(partial(self.fetch, number))
            unit.register_forward_hook(partial(self.release, number))
        self.views = [views[shard.name] for shard in shards]
        """This rank's float32 EMA weights."""
        self.ahead: dict[int, tuple[Tensor, dist.Work | None]] = {}
        """Rows of a part that are being gathered."""

    def update(self, weights: list[Tensor], momentum: float) -> None:
        """Update this rank's shards; no communication. Arguments as in ``GatheredMomentum``."""
        update_momentum(self.views, weights, momentum)

    def renew(self) -> None:
        """Do nothing: every forward gathers the weights again."""

    def fetch(self, number: int, *_: Any) -> None:
        """Allocate and fill the parameters of a part, and begin to gather the next; a collective.

        Args:
            number: index of the part; ``_``: arguments that torch passes to hooks.
        """
        rows, work = self.ahead.pop(number, None) or self.parts[number].gather_rows(waits=False)
        if number < self.num_needed_blocks:
            self.ahead[number + 1] = self.parts[number + 1].gather_rows(waits=False)
        cast(dist.Work, work).wait()
        for one in self.weights[number]:
            one.untyped_storage().resize_(one.numel() * one.itemsize)
        self.parts[number].fill(rows)

    def release(self, number: int, *_: Any) -> None:
        """Release the memory of a part's parameters, which keep their shapes."""
        for one in self.weights[number]:
            one.untyped_storage().resize_(0)

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor | None, Tensor | None]:
        return self.module(images.to(self.parts[0].dtype))
