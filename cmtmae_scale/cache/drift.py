"""Whether what a cache holds is still what its teacher says."""

from typing import NamedTuple

import torch
from torch import Tensor

from cmtmae_scale.cache.codecs import Calibration, calibrate, fidelity
from cmtmae_scale.teachers.base import TeacherView


class Bounds(NamedTuple):
    """What rounding explains."""

    cosine: float
    """Least mean cosine of standardised features."""
    distance: float
    """Largest mean distance of maps: half the sum of absolute differences, 0 to 1."""


BOUNDS = {
    torch.float32: Bounds(0.999, 0.001),
    torch.bfloat16: Bounds(0.99, 0.05),
}
"""By the teacher's compute type. float32: the codec's own rounding (int8: about 0.9999; float16
maps: 0.0003). bfloat16: two runs of one teacher in other batches or on another device differ by
rounding of 1 part in 256 at every operation. Another teacher, crop or picture is far outside."""


class Agreement(NamedTuple):
    """Live against stored."""

    cosine: float | None
    """Mean over tokens, of standardised features; ``None``: no features."""
    distance: float | None
    """Mean over maps; ``None``: no maps."""

    def within(self, bounds: Bounds) -> bool:
        """Whether rounding explains the difference; what is not finite is a difference."""
        features = self.cosine is None or self.cosine >= bounds.cosine
        return features and (self.distance is None or self.distance <= bounds.distance)

    def __str__(self) -> str:
        """For messages."""
        parts = [] if self.cosine is None else [f"standardised cosine {self.cosine:.5f}"]
        parts += [] if self.distance is None else [f"distance of maps {self.distance:.5f}"]
        return ", ".join(parts)


def agreement(
    live: TeacherView, stored: TeacherView, rows: list[int], calibration: Calibration | None
) -> Agreement:
    """Compare some rows of two views of a batch. Waits for the device.

    Args:
        live: the teacher's.
        stored: the cache's.
        rows: places in the batch, at least one.
        calibration: what standardises channels; ``None``: the live features' own statistics.
    """
    cosine = distance = None
    if live.features is not None and stored.features is not None:
        own, kept = (pick(one, rows) for one in (live.features, stored.features))
        cosine = fidelity(own, kept, calibration or calibrate([own])).standardised[0]
    if live.attention is not None and stored.attention is not None:
        own, kept = (pick(one, rows) for one in (live.attention, stored.attention))
        distance = float((own - kept).abs().sum(-1).mean()) / 2
    return Agreement(cosine, distance)


def pick(tensor: Tensor, rows: list[int]) -> Tensor:
    """Some rows, float32."""
    return tensor[torch.tensor(rows, device=tensor.device)].float()
