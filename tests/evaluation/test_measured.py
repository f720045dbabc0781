"""The verdict on measured values: same measure, whatever was chosen, and disjoint intervals."""

import pytest

from cmtmae_scale.evaluation.measured import Measured, judge_measured

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
