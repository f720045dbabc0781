"""The verdict on measured values: same measure, whatever was chosen, and disjoint intervals."""

import numpy as np
import pytest

from cmtmae_scale.evaluation.measured import (
    RESAMPLES,
    Array,
    Measured,
    bootstrap_interval,
    judge_measured,
)

Interval = tuple[float, float] | None


def row(weights: str, method: str, interval: Interval, measure: str = "mIoU") -> Measured:
    return Measured(weights, "patches", method, measure, 0.5, interval, 32)


OURS = row("ours", "k-NN, k=10", (0.4, 0.6))
ACCURACY = row("ours", "k-NN, k=10", (0.8, 0.9), "pixel accuracy")


@pytest.mark.parametrize(
    ("own", "others", "verdict"),
    [
        (OURS, [row("pixels", "k-NN, k=1", (0.1, 0.3))], "ours is clearly better than pixels"),
        (OURS, [row("pixels", "k-NN, k=1", (0.1, 0.4))], "ours is NOT clearly better than pixels"),
        (OURS, [row("pixels", "k-NN, k=1", None)], "ours is NOT clearly better than pixels"),
        (OURS, [row("pixels", "linear, C=1", (0.1, 0.3))], "no baseline was requested"),
        (OURS, [row("pixels", "k-NN, k=1", (0.1, 0.3), "other")], "no baseline was requested"),
        (row("ours", "rank", None), [row("pixels", "rank", None)], "no interval"),
    ],
)
def test_the_first_measure_is_compared(own: Measured, others: list[Measured], verdict: str) -> None:
    text = judge_measured([own, ACCURACY, *others], "ours")
    assert text.startswith(verdict) and f"({own.method.split(',')[0]}, mIoU" in text


def test_the_resamples_of_many_images_do_not_grow_with_their_number() -> None:
    """A thousand draws of ImageNet's training images are 10 GB; the interval is the same."""
    values, counts = np.random.default_rng(1).normal(size=20_000), list[int]()

    def mean(draws: Array) -> Array:
        counts.append(draws.size)
        return draws @ values / draws.sum(1)

    found = bootstrap_interval(mean, len(values))
    assert max(counts) <= 1 << 24 and sum(counts) == RESAMPLES * len(values)
    rng = np.random.default_rng(0)
    draws = rng.multinomial(len(values), np.full(len(values), 1 / len(values)), size=RESAMPLES)
    whole = np.quantile(draws @ values / len(values), [0.025, 0.975])
    assert found == pytest.approx(tuple(whole), rel=1e-12)
