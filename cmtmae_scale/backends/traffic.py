"""Formulas for the collectives of a step: their number, ranks and bytes.

``tools/benchmark/collectives.py`` counts what the backends do; a test compares both. P: trained
parameters; E: those of the momentum encoder; s: ranks that share one copy of the weights; c: bytes
of the compute dtype. Each parameter's first dimension is padded to a multiple of s.

| collective | ranks | bytes |
|---|---|---|
| all-gather of the weights, per micro-step | s | c P; ``full``: 2 c P, forward and backward |
| all-gather of the EMA weights | s | c E; per step, with ``full`` per micro-step |
| reduce-scatter of the gradients, per step | s | 4 P |
| all-reduce of the gradients, per step | replicas | 4 P / s |

With ``backend.reduce_every_micro_step`` the reduce-scatter is issued per micro-step.

DeepSpeed's stages 1 and 2 keep the weights of each parameter group as one flat tensor, F values
with padding; stage 3 pads each parameter. All groups are of all ranks.

| collective | stage 1 | stage 2 | stage 3 |
|---|---|---|---|
| all-reduce of the gradients | 4 F per step | 4 P per micro-step | |
| reduce-scatter of the gradients | | | 4 P per micro-step |
| all-gather of the weights | c F per step | c F per step | at most 2 c P per micro-step |
| all-gather of the EMA weights | c F per step | c F per step | c E per micro-step |
"""

import logging
import math
from collections.abc import Iterable
from typing import NamedTuple, cast

from torch import nn

from cmtmae_scale.backends.adamw import parameter_groups, trainable
from cmtmae_scale.backends.base import Blocked
from cmtmae_scale.backends.fsdp import BLOCKS_PER_GROUP, fixed_positions, ranks_per_shard_group
from cmtmae_scale.config.schema import Trained

logger = logging.getLogger(__name__)

HOP_S = 3e-6
"""Time of a message from one rank to the next, seconds; assumed."""
ALIGNMENT = 2
"""Values to which DeepSpeed aligns each rank's part of a flat tensor."""
BUCKET = 500_000_000
"""Values that DeepSpeed reduces at a time."""
MANY_RANKS = 64
"""Number of ranks above which sharding over all ranks causes a warning."""


class Traffic(NamedTuple):
    """Collectives of one kind over groups of one size, per step, from one rank's side."""

    kind: str
    """all-gather, reduce-scatter, all-reduce."""
    ranks: int
    """Of the group."""
    calls: int
    payload: int
    """Bytes of the whole tensors: gathered, to be scattered, or to be reduced."""

    @property
    def sent_bytes(self) -> float:
        """Bytes that a rank sends in a ring."""
        return self.rounds * (self.ranks - 1) / self.ranks * self.payload

    @property
    def latency_s(self) -> float:
        """Seconds of the hops of a ring, which bandwidth does not shorten; modelled."""
        return self.calls * self.rounds * (self.ranks - 1) * HOP_S

    @property
    def rounds(self) -> int:
        """Number of passes around the ring."""
        return 2 if self.kind == "all-reduce" else 1


