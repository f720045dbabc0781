"""Running statistics per channel of the targets with ``norm=channel`` or ``norm=center``.

A step uses the statistics of the steps before it, so that neither the number of ranks nor the split
of a batch matters, up to the rounding of float32 sums. Its own views are summed on the device, over
ranks in the all-reduce of the engine's report, and added on the host if the step is applied.

Legend: G groups of tokens (class tokens, if any, then patches), F channels.

Source: docs/method.md, section "Statistics per channel".
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cmtmae_scale.checkpoint.layout import REMEDY, STATE
from cmtmae_scale.config.derive import loss_terms, target_norms
from cmtmae_scale.config.schema import Config
from cmtmae_scale.config.teachers import term_name
from cmtmae_scale.errors import CheckpointError
from cmtmae_scale.method.channels import ChannelMoments, ChannelScaling, merge_moments
from cmtmae_scale.method.student import Student
from cmtmae_scale.method.targets import EPS, RUNNING_NORMS
from cmtmae_scale.teachers.base import TeacherSource

DECAY = 0.9
"""Factor per applied step of the earlier views' weight; DINO's momentum of the centre."""
KEY = "target_channels"
"""Name in the state of a checkpoint."""


class RunningChannels:
    """Running mean and variance per channel of one target.

    Args:
        divides: whether deviations are divided by the standard deviation.
        num_groups: G.
        width: F.
        device: of the features.
    """

    def __init__(self, divides: bool, num_groups: int, width: int, device: torch.device) -> None:
        self.divides = divides
        shape = (num_groups, width)
        self.moments = ChannelMoments(
            torch.zeros(num_groups, 1, dtype=torch.float64, device="cpu"),
            torch.zeros(shape, dtype=torch.float64, device="cpu"),
            torch.zeros(shape, dtype=torch.float64, device="cpu"),
        )
        self.scaling = ChannelScaling(
            torch.zeros(shape, device=device),
            torch.full(shape, 0.0 if divides else 1.0, device=device),
        )

    @property
    def num_sums(self) -> int:
        """Length of the flat ``method.channels.sum_channels``."""
        groups, width = self.scaling.mean.shape
        return groups * (1 + 2 * width)

    def update(self, sums: Sequence[float]) -> None:
        """Add the sums of an applied step over all ranks."""
        groups, width = self.scaling.mean.shape
        table = torch.tensor(sums, dtype=torch.float64).view(groups, 1 + 2 * width)
        self.set_moments(merge_moments(self.moments, table, self.moments.mean.float(), DECAY))

    def set_moments(self, moments: ChannelMoments) -> None:
        """Set the statistics, and enqueue their copy to the device."""
        self.moments = moments
        factor = torch.ones_like(moments.variance)
        if self.divides:
            factor = torch.where(moments.num_tokens > 0, (moments.variance + EPS).rsqrt(), 0.0)
        for there, here in zip(self.scaling, (moments.mean, factor), strict=True):
            value = here.float()
            there.copy_(value.pin_memory() if there.is_cuda else value, non_blocking=True)


class TargetChannels:
    """Running statistics of all targets that use them, and the sums of the present step.

    Args:
        running: statistics by target, ``teacher``, ``student``, or ``teacher_NAME`` of several
            teachers.
        device: of the features.
    """

    def __init__(
        self, running: Iterable[tuple[str, RunningChannels]], device: torch.device | None = None
    ) -> None:
        self.running = dict(running)
        self.scalings = {name: one.scaling for name, one in self.running.items()}
        length = sum(one.num_sums for one in self.running.values())
        self.sums = torch.zeros(length, device=device)

    def clear_sums(self) -> None:
        """Clear the sums, at the beginning of a step."""
        self.sums = torch.zeros_like(self.sums)

    def add(self, sums: Tensor | None) -> None:
        """Add a micro-batch's sums."""
        if sums is not None:
            self.sums += sums

    def update(self, sums: Sequence[float]) -> None:
        """Add the sums of an applied step over all ranks to the statistics."""
        first = 0
        for one in self.running.values():
            one.update(sums[first : first + one.num_sums])
            first += one.num_sums

    def to_dict(self) -> dict[str, Any]:
        """Return the state that a checkpoint holds; empty if no target uses statistics."""
        if not self.running:
            return {}
        states = {
            name: {key: values.tolist() for key, values in one.moments._asdict().items()}
            for name, one in self.running.items()
        }
        return {KEY: states}

    def restore(self, saved: dict[str, Any]) -> None:
        """Continue from the state of a checkpoint; statistics that it lacks start from zero.

        Raises:
            CheckpointError: for statistics that cannot be used.
        """
        states = saved.get(KEY, {})
        if not isinstance(states, dict):
            raise CheckpointError(f"{STATE}: {KEY} is not a JSON object; {REMEDY}")
        for name, one in self.running.items():
            if name in states:
                one.set_moments(read_moments(states[name], one.moments, f"{KEY}.{name}"))


def read_moments(state: Any, like: ChannelMoments, name: str) -> ChannelMoments:
    """Rebuild statistics of the shapes of ``like`` from the state of a checkpoint.

    Raises:
        CheckpointError: for other shapes, or values that are not finite numbers.
    """
    try:
        found = {key: torch.tensor(values, dtype=torch.float64) for key, values in state.items()}
        moments = ChannelMoments(**found)
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{STATE}: {name} cannot be read ({error}); {REMEDY}") from error
    for key, values, known in zip(moments._fields, moments, like, strict=True):
        if values.shape != known.shape or not bool(values.isfinite().all()):
            raise CheckpointError(
                f"{STATE}: {name}.{key} must be finite numbers of shape {tuple(known.shape)}, "
                f"found shape {tuple(values.shape)}; {REMEDY}"
            )
    return moments


def open_channels(
    config: Config, teachers: Mapping[str, TeacherSource], student: Student, device: torch.device
) -> TargetChannels:
    """Return the statistics that the targets need, before the first step.

    Args:
        config: checked settings.
        teachers: feature width and class token of each teacher are used.
        student: the encoder; likewise.
        device: of the features.
    """
    shapes = {term_name(name): (one.has_cls, one.width) for name, one in teachers.items()}
    shapes["student"] = (student.has_class_token, student.embed_dim)
    norms, running = target_norms(config), dict[str, RunningChannels]()
    for name in loss_terms(config):
        if name in shapes and norms[name] in RUNNING_NORMS:
            has_cls, width = shapes[name]
            is_scaled = norms[name] == "channel"
            running[name] = RunningChannels(is_scaled, 1 + has_cls, width, device)
    return TargetChannels(running.items(), device)
