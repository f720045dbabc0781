"""Steps that are skipped because their loss is not finite or spikes."""

import statistics
from collections import deque
from typing import Any

from cmtmae_scale.config.schema import Guard

WINDOW = 128
"""Number of recent losses from which the bound is computed."""
FEWEST = 16
"""Minimum number of losses for a bound."""
LEAST_SPREAD = 0.01
"""Smallest spread, as a fraction of the median."""
JUMP = 0.05
"""Change of a schedule within one step after which losses are not comparable."""


class Skips:
    """Counts skipped steps, and bounds the loss.

    Its inputs are sums over all ranks, so all ranks take the same decision. Checkpoints hold the
    losses and the number of consecutive skipped steps, so a resumed run decides like the
    undisturbed run. Roll-backs are counted within a launch.

    Args:
        settings: group ``guard``.
    """

    def __init__(self, settings: Guard) -> None:
        self.settings = settings
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.scheduled: list[float] = []
        self.in_succession = 0
        self.changed_step = -1
        """Step of the checkpoint that this launch resumed with an allowed change; -1: none."""
        self.rollback_step = -1
        self.rollbacks = 0

    def expect(self, scheduled: list[float]) -> None:
        """Clear the losses if a schedule jumps, because the loss may jump too.

        Args:
            scheduled: ``Scalars.mixing`` of the next step.
        """
        changes = [abs(a - b) for a, b in zip(scheduled, self.scheduled, strict=False)]
        if max(changes, default=0.0) > JUMP:
            self.losses.clear()
        self.scheduled = scheduled

    def bound(self) -> float:
        """Return the bound of a spike: median + factor x max(1.4826 MAD, 1 % of the median)."""
        factor = self.settings.spike_factor
        if factor is None or len(self.losses) < FEWEST:
            return float("inf")
        median = statistics.median(self.losses)
        spread = 1.4826 * statistics.median(abs(loss - median) for loss in self.losses)
        return median + factor * max(spread, LEAST_SPREAD * abs(median))

    def find_spike(self, loss: float) -> str | None:
        """Return why a finite loss is a spike, or ``None``."""
        bound = self.bound()
        if not bound < loss < float("inf"):
            return None
        return (
            f"loss {loss:.4g} above {bound:.4g}, the bound of the last {len(self.losses)} steps "
            f"at guard.spike_factor={self.settings.spike_factor:g}"
        )

    def record_applied(self, loss: float | None) -> None:
        """Add the loss of an applied step; ``None``: the step had no valid row."""
        self.in_succession = 0
        if self.settings.spike_factor is not None and loss is not None:
            self.losses.append(loss)

    def record_skip(self) -> bool:
        """Count a skipped step; return whether ``guard.skip_limit`` is reached."""
        self.in_succession += 1
        return self.in_succession >= self.settings.skip_limit

    def may_roll_back(self, step: int) -> bool:
        """Count a roll-back to a step; return whether ``guard.rollback_limit`` allows it."""
        self.rollbacks = self.rollbacks + 1 if step == self.rollback_step else 1
        self.rollback_step = step
        return self.rollbacks <= self.settings.rollback_limit

    def to_dict(self) -> dict[str, Any]:
        """Return the state that a checkpoint holds."""
        return {
            "losses": list(self.losses),
            "scheduled": self.scheduled,
            "in_succession": self.in_succession,
        }

    def restore(self, saved: dict[str, Any], step: int) -> None:
        """Continue from what ``to_dict`` returned, without losses of other settings.

        Args:
            saved: state of a checkpoint.
            step: step of that checkpoint.
        """
        losses = saved["losses"] if step > self.changed_step else []
        self.losses = deque(losses, maxlen=WINDOW)
        self.scheduled = list(saved["scheduled"])
        self.in_succession = int(saved["in_succession"])
