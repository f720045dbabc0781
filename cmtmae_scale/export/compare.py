"""Comparison of two libraries' outputs on the same images."""

from typing import NamedTuple

from torch import Tensor

from cmtmae_scale.errors import CheckpointError

TOLERANCE = 1e-4
"""Largest difference of float32 features, relative to the largest value. Another order of sums
gives about 1e-6; a transposed, missing or misplaced tensor 1e-2 and more."""


class Agreement(NamedTuple):
    """Largest difference between two outputs, and their scale."""

    difference: float
    """Largest absolute difference."""
    largest: float
    """Largest absolute value of the reference."""

    def __str__(self) -> str:
        return f"{self.difference:.1e}, of values up to {self.largest:.3g}"


def require_agreement(ours: Tensor, theirs: Tensor, library: str) -> Agreement:
    """Compare two outputs, and refuse outputs of different networks.

    Both are float32 of the same shape; ``library`` is the other library's name and version.

    Raises:
        CheckpointError: if shapes differ, a value is NaN, or the largest difference is
            above ``TOLERANCE`` times our largest value.
    """
    if ours.shape != theirs.shape:
        raise CheckpointError(
            f"{library} returns shape {list(theirs.shape)} in place of {list(ours.shape)}: it "
            "builds another network; nothing was written, please report this"
        )
    found = Agreement(float((ours - theirs).abs().max()), float(ours.abs().max()))
    if not found.difference <= TOLERANCE * found.largest:  # NaN fails too
        raise CheckpointError(
            f"{library} computes something else from the exported weights: largest difference "
            f"{found} (allowed: {TOLERANCE:g} of that); nothing was written. Check whether the "
            "run's weights are finite; if they are, please report this"
        )
    return found
