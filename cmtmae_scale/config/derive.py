"""Numbers and needs that follow from a config; nothing here is stored as a second truth."""

import math
from pathlib import Path
from typing import NamedTuple

from cmtmae_scale.config.schema import Config, Schedule
from cmtmae_scale.config.trained import Trained
from cmtmae_scale.errors import ConfigError


class Needs(NamedTuple):
    """What a run's weights ask for; what nothing asks for is not built."""

    teacher_attention: bool
    teacher_features: bool
    student_attention: bool
    student_features: bool
    pixels: bool

    @property
    def teacher(self) -> bool:
        """Whether a frozen teacher is built."""
        return self.teacher_attention or self.teacher_features

    @property
    def momentum(self) -> bool:
        """Whether a momentum student is built."""
        return self.student_attention or self.student_features


class BatchPlan(NamedTuple):
    """How the global batch is split; ``global_batch_size = micro_batch x world_size x accumulation``."""

    global_batch_size: int
    micro_batch_size: int
    world_size: int
    accumulation: int

    def __str__(self) -> str:
        """The derivation, as it is logged."""
        return (
            f"{self.global_batch_size} = {self.micro_batch_size} micro x {self.world_size} ranks "
            f"x {self.accumulation} accumulation"
        )


def extremes(schedule: Schedule | float) -> tuple[float, float]:
    """Smallest and largest value that a schedule takes over a run."""
    if not isinstance(schedule, Schedule):
        return float(schedule), float(schedule)
    values = [schedule.start] if schedule.end is None else [schedule.start, schedule.end]
    return min(values), max(values)


def needs(config: Config) -> Needs:
    """Tell which maps and features a run uses at any time.

    Source: docs/method.md, section "Build only what is needed".
    """
    attention = config.mask.sampler != "random"
    attention_low, attention_high = extremes(config.collaboration.alpha_attention)
    target_low, target_high = extremes(config.collaboration.alpha_target)
    return Needs(
        teacher_attention=attention and attention_high > 0,
        teacher_features=config.loss.teacher > 0 and target_high > 0,
        student_attention=attention and attention_low < 1,
        student_features=config.loss.student > 0 and target_low < 1,
        pixels=config.loss.pixel > 0,
    )


def reads_cache(config: Config) -> bool:
    """Whether rows of a cache are looked for."""
    return config.teacher.mode in ("cached", "sidecar")


def cache_folder(config: Config) -> Path:
    """Folder of the cache: the run's own where none is given."""
    return Path(config.cache.dir) if config.cache.dir else Path(config.run.output_dir) / "cache"


def online_fraction(config: Config) -> float:
    """Share of micro-batches in which the teacher is planned to run."""
    if not needs(config).teacher or config.teacher.mode == "none":
        return 0.0
    return config.cache.spot_check if reads_cache(config) else 1.0


def builds_teacher(config: Config) -> bool:
    """Whether a training process holds a teacher; misses of a cache may need one."""
    misses = reads_cache(config) and config.cache.on_miss == "online"
    return online_fraction(config) > 0 or (misses and needs(config).teacher)


def batch_plan(config: Trained, world_size: int) -> BatchPlan:
    """Split the global batch over ranks and micro-steps.

    Raises:
        ConfigError: if it does not divide; names the nearest sizes that do.
    """
    total, micro = config.train.global_batch_size, config.train.micro_batch_size
    unit = micro * world_size
    if total % unit:
        below = total // unit * unit
        nearest = f"{below} or {below + unit}" if below else f"{unit}"
        raise ConfigError(
            f"train.global_batch_size={total} is not a multiple of micro_batch x world_size = "
            f"{micro} x {world_size} = {unit}; use {nearest}"
        )
    return BatchPlan(total, micro, world_size, total // unit)


def total_steps(config: Trained, num_images: int) -> int:
    """Optimizer steps of the whole run: given, or epochs * images / global batch, rounded up."""
    if config.train.steps is not None:
        return config.train.steps
    if config.train.epochs is None:
        raise ConfigError("train.epochs and train.steps are both missing; give one of them")
    return max(1, math.ceil(config.train.epochs * num_images / config.train.global_batch_size))


def peak_lr(config: Config) -> float:
    """Learning rate after the warm-up: ``base_lr * global_batch_size / 256``."""
    return config.optimizer.base_lr * config.train.global_batch_size / 256
