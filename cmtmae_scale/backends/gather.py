"""Gather whole tensors from the fragments of all ranks, for any backend."""

from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from cmtmae_scale.backends.base import Fragment
from cmtmae_scale.runtime.collectives import ranks


def gather_tensors(fragments: Mapping[str, Fragment], prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Gather every tensor whose name begins with a prefix, one tensor at a time in memory.

    Args:
        fragments: from ``Backend.fragments``.
        prefix: such as ``model.``; it is removed from the names.

    Yields:
        Name and whole float32 tensor, the same on every rank, on the device of the fragments. A
        collective: every rank must exhaust the iterator.
    """
    for key, own in fragments.items():
        if key.startswith(prefix):
            flat = own.local.new_zeros(torch.Size(own.shape).numel())
            if own.owner:
                flat[own.offset : own.offset + own.local.numel()] = own.local
            if ranks() > 1:
                dist.all_reduce(flat)
            yield key.removeprefix(prefix), flat.view(own.shape)
