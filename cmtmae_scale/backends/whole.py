"""Whole weights from the fragments of all ranks, whatever the backend."""

from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from cmtmae_scale.backends.base import Fragment
from cmtmae_scale.runtime.collectives import ranks


def whole_tensors(fragments: Mapping[str, Fragment], prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Put together every state whose key begins with a prefix, one at a time in memory.

    Args:
        fragments: what ``Backend.fragments`` gives.
        prefix: such as ``model.``; it is cut from the names.

    Yields:
        Name and whole float32 tensor, the same on every rank, on the device of the fragments. A
        collective: every rank must take all of them.
    """
    for key, part in fragments.items():
        if key.startswith(prefix):
            flat = part.local.new_zeros(torch.Size(part.shape).numel())
            if part.owner:
                flat[part.offset : part.offset + part.local.numel()] = part.local
            if ranks() > 1:
                dist.all_reduce(flat)
            yield key.removeprefix(prefix), flat.view(part.shape)
