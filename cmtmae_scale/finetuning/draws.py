"""Random numbers of augmentation: hashes of the seed and of a view's position.

So a view is augmented the same way after a resume and on any rank. Numbers that concern the pairs
of a micro-batch are drawn from the position of its first view.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cmtmae_scale.method.masking import hash_uniform
from dataloading.counters import fold, uniforms
from dataloading.stream import Batch

OPERATIONS, RECTANGLES, NOISE, PAIRS, PATHS = 0xA06, 0xE4A, 0x0153, 0x314, 0xD49
"""Purposes of draws."""


def positions_of(batch: Batch) -> NDArray[np.int64]:
    """Return the positions of a batch's views on the host, ``[B]``, without a device transfer."""
    if batch.plan is None:  # replaces a batch that could not be read; its step is not applied
        return np.zeros(len(batch.position), dtype=np.int64)
    return batch.plan.positions


def per_view(
    purpose: int, seed: int, positions: NDArray[np.int64], count: int
) -> NDArray[np.float64]:
    """Return numbers in ``[0, 1)``, ``[B, count]``."""
    return uniforms(fold(purpose, seed, positions), count)


def noise(seed: int, position: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Return standard normal numbers of a view; the same on every device of a kind."""
    generator = torch.Generator(device)
    generator.manual_seed(int(fold(NOISE, seed, position)[0] >> np.uint64(1)))
    return torch.randn(shape, generator=generator, device=device)


@contextmanager
def numpy_seeded(seed: int, position: int) -> Iterator[None]:
    """Seed numpy's global generator from a position, and restore its state afterwards."""
    before = np.random.get_state()
    np.random.seed(int(fold(PAIRS, seed, position)[0] % np.uint64(2**32)))
    try:
        yield
    finally:
        np.random.set_state(before)


def branch_factors(seed: int, positions: Tensor, depth: int, rate: float) -> Tensor | None:
    """Return the factors of every block's two branches for drop path.

    Args:
        seed: of the run.
        positions: int64 ``[B]``, on the device.
        depth: blocks L.
        rate: drop probability of the last block; it grows linearly from 0 in the first block.

    Returns:
        ``[B, L, 2]`` float32, 0 or one over the probability to keep; ``None`` for a rate of 0. No
        host synchronisation.

    Source: stochastic depth (arXiv 1603.09382), as in timm.
    """
    if not rate:
        return None
    keep = 1 - torch.linspace(0, rate, depth, device=positions.device)[:, None]  # [L, 1]
    drawn = hash_uniform(seed, PATHS, positions, 2 * depth).view(-1, depth, 2)
    return (drawn < keep) / keep
