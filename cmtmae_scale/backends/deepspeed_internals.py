"""Locates a parameter's float32 values in DeepSpeed's ZeRO optimizers.

ZeRO keeps them in flat tensors, one or more per parameter group. At every stage a rank's shard of a
parameter is a range of one flat tensor. All names read here are private to DeepSpeed 0.19; the
parity and checkpoint tests fail when their meaning changes.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn


class FlatRange(NamedTuple):
    """This rank's shard of one parameter, as a range of a flat tensor."""

    offset: int
    """First value within the flattened parameter."""
    length: int
    """Number of values; 0 if this rank holds none."""
    flat: Tensor
    """The flat float32 tensor that holds the values."""
    start: int
    """First value within ``flat``."""

    def view(self, flat: Tensor) -> Tensor:
        """Return the range of ``flat`` or of a moment of the same layout, as a 1-D live view."""
        return flat.detach().narrow(0, self.start, self.length)


def flat_tensors(optimizer: Any, stage: int) -> list[Tensor]:
    """Return the float32 tensors that AdamW updates on this rank."""
    if stage == 3:
        return optimizer.fp32_partitioned_groups_flat
    if hasattr(optimizer, "fp32_groups_flat_partition"):  # stage 1 with bf16
        return optimizer.fp32_groups_flat_partition
    return optimizer.single_partition_of_fp32_groups


def locate_shards(
    optimizer: Any, stage: int, parameters: Iterable[tuple[str, nn.Parameter]], rank: int
) -> dict[str, FlatRange]:
    """Locate this rank's shard of every trained parameter."""
    flats = flat_tensors(optimizer, stage)
    if stage == 3:
        names = {id(parameter): name for name, parameter in parameters}
        return {
            names[id(parameter)]: shard
            for group, flat in zip(optimizer.fp16_groups, flats, strict=True)
            for parameter, shard in locate_stage3(group, flat, rank)
        }
    return {name: locate_stage12(parameter, flats) for name, parameter in parameters}


def locate_stage3(group: list[Any], flat: Tensor, rank: int) -> Iterator[tuple[Any, FlatRange]]:
    """Locate shards at stage 3: every parameter is split into equal shards, the last padded."""
    start = 0
    for parameter in group:
        size = parameter.partition_numel()
        offset = min(rank * size, parameter.ds_numel)
        yield parameter, FlatRange(offset, min(size, parameter.ds_numel - offset), flat, start)
        start += size


def locate_stage12(parameter: Any, flats: list[Tensor]) -> FlatRange:
    """Locate a shard at stages 1 and 2: each group is one flat tensor, split evenly over ranks."""
    found = parameter._hp_mapping
    if found is None:
        return FlatRange(0, 0, flats[0], 0)
    within, at = found.lp_fragment_address, found.hp_fragment_address
    return FlatRange(within.start, within.numel, flats[found.param_group_index], at.start)


def renew_compute_copies(optimizer: Any, stage: int) -> None:
    """Copy the float32 values into the weights that the forward uses; a collective."""
    if stage < 3:
        optimizer.update_lp_params()
        return
    for group in range(len(optimizer.fp32_partitioned_groups_flat)):
        optimizer._reassign_or_swap_out_partitioned_parameters(group)
    # Small parameters stay gathered, so the forward would otherwise use their old values.
    kept = optimizer.persistent_parameters
    if kept:
        kept[0].partition(kept)
        kept[0].all_gather(kept)


@contextmanager
def force_skipped_steps(optimizer: Any, stage: int) -> Iterator[list[Tensor]]:
    """Make steps within the block see an infinite gradient norm, and so drop all gradients.

    Yields:
        A list that receives the true norm of each dropped gradient, 0-dim.
    """
    infinite = torch.tensor(float("inf"), device=flat_tensors(optimizer, stage)[0].device)
    norms: list[Tensor] = []
    if stage == 3:
        name, value = "_get_norm_groups", [infinite]
    elif hasattr(optimizer, "get_grads_for_norm"):  # stage 1 with bf16
        name, value = "get_grads_for_norm", ([infinite], {})
    else:
        name, value = "scaled_global_norm", infinite
    original = getattr(optimizer, name)

    def replace_norm(*arguments: Any, **options: Any) -> Any:
        found = original(*arguments, **options)
        if name == "get_grads_for_norm":
            square = torch.stack([g.float().square().sum() for g in found[0]]).sum()
            dist.all_reduce(square)
            norms.append(square.sqrt())
        else:
            norms.append(torch.linalg.vector_norm(torch.stack([*found]) if stage == 3 else found))
        return value

    setattr(optimizer, name, replace_norm)
    try:
        yield norms
    finally:
        delattr(optimizer, name)
