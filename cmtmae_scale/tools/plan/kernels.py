"""Kernels of a step as functions of the micro-batch size, and their modelled time.

The step is recorded at two micro-batch sizes without memory or arithmetic, see ``step_model``; the
FLOPs and bytes of every kernel are linear in the number of views.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from cmtmae_scale.config.needs import needs
from cmtmae_scale.config.schema import Config
from cmtmae_scale.config.teachers import online_fraction, teacher_configs
from cmtmae_scale.tools.benchmark.step_model import (
    NEVER_FUSED,
    Operation,
    list_kernels,
    name_part,
    record_step,
)

SIZES = (2, 4)
"""Micro-batch sizes that are recorded."""


class Kernel(NamedTuple):
    """FLOPs and bytes of a kernel: fixed, and per view of the micro-batch."""

    flops: float
    flops_view: float
    bytes: float
    bytes_view: float

    def seconds(self, views: int, flops_s: float, bytes_s: float) -> float:
        """Return the longer of arithmetic and memory traffic."""
        arithmetic = (self.flops + views * self.flops_view) / flops_s
        return max(arithmetic, (self.bytes + views * self.bytes_view) / bytes_s)


@dataclass(frozen=True)
class StepKernels:
    """Kernels of a step of one rank, in three groups."""

    teachers: Mapping[str, Sequence[Kernel]]
    """Of each teacher's forward, per micro-step, by name; empty for an unused teacher."""
    micro: Sequence[Kernel]
    """Of the rest of a micro-step."""
    update: Sequence[Kernel]
    """Of casts, optimizer and EMA update, per step, unsharded."""


class StepTime(NamedTuple):
    """Modelled seconds of a step without communication."""

    device_s: float
    host_s: float
    """To launch the kernels."""

    @property
    def seconds(self) -> float:
        """The longer of both: the host launches ahead of the device."""
        return max(self.device_s, self.host_s)


def count_kernels(config: Config) -> StepKernels:
    """Record the step of a config, with all its teachers online; takes seconds.

    Raises:
        ConfigError: networks that cannot be built.
    """
    names = list(teacher_configs(config))
    if config.teachers:
        entries = [replace(one, mode="online") for one in config.teachers]
        config = replace(config, teachers=entries)
    elif needs(config).teacher:
        config = replace(config, teacher=replace(config.teacher, mode="online"))
    small, large = (kernels_by_part(config, size) for size in SIZES)
    found = {part: fit_kernels(small[part], large[part]) for part in small}
    return StepKernels(
        teachers={name: found.pop(name_part(name), []) for name in names},
        update=[one for part in NEVER_FUSED for one in found.pop(part, [])],
        micro=[one for kernels in found.values() for one in kernels],
    )


def online_fractions(config: Config) -> dict[str, float]:
    """Return the fraction of micro-steps in which each teacher runs, by name."""
    return {name: online_fraction(alone) for name, alone in teacher_configs(config).items()}


def kernels_by_part(config: Config, size: int) -> dict[str, Sequence[Operation]]:
    """Return the kernels of a step of one micro-batch of ``size`` views, by part."""
    sized = replace(config, train=replace(config.train, micro_batch_size=size))
    return {part: kernels for part, _, kernels in list_kernels(sized, record_step(sized), ())}


def fit_kernels(small: Sequence[Operation], large: Sequence[Operation]) -> list[Kernel]:
    """Fit FLOPs and bytes of the same kernels, recorded at both ``SIZES``."""
    return [
        Kernel(*fit_line(one.flops, two.flops), *fit_line(moved_bytes(one), moved_bytes(two)))
        for one, two in zip(small, large, strict=True)
    ]


def fit_line(small: float, large: float) -> tuple[float, float]:
    """Return the fixed part and the slope of the line through the values at ``SIZES``."""
    slope = (large - small) / (SIZES[1] - SIZES[0])
    return small - SIZES[0] * slope, slope


def moved_bytes(kernel: Operation) -> int:
    """Return the bytes that a kernel reads and writes."""
    return sum(kernel.reads.values()) + sum(kernel.writes.values())


def device_seconds(kernels: Sequence[Kernel], views: int, flops_s: float, bytes_s: float) -> float:
    """Return the seconds of kernels that run one after another."""
    return sum(one.seconds(views, flops_s, bytes_s) for one in kernels)


def flops_per_view(kernels: StepKernels, online: Mapping[str, float]) -> float:
    """Return the FLOPs per view; ``online``: see ``online_fractions``."""
    teachers = sum(
        fraction * one.flops_view
        for name, fraction in online.items()
        for one in kernels.teachers[name]
    )
    return sum(one.flops_view for one in kernels.micro) + teachers
