"""Whether two programs compute the same from the same pictures."""

from typing import NamedTuple

from torch import Tensor

from cmtmae_scale.errors import CheckpointError

TOLERANCE = 1e-4
"""Of float32 features, as a share of the largest one. Another order of sums gives about 1e-6; a
tensor that is transposed, missing or in another's place 1e-2 and more."""


class Agreement(NamedTuple):
    """How far apart two programs are, and how large their numbers."""

    difference: float
    """Largest absolute difference."""
    largest: float
    """Largest absolute value of ours."""

    def __str__(self) -> str:
        """In words."""
        return f"{self.difference:.1e}, of values up to {self.largest:.3g}"


def require_agreement(ours: Tensor, theirs: Tensor, library: str) -> Agreement:
    """Compare, and refuse to go on where it is not the same network.

    Args:
        ours: float32, any shape; the reference.
        theirs: the same by the other program.
        library: its name and version, for messages.

    Raises:
        CheckpointError: if shapes differ, a value is not a number, or the largest difference is
            above ``TOLERANCE`` times our largest value.
    """
    if ours.shape != theirs.shape:
        raise CheckpointError(
            f"{library} gives {list(theirs.shape)} numbers in place of {list(ours.shape)}: it "
            "builds another network; nothing was written, please report this"
        )
    found = Agreement(float((ours - theirs).abs().max()), float(ours.abs().max()))
    if not found.difference <= TOLERANCE * found.largest:  # not a number fails too
        raise CheckpointError(
            f"{library} computes something else from the exported weights: largest difference "
            f"{found} (allowed: {TOLERANCE:g} of that); nothing was written. Weights that are not "
            "finite are the run's fault, anything else please report"
        )
    return found
