"""The scheduled numbers that every task has."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Scalars:
    """Scheduled numbers of one step; a task may add its own."""

    lr: float
    """Learning rate in force."""

    momentum: float | None
    """EMA momentum of the step; ``None``: the task has no momentum encoder."""

    @property
    def mixing(self) -> list[float]:
        """Return the numbers whose jump makes losses before and after incomparable."""
        return []
