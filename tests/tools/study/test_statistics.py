"""Tests of few pairs equal SciPy's."""

import numpy as np
import pytest

from cmtmae_scale.tools.study.statistics import (
    binomial_p,
    holm_correction,
    mcnemar,
    mean_and_std,
    paired_t,
    t_quantile,
    t_tail,
)

stats = pytest.importorskip("scipy.stats", reason="SciPy comes with the extra demo")


@pytest.mark.parametrize("count", [2, 3, 8])
def test_the_paired_t_test_is_scipys(count: int) -> None:
    generator = np.random.default_rng(count)
    a = generator.normal(0.5, 0.02, count).tolist()
    b = generator.normal(0.49, 0.02, count).tolist()
    found = paired_t(a, b)
    expected = stats.ttest_rel(a, b)
    low, high = expected.confidence_interval(0.95)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-9)
    assert found.interval_95 == pytest.approx((low, high), rel=1e-9)
    assert (found.difference, found.pairs) == (pytest.approx(np.mean(a) - np.mean(b)), count)


@pytest.mark.parametrize(("t", "free"), [(0.0, 1), (0.3, 2), (2.0, 7), (12.0, 30)])
def test_the_tail_of_t_is_scipys(t: float, free: int) -> None:
    assert t_tail(t, free) == pytest.approx(stats.t.sf(t, free), rel=1e-6, abs=1e-14)
    assert t_quantile(0.975, free) == pytest.approx(stats.t.ppf(0.975, free), rel=1e-9)


def test_equal_differences_give_an_exact_answer() -> None:
    assert paired_t([0.75, 0.5], [0.5, 0.25]).p == 0
    one_image = [[k / 5000 for k in both] for both in ((1491, 1443), (1490, 1442))]
    assert paired_t(*one_image, resolution=1 / 5000).p == pytest.approx(0.179, abs=1e-3)
    many = [[k / 5000 for k in both] for both in ((1590, 1542), (1490, 1442))]
    assert 0 < paired_t(*many, resolution=1 / 5000).p < 0.005
    assert paired_t([0.75, 0.5], [0.75, 0.5]).p == 1
    with pytest.raises(ValueError, match="two seeds"):
        paired_t([0.5], [0.4])


def test_mcnemars_test_is_the_binomial_test_on_discordant_images() -> None:
    generator = np.random.default_rng(0)
    a, b = generator.random(500) < 0.5, generator.random(500) < 0.42
    only_a, only_b = int((a & ~b).sum()), int((~a & b).sum())
    found = mcnemar(a, b)
    assert found.p == pytest.approx(stats.binomtest(only_a, only_a + only_b).pvalue, rel=1e-9)
    assert found.difference == pytest.approx(a.mean() - b.mean(), abs=1e-12)
    # Wald's interval of the mean of paired differences, with their variance over n
    differences = a.astype(float) - b
    half = 1.959963984540054 * differences.std() / np.sqrt(500)
    interval = (differences.mean() - half, differences.mean() + half)
    assert found.interval_95 == pytest.approx(interval, abs=1e-12)


def test_what_never_differs_is_no_difference() -> None:
    same = np.array([True, False, True])
    assert (mcnemar(same, same).p, mcnemar(same, same).difference) == (1.0, 0.0)
    assert binomial_p(0, 10) == 2 / 2**10
    assert 0 <= binomial_p(2400, 5000) < 0.01  # whole numbers: nothing overflows


def test_the_standard_deviation_is_that_of_a_sample() -> None:
    assert mean_and_std([0.5]) == (0.5, None)
    mean, std = mean_and_std([0.1, 0.4, 0.3])
    assert (mean, std) == pytest.approx((0.8 / 3, np.std([0.1, 0.4, 0.3], ddof=1)))


def test_holm_corrects_the_smallest_most_and_keeps_the_order() -> None:
    found = holm_correction({"a": 0.04, "b": 0.01, "c": 0.03, "d": 0.9})
    assert found == pytest.approx({"a": 0.09, "b": 0.04, "c": 0.09, "d": 0.9})
    assert holm_correction({}) == {}
