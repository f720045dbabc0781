"""Steps that are left out because their loss is not finite or spikes."""

import statistics
from collections import deque
from typing import Any

from cmtmae_scale.config.schema import Guard
from cmtmae_scale.engine.progress import Scalars

WINDOW = 128
"""Losses that the bound is taken from."""
FEWEST = 16
"""Losses below which there is no bound."""
LEAST_SPREAD = 0.01
"""Smallest spread, as a share of the median."""
JUMP = 0.05
"""Change of a schedule within one step after which losses are not comparable."""


class Skips:
    """Counts steps that were left out, and bounds the loss.

    It sees sums over all ranks only, so that every rank decides alike; it is saved with
    checkpoints, so that a resumed run decides as the undisturbed one.

    Args:
        settings: group ``guard``.
    """

    def __init__(self, settings: Guard) -> None:
        self.settings = settings
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.scheduled: list[float] = []
        self.in_a_row = 0
        self.gone_back_to = -1
        self.times = 0

    def expect(self, scalars: Scalars) -> None:
        """Prepare for a step: where a schedule jumps, so may the loss."""
        scheduled = [scalars.alpha_attention, scalars.alpha_target, scalars.salient_frac]
        changes = [abs(a - b) for a, b in zip(scheduled, self.scheduled, strict=False)]
        if max(changes, default=0.0) > JUMP:
            self.losses.clear()
        self.scheduled = scheduled

    def bound(self) -> float:
        """Largest loss that is no spike: median + factor x max(1.4826 MAD, 1 % of the median)."""
        factor = self.settings.spike_factor
        if factor is None or len(self.losses) < FEWEST:
            return float("inf")
        median = statistics.median(self.losses)
        spread = 1.4826 * statistics.median(abs(loss - median) for loss in self.losses)
        return median + factor * max(spread, LEAST_SPREAD * abs(median))

    def spike(self, loss: float) -> str | None:
        """Say that a loss is a spike, or ``None``; one that is not finite is none."""
        bound = self.bound()
        if not bound < loss < float("inf"):
            return None
        return (
            f"loss {loss:.4g} above {bound:.4g}, the bound of the last {len(self.losses)} steps "
            f"at guard.spike_factor={self.settings.spike_factor:g}"
        )

    def taken(self, loss: float) -> None:
        """Count a step that was applied."""
        self.in_a_row = 0
        if self.settings.spike_factor is not None:
            self.losses.append(loss)

    def left_out(self) -> bool:
        """Count a step that was not; whether that is more than the run puts up with."""
        self.in_a_row += 1
        return self.in_a_row >= self.settings.skip_limit

    def may_go_back(self, step: int) -> bool:
        """Count a return to a checkpoint; whether it has not been one too many."""
        self.times = self.times + 1 if step == self.gone_back_to else 1
        self.gone_back_to = step
        return self.times <= self.settings.rollback_limit

    def to_dict(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {
            "losses": list(self.losses),
            "scheduled": self.scheduled,
            "in_a_row": self.in_a_row,
        }

    def restore(self, saved: dict[str, Any] | None) -> None:
        """Continue from what ``to_dict`` gave; ``None``: a checkpoint older than this class."""
        saved = saved or {}
        self.losses = deque(saved.get("losses", []), maxlen=WINDOW)
        self.scheduled = list(saved.get("scheduled", []))
        self.in_a_row = int(saved.get("in_a_row", 0))
