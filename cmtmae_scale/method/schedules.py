"""Scheduled numbers, all functions of progress u = position / horizon in [0, 1].

They are Python floats on the host; the caller fills 0-dim device tensors with them.

Source: docs/method.md, section "Schedules".
"""

import math

from cmtmae_scale.config.schema import Momentum, Schedule


def evaluate(schedule: Schedule | float, progress: float) -> float:
    """Return the value of a schedule.

    Args:
        schedule: a number (constant) or a ``Schedule``.
        progress: u = position / horizon; values outside [0, 1] act as the nearest bound.

    Returns:
        The value at u. ``two_stage`` is ``start`` for u < ``switch``, else ``end``; ``linear`` and
        ``cosine`` go from ``start`` at ``u0`` to ``end`` at ``u1`` and are constant outside.

    Raises:
        ValueError: if the schedule lacks a field that its kind needs.
    """
    if not isinstance(schedule, Schedule):
        return float(schedule)
    if schedule.kind == "constant":
        return float(schedule.start)
    if schedule.end is None:
        raise ValueError(f"a {schedule.kind} schedule needs end")
    if schedule.kind == "two_stage":
        if schedule.switch is None:
            raise ValueError("a two_stage schedule needs switch")
        return float(schedule.start if progress < schedule.switch else schedule.end)
    if not schedule.u0 < schedule.u1:
        raise ValueError(f"u0={schedule.u0} must be below u1={schedule.u1}")
    fraction = (progress - schedule.u0) / (schedule.u1 - schedule.u0)
    fraction = min(max(fraction, 0.0), 1.0)
    if schedule.kind == "cosine":
        fraction = (1.0 - math.cos(math.pi * fraction)) / 2.0
    return schedule.start + (schedule.end - schedule.start) * fraction


def learning_rate(progress: float, peak: float, warmup: float) -> float:
    """Return the learning rate: linear warm-up from 0, then a cosine to 0.

    Args:
        progress: u = position / horizon of the optimizer step; from 1 on the learning rate is 0.
        peak: learning rate at the end of the warm-up.
        warmup: fraction of the run with rising learning rate, in [0, 1).

    Returns:
        ``peak * u / warmup`` for u < warmup, else
        ``peak / 2 * (1 + cos(pi * (u - warmup) / (1 - warmup)))``.

    Raises:
        ValueError: if ``warmup`` is outside [0, 1).

    Source: docs/method.md, section "Schedules"; MAE's per-iteration schedule.
    """
    if not 0.0 <= warmup < 1.0:
        raise ValueError(f"warmup={warmup} must lie in [0, 1)")
    u = min(max(progress, 0.0), 1.0)
    if u < warmup:
        return peak * u / warmup
    return peak / 2.0 * (1.0 + math.cos(math.pi * (u - warmup) / (1.0 - warmup)))


def momentum_at(momentum: Momentum, progress: float) -> float:
    """Return the momentum m of ``m * old + (1 - m) * new``.

    Args:
        momentum: start, end and schedule (cosine or constant).
        progress: u = position / horizon; values outside [0, 1] act as the nearest bound.

    Returns:
        ``start`` if constant, else ``end - (end - start) * (cos(pi * u) + 1) / 2``.

    Source: docs/method.md, section "Momentum encoder".
    """
    if momentum.schedule == "constant":
        return float(momentum.start)
    u = min(max(progress, 0.0), 1.0)
    return momentum.end - (momentum.end - momentum.start) * (math.cos(math.pi * u) + 1.0) / 2.0
