"""Numbers and needs that are derived from a config, and never stored."""

import math
from pathlib import Path
from typing import NamedTuple

from cmtmae_scale.config.schema import Config, Schedule, Trained
from cmtmae_scale.errors import ConfigError


class Needs(NamedTuple):
    """Attention maps and features that a run uses; nothing else is built."""

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
        """Whether a momentum encoder is built."""
        return self.student_attention or self.student_features


class BatchPlan(NamedTuple):
    """How the global batch is split over ranks and micro-steps."""

    global_batch_size: int
    micro_batch_size: int
    world_size: int
    accumulation: int

    def __str__(self) -> str:
        return (
            f"{self.global_batch_size} = {self.micro_batch_size} micro x {self.world_size} ranks "
            f"x {self.accumulation} accumulation"
        )


def extremes(schedule: Schedule | float) -> tuple[float, float]:
    """Return the smallest and the largest value of a schedule over a run."""
    if not isinstance(schedule, Schedule):
        return float(schedule), float(schedule)
    values = [schedule.start] if schedule.end is None else [schedule.start, schedule.end]
    return min(values), max(values)


def needs(config: Config) -> Needs:
    """Return which attention maps and features a run uses at any time.

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
    """Whether the teacher's rows are read from a cache."""
    return config.teacher.mode in ("cached", "sidecar")


def cache_folder(config: Config) -> Path:
    """Return the folder of the cache; the default is the run's own."""
    return Path(config.cache.dir) if config.cache.dir else Path(config.run.output_dir) / "cache"


def online_fraction(config: Config) -> float:
    """Return the expected share of micro-batches in which the teacher runs."""
    if not needs(config).teacher or config.teacher.mode == "none":
        return 0.0
    return config.cache.spot_check if reads_cache(config) else 1.0


def builds_teacher(config: Config) -> bool:
    """Whether a training process builds the teacher, which cache misses may need."""
    misses = reads_cache(config) and config.cache.on_miss == "online"
    return online_fraction(config) > 0 or (misses and needs(config).teacher)


def batch_plan(config: Trained, world_size: int) -> BatchPlan:
    """Split the global batch over ranks and micro-steps.

    Raises:
        ConfigError: if it is not divisible; names the nearest sizes that are.
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
    """Return the steps of the whole run: as given, or epochs * images / batch, rounded up."""
    if config.train.steps is not None:
        return config.train.steps
    if config.train.epochs is None:
        raise ConfigError("train.epochs and train.steps are both missing; give one of them")
    return max(1, math.ceil(config.train.epochs * num_images / config.train.global_batch_size))


def peak_lr(config: Config) -> float:
    """Return the learning rate after warm-up: ``base_lr * global_batch_size / 256``."""
    return config.optimizer.base_lr * config.train.global_batch_size / 256
