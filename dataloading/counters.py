"""Counter-based random numbers: each value is a hash of its purpose; no generator has a state."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

UInts = NDArray[np.uint64]

_INCREMENT = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)
_START = np.uint64(0x243F6A8885A308D3)  # the first digits of pi
_ALL_BITS = (1 << 64) - 1


def mix64(values: UInts) -> UInts:
    """Hash every value to 64 well mixed bits, one to one.

    Args:
        values: uint64, any shape with at least one dimension.

    Returns:
        uint64, the same shape.

    Source: splitmix64 (Steele, Lea and Flood 2014), increment and finaliser.
    """
    mixed = values + _INCREMENT
    mixed = (mixed ^ (mixed >> np.uint64(30))) * _FIRST
    mixed = (mixed ^ (mixed >> np.uint64(27))) * _SECOND
    return mixed ^ (mixed >> np.uint64(31))


def fold(*values: ArrayLike) -> UInts:
    """Hash a sequence of integers, one at a time; arrays broadcast.

    Args:
        values: Python integers (taken modulo 2**64) or integer arrays.

    Returns:
        uint64 hashes, of the broadcast shape and at least one dimension.
    """
    state = np.full(1, _START)
    for value in values:
        bits = value & _ALL_BITS if isinstance(value, int) else value
        state = mix64(state ^ mix64(np.atleast_1d(np.asarray(bits).astype(np.uint64))))
    return state


def uniforms(base: UInts, count: int) -> NDArray[np.float64]:
    """Draw ``count`` numbers for every hash.

    Args:
        base: hashes that name the draws, uint64 ``[B]``.
        count: numbers per hash.

    Returns:
        float64 ``[B, count]`` in ``[0, 1)``, multiples of 2**-53.
    """
    counter = mix64(np.arange(1, count + 1, dtype=np.uint64))  # [count]
    bits = mix64(base[:, None] ^ counter[None, :])
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
