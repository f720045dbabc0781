"""How a batch is split over ranks and micro-steps, and how long a run is."""

import math
from fractions import Fraction
from typing import NamedTuple

from cmtmae_scale.config.schema import Trained
from cmtmae_scale.errors import ConfigError

MIN_BATCHES = 4
"""Batches per epoch below which a run gets a warning."""
MIN_STEPS = 50
"""Steps of a length in epochs below which a run gets a warning."""


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


def pairs_views(config: Trained) -> bool:
    """Return whether mixup or cutmix pairs the views of a micro-batch, whose size is then even."""
    augment = getattr(config, "augment", None)
    return augment is not None and bool(augment.mixup or augment.cutmix)


def batch_plan(config: Trained, world_size: int) -> BatchPlan:
    """Split the global batch over ranks and micro-steps.

    The micro-batch is the largest divisor of ``global_batch_size / world_size`` that is at most
    ``train.micro_batch_size``; it is even where views are paired.

    Raises:
        ConfigError: if the ranks cannot share the batch; names world sizes and batches that work.
    """
    unit = 2 if pairs_views(config) else 1
    return split_batch(
        config.train.global_batch_size, config.train.micro_batch_size, world_size, unit
    )


def split_batch(total: int, limit: int, world_size: int, unit: int = 1) -> BatchPlan:
    """Split ``total`` views over ranks into micro-batches of at most ``limit``; see ``batch_plan``.

    Args:
        total: views per step.
        limit: largest number of views per rank and forward.
        world_size: number of ranks.
        unit: the size of the micro-batch is a multiple of this number.
    """
    if total % (world_size * unit):
        raise ConfigError(refuse_batch(total, world_size, unit))
    share = total // world_size
    if limit < unit:
        raise ConfigError(refuse_single_views(limit))
    micro = next(size for size in range(min(limit, share), 0, -1) if fits(share, size, unit))
    return BatchPlan(total, micro, world_size, share // micro)


def fits(share: int, size: int, unit: int) -> bool:
    """Return whether micro-batches of ``size``, a multiple of ``unit``, make up a rank's share."""
    return share % size == 0 and size % unit == 0


def refuse_single_views(limit: int) -> str:
    """Return why a micro-batch of one view cannot be paired."""
    return (
        f"train.micro_batch_size={limit}: mixup and cutmix pair the views of a micro-batch; use 2 "
        "or more, or set augment.mixup=0 and augment.cutmix=0"
    )


def refuse_batch(total: int, world_size: int, unit: int) -> str:
    """Return why the ranks cannot share a batch; the first remedy keeps the run as it is."""
    pairs = total // unit if total % unit == 0 else 0
    below = next((n for n in range(min(world_size, pairs), 0, -1) if pairs % n == 0), None)
    most = min(pairs, 8 * world_size)
    above = next((n for n in range(world_size + 1, most + 1) if pairs % n == 0), None)
    counts = [f"{n} rank{'s' if n > 1 else ''}" for n in (below, above) if n is not None]
    step = world_size * unit
    sizes = [str(size) for size in (total // step * step, -(-total // step) * step) if size]
    each = "an even number of views" if unit > 1 else "a whole number of views"
    other = f"train.global_batch_size={' or '.join(dict.fromkeys(sizes))}, which changes the run"
    return (
        f"train.global_batch_size={total} cannot be shared by {world_size} "
        f"rank{'s' if world_size > 1 else ''}, {each} each; use "
        f"{' or '.join([*counts, other])}"
    )


def explain_batch(config: Trained, plan: BatchPlan) -> str:
    """Return the split of the batch, and why the micro-batch is below the configured limit."""
    limit = config.train.micro_batch_size
    if plan.micro_batch_size == limit:
        return str(plan)
    share = plan.global_batch_size // plan.world_size
    even = "even " if pairs_views(config) else ""
    return (
        f"{plan}; {plan.micro_batch_size} is the largest {even}divisor of the {share} views per "
        f"rank up to train.micro_batch_size={limit}"
    )


def total_steps(config: Trained, num_images: int) -> int:
    """Return the steps of the whole run: as given, or epochs * images / batch, rounded up."""
    if config.train.steps is not None:
        return config.train.steps
    if config.train.epochs is None:
        raise ConfigError("train.epochs and train.steps are both missing; give one of them")
    views = exact(config.train.epochs) * num_images
    return max(1, math.ceil(views / config.train.global_batch_size))


def exact(number: float) -> Fraction:
    """Return a number as it is written: 1.1 epochs of 1,000 images are 1,100 views, not 1,101."""
    return Fraction(str(number))


def find_length_problem(config: Trained, num_images: int) -> str | None:
    """Return why a run is unlikely to learn: its batch against its images, or its length.

    A length in steps is the user's choice, and is not checked.
    """
    batch, steps = config.train.global_batch_size, total_steps(config, num_images)
    if batch * MIN_BATCHES > num_images:
        most = num_images // MIN_BATCHES
        remedy = f"set train.global_batch_size={most} or less" if most > 1 else "add images"
        return (
            f"train.global_batch_size={batch}: an epoch of {num_images} images has "
            f"{num_images / batch:.2g} batches, fewer than {MIN_BATCHES}; {remedy}"
        )
    if config.train.steps is None and steps < MIN_STEPS:
        return (
            f"train.epochs={config.train.epochs:g} over {num_images} images are {steps} steps of "
            f"{batch}; set train.epochs={math.ceil(MIN_STEPS * batch / num_images)} or more"
        )
    return None
