"""Where DeepSpeed's ZeRO optimizers keep a parameter's float32 values.

They hold them in flat tensors, one or more a parameter group. A rank's part of a parameter is a
range of one of these, at every stage. All names read here are private to DeepSpeed 0.19; the parity
and checkpoint tests notice when they change their meaning.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Place(NamedTuple):
    """This rank's part of one parameter."""

    offset: int
    """First value within the flattened parameter."""
    length: int
    """Number of values; 0: this rank holds none."""
    flat: Tensor
    """The flat float32 tensor that they lie in."""
    start: int
    """First value within ``flat``."""

    def view(self, flat: Tensor) -> Tensor:
        """The part within ``flat`` or a tensor of its layout, such as a moment; 1-D, live."""
        return flat.detach().narrow(0, self.start, self.length)


def flat_tensors(optimizer: Any, stage: int) -> list[Tensor]:
    """The float32 tensors that AdamW updates on this rank."""
    if stage == 3:
        return optimizer.fp32_partitioned_groups_flat
    if hasattr(optimizer, "fp32_groups_flat_partition"):  # stage 1 with bf16
        return optimizer.fp32_groups_flat_partition
    return optimizer.single_partition_of_fp32_groups


def find_places(
    optimizer: Any, stage: int, parameters: Iterable[tuple[str, nn.Parameter]], rank: int
) -> dict[str, Place]:
    """Locate this rank's part of every trained parameter."""
    flats = flat_tensors(optimizer, stage)
    if stage == 3:
        names = {id(parameter): name for name, parameter in parameters}
        return {
            names[id(parameter)]: place
            for group, flat in zip(optimizer.fp16_groups, flats, strict=True)
            for parameter, place in sharded(group, flat, rank)
        }
    return {name: partitioned(parameter, flats) for name, parameter in parameters}


def sharded(group: list[Any], flat: Tensor, rank: int) -> Iterator[tuple[Any, Place]]:
    """Stage 3: every parameter is cut into equal shards, the last ones padded."""
    start = 0
    for parameter in group:
        size = parameter.partition_numel()
        offset = min(rank * size, parameter.ds_numel)
        yield parameter, Place(offset, min(size, parameter.ds_numel - offset), flat, start)
        start += size


def partitioned(parameter: Any, flats: list[Tensor]) -> Place:
    """Stages 1 and 2: a group's parameters lie end to end, and that row is cut into equal parts."""
    found = parameter._hp_mapping
    if found is None:
        return Place(0, 0, flats[0], 0)
    within, at = found.lp_fragment_address, found.hp_fragment_address
    return Place(within.start, within.numel, flats[found.param_group_index], at.start)


def renew_compute_copies(optimizer: Any, stage: int) -> None:
    """Copy float32 values that were written from outside into what the forward uses. Collective."""
    if stage < 3:
        optimizer.update_lp_params()
        return
    for group in range(len(optimizer.fp32_partitioned_groups_flat)):
        optimizer._reassign_or_swap_out_partitioned_parameters(group)
    # Small parameters stay gathered for ever: their old values would be used on.
    kept = optimizer.persistent_parameters
    if kept:
        kept[0].partition(kept)
        kept[0].all_gather(kept)


@contextmanager
def gradient_refused(optimizer: Any, stage: int) -> Iterator[None]:
    """Within, a step finds an infinite gradient norm: it drops all gradients, changes nothing."""
    infinite = torch.tensor(float("inf"), device=flat_tensors(optimizer, stage)[0].device)
    if stage == 3:
        name, value = "_get_norm_groups", [infinite]
    elif hasattr(optimizer, "get_grads_for_norm"):  # stage 1 with bf16
        name, value = "get_grads_for_norm", ([infinite], {})
    else:
        name, value = "scaled_global_norm", infinite
    setattr(optimizer, name, lambda *_, **__: value)
    try:
        yield
    finally:
        delattr(optimizer, name)
