"""Which sample a position of the endless stream draws: a pure function, nothing is stored."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dataloading.counters import UInts, fold, mix64

Ids = NDArray[np.int64]

_ROUNDS = 6
_SALT = 0xFE15


def sample_ids(n: int, seed: int, positions: ArrayLike) -> tuple[Ids, Ids]:
    """Map positions to samples, in a fresh random order every epoch.

    Epoch e is positions ``e*n`` to ``e*n + n - 1``; within it every sample occurs exactly once. The
    order is a six-round Feistel network on the next even number of bits, walked along its cycle
    until it falls below n, with round keys from (seed, epoch). No state, no memory beyond
    ``positions``; a batch may cross any number of epoch edges.

    Args:
        n: number of samples, ``1 <= n < 2**62``.
        seed: any integer.
        positions: integers >= 0, any shape.

    Returns:
        (sample id in ``[0, n)``, epoch), both int64 in the shape of ``positions``.

    Raises:
        ValueError: if n or a position is out of range.

    Source: Black and Rogaway, "Ciphers with arbitrary finite domains", 2002 (cycle walking).
    """
    offsets, epochs = sequential_ids(n, positions)
    unique, inverse = np.unique(epochs.ravel(), return_inverse=True)
    keys = np.stack([fold(_SALT, seed, unique, r) for r in range(_ROUNDS)])[:, inverse]
    shuffled = _permute(offsets.ravel().astype(np.uint64), n, keys)
    return shuffled.astype(np.int64).reshape(epochs.shape), epochs


def sequential_ids(n: int, positions: ArrayLike) -> tuple[Ids, Ids]:
    """Map positions to samples in index order, every epoch alike.

    Args:
        n: number of samples, ``1 <= n < 2**62``.
        positions: integers >= 0, any shape.

    Returns:
        (sample id, epoch), both int64 in the shape of ``positions``.

    Raises:
        ValueError: if n or a position is out of range.
    """
    where = np.asarray(positions, dtype=np.int64)
    if not 1 <= n < 1 << 62:
        raise ValueError(f"n is {n}; expected 1 <= n < 2**62")
    if where.size and int(where.min()) < 0:
        raise ValueError(f"position {int(where.min())} is negative")
    epochs = where // n
    return where - epochs * n, epochs


def _permute(values: UInts, n: int, keys: UInts) -> UInts:
    """Permute ``values`` ``[B]`` below n with round keys ``[rounds, B]``."""
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    values = _encrypt(values, half, keys)
    (outside,) = np.nonzero(values >= np.uint64(n))
    while outside.size:
        values[outside] = _encrypt(values[outside], half, keys[:, outside])
        outside = outside[values[outside] >= np.uint64(n)]
    return values


def _encrypt(values: UInts, half: int, keys: UInts) -> UInts:
    shift, low = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = values >> shift, values & low
    for key in keys:
        left, right = right, left ^ (mix64(right ^ key) & low)
    return (left << shift) | right
