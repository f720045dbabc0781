"""Means, deviations and paired tests of few numbers, exact and without SciPy."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Test(NamedTuple):
    """A paired comparison of A with B."""

    __test__ = False  # a name that pytest would collect

    method: str
    """``paired t over seeds`` or ``McNemar over images``."""
    difference: float
    """Mean of A - B, as a share."""
    interval_95: tuple[float, float]
    """Where the difference lies: over seeds for t, over test images for McNemar."""
    p: float
    """Two-sided."""
    pairs: int
    """Seeds, or test images."""


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and the deviation of a sample (n - 1); ``None`` for one value."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None
    return mean, math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (len(values) - 1))


def paired_t(a: Sequence[float], b: Sequence[float]) -> Test:
    """Student's paired t-test over the same seeds, two at least.

    It says what another seed would bring, for these test images.
    """
    differences = [x - y for x, y in zip(a, b, strict=True)]
    mean, deviation = mean_and_deviation(differences)
    if deviation is None:
        raise ValueError("a paired t-test needs two seeds at least")
    free = len(differences) - 1
    error = deviation / math.sqrt(len(differences))
    # Equal differences leave no doubt: t is infinite, or 0 where they are all 0.
    t = abs(mean) / error if error else (math.inf if mean else 0.0)
    p = 2 * t_tail(t, free)
    half = t_quantile(0.975, free) * error
    interval = (mean - half, mean + half)
    return Test("paired t over seeds", mean, interval, p, len(differences))


def mcnemar(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> Test:
    """McNemar's exact test over the test images of two sets of weights.

    It says whether these weights differ on such images, and nothing of other seeds. The interval is
    Wald's for paired shares.

    Args:
        a: which images A got right, bool ``[n]``.
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
    return Test("McNemar over images", difference, interval, p, count)


def binomial_p(smaller: int, total: int) -> float:
    """Two-sided probability of a split at least as uneven, for a fair coin."""
    ways = term = 1
    for k in range(1, smaller + 1):
        term = term * (total - k + 1) // k
        ways += term
    return min(1.0, 2 * ways / 2**total)


def t_tail(t: float, free: int) -> float:
    """P(T > t) for t >= 0.

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


def t_quantile(share: float, free: int) -> float:
    """The t below which a share of more than one half lies, by bisection."""
    low, high = 0.0, 1.0
    while t_tail(high, free) > 1 - share:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(middle, free) > 1 - share else (low, middle)
    return (low + high) / 2


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Probabilities corrected for their number.

    Source: S. Holm, Scandinavian Journal of Statistics 6 (1979).
    """
    corrected: dict[str, float] = {}
    worst = 0.0
    for rank, name in enumerate(sorted(p, key=lambda key: p[key])):
        worst = max(worst, min(1.0, (len(p) - rank) * p[name]))
        corrected[name] = worst
    return {name: corrected[name] for name in p}
