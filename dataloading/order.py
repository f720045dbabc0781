"""Which sample a position of the endless stream draws: a pure function, nothing is stored."""

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dataloading.counters import UInts, fold, mix64

Ids = NDArray[np.int64]
Shuffle = Literal["full", "window", "none"]

BLOCK = 64
"""Consecutive samples that ``window_ids`` keeps together: 7 MB of ImageNet, efficient to read."""
WINDOW = 1024 * BLOCK
"""Draws that ``window_ids`` mixes: 7 GB of ImageNet, which a node's page cache holds."""

_ROUNDS = 6
_SALT = 0xFE15
_SALT_INSIDE, _SALT_BLOCKS, _SALT_START = 0x51DE, 0xB10C, 0x57A7


def sample_ids(n: int, seed: int, positions: ArrayLike) -> tuple[Ids, Ids]:
    """Map positions to samples, in a fresh random order every epoch.

    Epoch e is positions ``e*n`` to ``e*n + n - 1``; within it every sample occurs exactly once. The
    order is a six-round Feistel network on the next even number of bits, walked along its cycle
    until it falls below n, with round keys from (seed, epoch). No state, no memory beyond
    ``positions``; a batch may cross any number of epoch boundaries.

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


def window_ids(n: int, seed: int, positions: ArrayLike) -> tuple[Ids, Ids]:
    """Map positions to samples so that draws near each other read few places of the data set.

    In every epoch the samples, in index order from a random sample on and around the end, are cut
    into blocks of ``BLOCK`` neighbours, and the blocks are permuted. Each ``WINDOW`` consecutive
    draws are 1,024 such blocks, whose samples are shuffled together. The last window takes the
    rest: less than two windows, and the samples that fill no block. With less than two windows in
    all this is a shuffle of everything. The draws are well mixed only if the data were shuffled
    when they were stored; see ``dataloading.mixing``.

    Args:
        n: number of samples, ``1 <= n < 2**62``.
        seed: any integer.
        positions: integers >= 0, any shape.

    Returns:
        (sample id in ``[0, n)``, epoch), both int64 in the shape of ``positions``; within an epoch
        every sample occurs exactly once. No state, no memory beyond ``positions``.

    Raises:
        ValueError: if n or a position is out of range.
    """
    offsets, epochs = sequential_ids(n, positions)
    epoch, offset = epochs.ravel(), offsets.ravel()
    last = max(n // WINDOW, 1) - 1
    window = np.minimum(offset // WINDOW, last)
    start = window * WINDOW
    inside = (offset - start).astype(np.uint64)
    keys = _round_keys(_SALT_INSIDE, seed, epoch, window)
    for chosen, size in ((window < last, WINDOW), (window == last, n - last * WINDOW)):
        inside[chosen] = _permute(inside[chosen], size, keys[:, chosen])
    block, within = np.divmod(start + inside.astype(np.int64), BLOCK)
    blocks = n // BLOCK
    whole = block < blocks  # the others fill no block and keep their place
    keys = _round_keys(_SALT_BLOCKS, seed, epoch[whole])
    block[whole] = _permute(block[whole].astype(np.uint64), blocks, keys).astype(np.int64)
    first = (fold(_SALT_START, seed, epoch) % np.uint64(n)).astype(np.int64)
    ids = (first + block * BLOCK + within) % n
    return ids.reshape(epochs.shape), epochs


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


def _round_keys(salt: int, seed: int, *names: Ids) -> UInts:
    """Return keys ``[rounds, B]`` of the permutations that ``names``, ``[B]`` each, select."""
    return fold(salt, seed, *names, np.arange(_ROUNDS)[:, None])


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
