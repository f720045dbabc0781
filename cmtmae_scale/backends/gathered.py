"""A momentum student that every rank holds whole in the compute type, and in parts in float32."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cmtmae_scale.method.momentum import update_momentum


class Part(NamedTuple):
    """A range of one flattened parameter."""

    name: str
    offset: int
    length: int


class GatheredAverage:
    """Moving average of weights whose float32 values are spread over the ranks.

    Each rank averages the parts that it holds, without communication; then all ranks exchange the
    parts in the compute type, one collective, and each has the whole again.

    Args:
        module: the momentum student, on its device, in float32.
        parts: this rank's part of every averaged parameter.
        dtype: compute type of the forward.
        average_device: where the float32 parts are kept: where the weights are.
    """

    def __init__(
        self,
        module: nn.Module,
        parts: list[Part],
        dtype: torch.dtype,
        average_device: torch.device,
    ) -> None:
        self.parts = parts
        weights = dict(module.named_parameters())
        values = [
            weights[part.name].detach().reshape(-1).narrow(0, part.offset, part.length)
            for part in parts
        ]
        self.average = torch.cat(values).to(average_device, torch.float32)
        self.views = list(self.average.split([part.length for part in parts]))
        self.module = module.to(dtype)
        everyone: list[list[Part]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, parts)
        self.longest = max(sum(part.length for part in theirs) for theirs in everyone)
        # Lengths of a rank's parts, closed by what fills its row up to the longest.
        self.lengths: list[list[int]] = []
        self.targets: list[list[Tensor]] = []
        for theirs in everyone:
            lengths = [part.length for part in theirs]
            self.lengths.append([*lengths, self.longest - sum(lengths)])
            self.targets.append(
                [
                    weights[part.name].detach().view(-1).narrow(0, part.offset, part.length)
                    for part in theirs
                ]
            )
        self.device = next(module.parameters()).device
        self.dtype = dtype

    def update(self, weights: list[Tensor], momentum: float) -> None:
        """Average this rank's parts and renew the whole.

        Args:
            weights: float32 values of ``parts``, in their order.
            momentum: m in ``m * old + (1 - m) * new``.
        """
        update_momentum(self.views, weights, momentum)
        self.renew()

    @torch.no_grad()
    def renew(self) -> None:
        """Bring the whole in line with everyone's parts. Collective."""
        own = torch.zeros(self.longest, dtype=self.dtype, device=self.device)
        own[: self.average.numel()].copy_(self.average)
        rows = own.new_empty(dist.get_world_size() * self.longest)
        dist.all_gather_into_tensor(rows, own)
        for row, lengths, targets in zip(
            rows.split(self.longest), self.lengths, self.targets, strict=True
        ):
            if targets:
                torch._foreach_copy_(targets, list(row.split(lengths)[:-1]))  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features and attention of the whole student."""
        return self.module(images.to(self.dtype))
