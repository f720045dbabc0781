"""Random numbers of augmentation: each a hash of the seed and of a view's position.

So a view is treated the same way after a resume, and on whichever rank it falls. What pairs the
views of a micro-batch is drawn from the position of its first view.
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
"""What a draw is for."""


def positions_of(batch: Batch) -> NDArray[np.int64]:
    """Positions of a batch's views on the host, ``[B]``, without asking the device."""
    if batch.plan is None:  # stands in for one that could not be read; it is not learnt from
        return np.zeros(len(batch.position), dtype=np.int64)
    return batch.plan.positions


def per_view(
    purpose: int, seed: int, positions: NDArray[np.int64], count: int
) -> NDArray[np.float64]:
    """Numbers in ``[0, 1)``, ``[B, count]``."""
    return uniforms(fold(purpose, seed, positions), count)


def noise(seed: int, position: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Standard normal numbers of a view; the same on every device of a kind."""
    generator = torch.Generator(device)
    generator.manual_seed(int(fold(NOISE, seed, position)[0] >> np.uint64(1)))
    return torch.randn(shape, generator=generator, device=device)


@contextmanager
def numpy_seeded(seed: int, position: int) -> Iterator[None]:
    """Let numpy's global generator start from a position, and put it back."""
    before = np.random.get_state()
    np.random.seed(int(fold(PAIRS, seed, position)[0] % np.uint64(2**32)))
    try:
        yield
    finally:
        np.random.set_state(before)


def branch_factors(seed: int, positions: Tensor, depth: int, rate: float) -> Tensor | None:
    """Factors of every block's two branches for drop path.

    Args:
        seed: of the run.
        positions: int64 ``[B]``, on the device.
        depth: blocks L.
        rate: chance of the last block; the others' grow to it linearly from 0.

    Returns:
        ``[B, L, 2]`` float32, 0 or one over the chance to keep; ``None`` for a rate of 0. No host
        synchronisation.

    Source: stochastic depth (arXiv 1603.09382), as in timm.
    """
    if not rate:
        return None
    keep = 1 - torch.linspace(0, rate, depth, device=positions.device)[:, None]  # [L, 1]
    drawn = hash_uniform(seed, PATHS, positions, 2 * depth).view(-1, depth, 2)
    return (drawn < keep) / keep
