"""Schedules against numbers computed by hand."""

import math

import pytest

from cmtmae_scale.config.schema import Momentum, Schedule
from cmtmae_scale.method.schedules import evaluate, learning_rate, momentum_at


def test_two_stage_switches_at_its_point():
    schedule = Schedule("two_stage", 1.0, 0.5, switch=0.1)
    assert [evaluate(schedule, u) for u in (0.0, 0.0999, 0.1, 1.0)] == [1.0, 1.0, 0.5, 0.5]


def test_linear_is_constant_outside_its_range():
    schedule = Schedule("linear", 1.0, 0.5, u0=0.1, u1=0.5)
    values = [evaluate(schedule, u) for u in (0.0, 0.1, 0.3, 0.5, 1.0, 1.5)]
    assert values == pytest.approx([1.0, 1.0, 0.75, 0.5, 0.5, 0.5])


def test_cosine_starts_and_ends_flat():
    schedule = Schedule("cosine", 1.0, 0.0, u0=0.2, u1=0.6)
    expected = [1.0, 1.0, (1 + math.cos(math.pi / 4)) / 2, 0.5, 0.0, 0.0]
    assert [evaluate(schedule, u) for u in (0, 0.2, 0.3, 0.4, 0.6, 1)] == pytest.approx(expected)


def test_a_number_is_a_constant():
    assert evaluate(0.3, 0.7) == 0.3
    assert evaluate(Schedule("constant", 0.3), 0.7) == 0.3


@pytest.mark.parametrize(
    "schedule, message",
    [
        (Schedule("linear", 1.0), "needs end"),
        (Schedule("two_stage", 1.0, 0.5), "needs switch"),
        (Schedule("linear", 1.0, 0.5, u0=0.5, u1=0.5), "must be below"),
    ],
)
def test_incomplete_schedules_are_refused(schedule, message):
    with pytest.raises(ValueError, match=message):
        evaluate(schedule, 0.5)


def test_learning_rate():
    peak = 2.4e-3
    expected = {0: 0, 20: 1.2e-3, 40: 2.4e-3, 130: 2.04853e-3, 220: 1.2e-3, 310: 3.5147e-4, 400: 0}
    for epoch, rate in expected.items():
        assert learning_rate(epoch / 400, peak, 40 / 400) == pytest.approx(rate, abs=5e-9)
    assert learning_rate(1.1, peak, 0.1) == 0.0
    assert learning_rate(0.0, peak, 0.0) == peak
    with pytest.raises(ValueError, match="warmup"):
        learning_rate(0.5, peak, 1.0)


def test_momentum():
    expected = [0.996, 0.9965858, 0.998, 0.9994142, 1.0]
    found = [momentum_at(Momentum(), u) for u in (0, 0.25, 0.5, 0.75, 1)]
    assert found == pytest.approx(expected, abs=1e-7)
    assert momentum_at(Momentum(schedule="constant"), 0.5) == 0.996


def test_average_and_half_lives():
    average = 0.0
    for _ in range(3):
        average = 0.9 * average + 0.1
    assert average == pytest.approx(0.271)
    for m, steps in ((0.99, 69.0), (0.996, 172.9), (0.999, 692.8), (0.9999, 6931.1)):
        assert math.log(0.5) / math.log(m) == pytest.approx(steps, abs=0.1)
