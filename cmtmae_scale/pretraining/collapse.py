"""Detects that the target tokens of the momentum encoder are nearly alike."""

import math
from collections.abc import Mapping

COLLAPSED_COSINE = 0.95
"""Mean pairwise cosine of target tokens above which they count as collapsing."""
COLLAPSED_RANK = 5.0
"""Effective rank of target tokens below which they count as collapsing."""
RANK, COSINE = "diagnostics/effective_rank", "diagnostics/pairwise_cosine"
CONSTANT = "diagnostics/constant_loss"


def describe_collapse(values: Mapping[str, float]) -> str | None:
    """Return the evidence that target tokens are nearly alike; ``None``: none, or no values."""
    rank, cosine = values.get(RANK, math.inf), values.get(COSINE, 0.0)
    if rank >= COLLAPSED_RANK and cosine <= COLLAPSED_COSINE:
        return None
    text = f"effective rank {rank:.3g}, mean pairwise cosine {cosine:.3g}"
    if CONSTANT in values:
        text += (
            "; a low loss/student is then no sign of learning, since the mean token as the only "
            f"prediction has a loss of {values[CONSTANT]:.3g}"
        )
    return text
