"""Progress of a run: its step, its position, and the last value of each."""

from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass
class Progress:
    """Step and position; every field is saved with every checkpoint.

    ``position = position0 + (step - step0) * global_batch_size``; (step0, position0) is (0, 0)
    until a resume with an allowed change, or a roll-back.
    """

    step: int
    """Optimizer steps taken."""
    position: int
    """Views sampled, over all ranks."""
    step0: int
    """Step at which the present batch size took effect."""
    position0: int
    """Position at that step."""
    applied: int
    """Steps that changed the weights (AdamW's counter)."""
    end_step: int
    """Last step of the run."""
    horizon: int
    """Position at the last step; schedules are functions of position / horizon."""

    @property
    def fraction(self) -> float:
        """Return u = position / horizon."""
        return self.position / self.horizon

    def advance(self, global_batch_size: int, applied: bool) -> None:
        """Count a finished step."""
        self.step += 1
        self.applied += applied
        self.position = self.position_at(self.step, global_batch_size)

    def position_at(self, step: int, global_batch_size: int) -> int:
        """Return the position of a step from ``step0`` on."""
        return self.position0 + (step - self.step0) * global_batch_size

    def roll_back(self, saved: "Progress", global_batch_size: int) -> None:
        """Return to the step of a checkpoint, but not to its data: positions continue from here.

        The horizon moves accordingly, so that the schedules still end with the last step.
        """
        self.step = self.step0 = saved.step
        self.applied = saved.applied
        self.position0 = self.position
        self.horizon = self.position + (self.end_step - self.step) * global_batch_size

    @staticmethod
    def from_dict(saved: dict[str, Any]) -> "Progress":
        """Rebuild what ``to_dict`` returned."""
        return Progress(**{field.name: int(saved[field.name]) for field in fields(Progress)})

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


def fresh_progress(steps: int, global_batch_size: int) -> Progress:
    """Return the progress of a new run."""
    return Progress(0, 0, 0, 0, 0, steps, steps * global_batch_size)


def resumed_progress(
    saved: dict[str, Any], left: int, global_batch_size: int, changed: bool
) -> Progress:
    """Return the progress to continue from.

    Args:
        saved: what ``to_dict`` returned.
        left: steps that are left under the present config; used only if ``changed``.
        global_batch_size: views per step under the present config.
        changed: whether a key outside the free keys differs; ``step0`` and ``position0`` are then
            the saved step and position.
    """
    progress = Progress.from_dict(saved)
    if changed:
        progress.step0, progress.position0 = progress.step, progress.position
        progress.end_step = progress.step + left
        progress.horizon = max(progress.position + left * global_batch_size, 1)
    return progress