def fsdp_traffic(
    config: Trained, model: nn.Module, momentum: nn.Module | None, world_size: int, local_size: int
) -> list[Traffic]:
    """Return the collectives of a step of one micro-step; the report's all-reduce is left out.

    Args:
        config: checked settings.
        model: ``Blocked``; only shapes are read.
        momentum: the momentum encoder, or ``None``.
        world_size: number of ranks, at least 2.
        local_size: ranks per node.
    """
    sharding = config.backend.sharding
    is_full = sharding == "full"
    shards = ranks_per_shard_group(sharding, world_size, local_size)
    copies = world_size // shards
    width = 2 if config.backend.precision == "bf16" else 4
    units = count_units(model, is_full)
    weights = padded(trained(model), shards)
    gathers, gathered = units * (1 + is_full), width * weights * (1 + is_full)
    if momentum is not None:
        fixed = {id(one) for one in fixed_positions(momentum)}
        rest = [one for one in momentum.parameters() if id(one) not in fixed]
        gathers += count_units(momentum, True) if is_full else 1
        gathered += width * padded(rest, shards)
        if not is_full:  # every rank sends its whole table
            gathered += width * shards * padded(fixed_positions(momentum), 1)
    found = [
        Traffic("all-gather", shards, gathers, gathered),
        Traffic("all-reduce", copies, units, 4 * weights // shards),
        Traffic("reduce-scatter", shards, units, 4 * weights),
    ]
    return [one for one in found if one.ranks > 1]


def zero_traffic(
    config: Trained, model: nn.Module, momentum: nn.Module | None, world_size: int
) -> list[Traffic]:
    """Return the collectives of a step of one micro-step under DeepSpeed ZeRO.

    Scalars and the report are left out. At stage 3 calls are those of the large parameters, which
    blocks gather as a whole; parameters below DeepSpeed's threshold stay gathered, so that the
    bytes are an upper bound.

    Args:
        config: checked settings.
        model: ``Blocked`` with an ``encoder``; only shapes are read.
        momentum: the momentum encoder, or ``None``.
        world_size: number of ranks.
    """
    width = 2 if config.backend.precision == "bf16" else 4
    stage, units = config.backend.zero_stage, count_units(model, True)
    if stage == 3:
        split = [-(-one.numel() // world_size) * world_size for one in model.parameters()]
        grads = sum(-(-one.numel() // world_size) * world_size for one in trained(model))
        found = [
            Traffic("all-gather", world_size, 2 * units, 2 * width * sum(split)),
            Traffic("reduce-scatter", world_size, math.ceil(grads / BUCKET), 4 * grads),
        ]
        if momentum is not None:
            averaged = trained(model.get_submodule("encoder"))
            ema = sum(-(-one.numel() // world_size) * world_size for one in averaged)
            calls = count_units(momentum, True)
            found.append(Traffic("all-gather", world_size, calls, width * ema))
        return found
    groups = parameter_groups(trainable(model), 0.0)
    sizes = [sum(one.numel() for one in group["params"]) for group in groups]
    unit = ALIGNMENT * world_size
    flat = sum(-(-size // unit) * unit for size in sizes)
    reduced = flat if stage == 1 else sum(sizes)
    gathers = 1 + (momentum is not None)
    return [
        Traffic("all-gather", world_size, len(groups) + gathers - 1, width * flat * gathers),
        Traffic("all-reduce", world_size, math.ceil(reduced / BUCKET), 4 * reduced),
    ]


def count_units(module: nn.Module, is_full: bool) -> int:
    """Count the parts of a module that FSDP2 gathers as a whole: groups of blocks, and the rest."""
    blocks = len(cast(Blocked, module).transformer_blocks())
    return 1 + (blocks if is_full else math.ceil(blocks / BLOCKS_PER_GROUP))


def trained(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that get gradients."""
    return [one for one in module.parameters() if one.requires_grad]


def padded(parameters: Iterable[nn.Parameter], shards: int) -> int:
    """Count values, with each first dimension padded to a multiple of ``shards``."""
    return sum(-(-len(one) // shards) * shards * (one.numel() // len(one)) for one in parameters)


def warn_of_latency(
    config: Trained, model: nn.Module, momentum: nn.Module | None, world_size: int
) -> None:
    """Warn if weights are sharded over so many ranks that the latency of rings dominates."""
    backend = config.backend
    if world_size <= MANY_RANKS:
        return
    if backend.name == "fsdp" and backend.sharding == "full":
        found = fsdp_traffic(config, model, momentum, world_size, world_size)
        setting = "backend.sharding=full"
        other = "backend.sharding=hybrid, which keeps weights within a node"
    elif backend.name == "deepspeed" and backend.zero_stage == 3:
        found = zero_traffic(config, model, momentum, world_size)
        setting = "backend.zero_stage=3"
        other = "backend.zero_stage=1, which gathers weights once per step"
    else:
        return
    text = (
        "%s on %d ranks: a micro-step waits for %d collectives over all of them, and each passes "
        "%d ranks in a ring: %.0f ms per micro-step at %g us per hop (modelled), however little a "
        "rank computes; use %s, if memory allows"
    )
    calls, latency_s = sum(one.calls for one in found), sum(one.latency_s for one in found)
    hops = world_size - 1
    logger.warning(text, setting, world_size, calls, hops, 1e3 * latency_s, 1e6 * HOP_S, other)
