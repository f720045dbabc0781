"""Allocates the parameters of a backend on their device, and fills them by ranges."""

from collections.abc import Mapping
from typing import TypeVar

import torch
from timm.models.eva import EvaAttention
from torch import nn

from cmtmae_scale.backends.base import Backend, Fragment
from cmtmae_scale.method.decoder import Decoder
from cmtmae_scale.method.initialisation import Values, write_range
from cmtmae_scale.method.rotary import Constant

M = TypeVar("M", bound=nn.Module)
ENCODER, MODEL, MOMENTUM = "encoder.", "model.", "momentum."


def materialise(module: M, device: torch.device, recurse: bool = True) -> M:
    """Allocate a module of the meta device, or its shards; only buffers get their values.

    Args:
        module: its parameters' dtype is kept.
        device: of parameters and buffers.
        recurse: allocate the modules within it too.

    Raises:
        TypeError: if no rule computes a buffer.
    """
    module.to_empty(device=device, recurse=recurse)
    for name, part in module.named_modules() if recurse else [("", module)]:
        if isinstance(part, Constant):
            continue  # keeps its values
        buffers = dict(part.named_buffers(recurse=False))
        if isinstance(part, EvaAttention) and part.k_bias is not None:
            buffers.pop("k_bias").zero_()
        if isinstance(part, Decoder):
            buffers.pop("positions").copy_(part.compute_positions())
        if buffers:
            raise TypeError(
                f"no rule to compute {', '.join(buffers)} of {name or type(part).__name__}"
            )
    return module


def initialise_backend(backend: Backend, values: Values) -> None:
    """Write the initial values of this rank's shards, and copy them to the EMA weights.

    A collective.

    Args:
        backend: before its first step.
        values: of every parameter; if a parameter has several, the last is written.

    Raises:
        ValueError: if a parameter has no values.
    """
    fragments = backend.fragments()
    absent = {key for key in fragments if key.startswith(MODEL)} - {MODEL + n for n, _ in values}
    if absent:
        raise ValueError(f"no initial values for {len(absent)} parameters, first {min(absent)}")
    for name, pieces in values:
        own = fragments[MODEL + name]
        write_range(pieces, own.offset, own.local)
    start_momentum(fragments)
    backend.after_load(0)


def start_momentum(fragments: Mapping[str, Fragment]) -> None:
    """Copy this rank's shards of the student's weights to the EMA weights, where there are any."""
    for key, own in fragments.items():
        if key.startswith(MOMENTUM):
            own.local.copy_(fragments[MODEL + ENCODER + key.removeprefix(MOMENTUM)].local)
