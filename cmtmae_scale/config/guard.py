"""Settings of what a run does when something goes wrong."""

from dataclasses import dataclass


@dataclass
class Guard:
    """Steps that are left out, and ranks that hang."""

    skip_limit: int = 3
    """Steps in a row that are left out because the loss or the gradient is not finite, or the loss
    spikes, after which the run goes back to its newest checkpoint and on with later data; 0: the
    first one ends the run."""
    rollback_limit: int = 2
    """Times that the run goes back to the same checkpoint before it gives up."""
    spike_factor: float | None = None
    """A loss above median + factor x spread of the last 128 steps counts as a spike; the spread is
    1.4826 x the median distance from the median, at least 1 % of the median. ``None``: only what
    is not finite is left out."""
    hang_seconds: float | None = 300.0
    """Seconds without progress after which a run counts as hung and ends; five times that in the
    first step, in saves and in evaluations. ``None``: only the collectives' own limit holds."""
