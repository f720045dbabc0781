"""Means, standard deviations and paired tests of few numbers, exact and without SciPy."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

Name = TypeVar("Name")


class PairedTest(NamedTuple):
    """A paired comparison of A with B."""

    method: str
    """``paired t over seeds`` or ``McNemar over images``."""
    difference: float
    """Mean of A - B, as a fraction."""
    interval_95: tuple[float, float]
    """Interval of the difference: over seeds for t, over test images for McNemar."""
    p: float
    """Two-sided."""
    pairs: int
    """Seeds, or test images."""


def mean_and_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean, and the standard deviation of a sample (n - 1); ``None`` for one value."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None
    return mean, math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (len(values) - 1))


def paired_t(a: Sequence[float], b: Sequence[float], resolution: float = 0.0) -> PairedTest:
    """Student's paired t-test over at least two common seeds.

    The test generalises over seeds, for these test images. Accuracies are multiples of 1/n, so two
    differences may be equal by rounding: their variance counts as at least that of the difference
    of two rounded numbers, resolution^2 / 6.

    Args:
        a: accuracies of A by seed.
        b: those of B.
        resolution: 1/n for n test images.

    Raises:
        ValueError: for fewer than two seeds.
    """
    differences = [x - y for x, y in zip(a, b, strict=True)]
    mean, std = mean_and_std(differences)
    if std is None:
        raise ValueError("a paired t-test needs at least two seeds")
    free = len(differences) - 1
    error = max(std, resolution / math.sqrt(6)) / math.sqrt(len(differences))
    # Equal differences: t is infinite, or 0 where all differences are 0.
    t = abs(mean) / error if error else (math.inf if mean else 0.0)
    p = 2 * t_tail(t, free)
    half = t_quantile(0.975, free) * error
    interval = (mean - half, mean + half)
    return PairedTest("paired t over seeds", mean, interval, p, len(differences))


def mcnemar(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> PairedTest:
    """McNemar's exact test over the test images of two sets of weights.

    The test generalises over such images for these weights, not over seeds. The interval is Wald's
    for paired proportions.

    Args:
        a: images that A classifies correctly, bool ``[n]``.
        b: the same images for B.

    Source: Q. McNemar, Psychometrika 12 (1947); exact form: binomial with 1/2 on the discordant.
    """
    count = len(a)
    only_a, only_b = int((a & ~b).sum()), int((~a & b).sum())
    difference = (only_a - only_b) / count
    spread = only_a + only_b - (only_a - only_b) ** 2 / count
    half = 1.959963984540054 * math.sqrt(spread) / count
    interval = (difference - half, difference + half)
    p = binomial_p(min(only_a, only_b), only_a + only_b)
    return PairedTest("McNemar over images", difference, interval, p, count)


def binomial_p(smaller: int, total: int) -> float:
    """Return the two-sided probability of a split at least as uneven, for a fair coin."""
    ways = term = 1
    for k in range(1, smaller + 1):
        term = term * (total - k + 1) // k
        ways += term
    return min(1.0, 2 * ways / 2**total)


def t_tail(t: float, free: int) -> float:
    """Return P(T > t) for t >= 0.

    Source: Abramowitz and Stegun, 26.7.3 and 26.7.4: finite sums for whole degrees of freedom.
    """
    angle = math.atan(t / math.sqrt(free))
    cosine = math.cos(angle)
    odd = free % 2
    term = cosine if odd else 1.0
    total = 0.0
    for k in range(odd, free - 1, 2):
        total += term
        term *= cosine * cosine * (k + 1) / (k + 2)
    total *= math.sin(angle)
    within = 2 / math.pi * (angle + total) if odd else total
    return max(0.0, (1 - within) / 2)


def t_quantile(probability: float, free: int) -> float:
    """Return the quantile of a probability above one half, by bisection."""
    low, high = 0.0, 1.0
    while t_tail(high, free) > 1 - probability:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(middle, free) > 1 - probability else (low, middle)
    return (low + high) / 2


def holm_correction(p: Mapping[Name, float]) -> dict[Name, float]:
    """Correct p-values for their number.

    Source: S. Holm, Scandinavian Journal of Statistics 6 (1979).
    """
    corrected: dict[Name, float] = {}
    worst = 0.0
    for rank, name in enumerate(sorted(p, key=lambda key: p[key])):
        worst = max(worst, min(1.0, (len(p) - rank) * p[name]))
        corrected[name] = worst
    return {name: corrected[name] for name in p}
