"""Which rank is slower than the others, and that small differences are not reported."""

import time
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from cmtmae_scale.engine.stragglers import Stragglers
from tests.processes import run_ranks


def judged(own_s: list[list[float]]) -> list[str | None]:
    stragglers = Stragglers(torch.device("cpu"), 1)
    return [stragglers.name_slowest(one, 1.0) for one in own_s]


def test_a_rank_that_is_slow_for_long_is_named_once() -> None:
    found = judged([[0.2, 0.2, 0.5, 0.2]] * 5)
    assert [text is not None for text in found] == [False, False, True, False, False]
    assert found[2] is not None and found[2].startswith("rank 2 takes 0.5 s per step")


def test_a_rank_that_recovers_and_falls_back_is_named_again() -> None:
    slow, fine = [0.2, 0.5], [0.2, 0.2]
    found = judged([slow] * 3 + [fine] + [slow] * 3)
    assert [number for number, text in enumerate(found) if text] == [2, 6]


@pytest.mark.parametrize("case", [[0.20, 0.28, 0.2], [0.001, 0.05, 0.001]])
def test_less_than_half_more_or_than_a_tenth_of_the_step_is_not_told(case: list[float]) -> None:
    assert judged([case] * 10) == [None] * 10


def test_no_false_alarm_in_a_thousand_noisy_intervals() -> None:
    """A rank's means scatter by an eighth here."""
    generator = np.random.default_rng(0)
    noisy = (0.3 * generator.gamma(60, 1 / 60, (1000, 8))).tolist()
    assert judged(noisy) == [None] * 1000


class Event:
    """An event of a GPU at a time in milliseconds, which the device has passed or not."""

    def __init__(self, at_ms: float, passed: bool = True) -> None:
        self.at_ms, self.passed = at_ms, passed

    def query(self) -> bool:
        return self.passed

    def elapsed_time(self, other: "Event") -> float:
        return other.at_ms - self.at_ms


def test_a_lap_that_the_device_has_not_ended_counts_in_the_next_interval(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cmtmae_scale.engine.stragglers.ranks", lambda: 2)
    measured: Any = Stragglers(torch.device("cpu"), 1, rank=1)
    late = Event(1500, passed=False)
    measured.laps = [(Event(0), Event(250)), (Event(1000), late)]
    assert measured.own_seconds(1).tolist()[:2] == [0.0, 0.25]
    late.passed = True
    assert measured.own_seconds(2).tolist()[:2] == [0.0, 0.5]
    assert measured.laps == []


def test_one_rank_keeps_no_events() -> None:
    """Without a GPU an event could not even be made."""
    alone = Stragglers(torch.device("cuda"), 1)
    with alone.own_time():
        pass
    assert alone.laps == []


def slow_on_the_last(intervals: int) -> list[str | None]:
    stragglers = Stragglers(torch.device("cpu"), 2, dist.get_rank())
    found = []
    for step in range(1, 2 * intervals + 1):
        with stragglers.own_time():
            time.sleep(0.05 if dist.get_rank() == dist.get_world_size() - 1 else 0.001)
        own_s = stragglers.own_seconds(step)
        if len(own_s):
            dist.all_reduce(own_s)
        found.append(stragglers.compare_ranks(own_s.tolist()))
    return found


@pytest.mark.gloo
def test_every_rank_learns_which_one_is_slow() -> None:
    one, two = run_ranks(2, slow_on_the_last, 4)
    assert one == two
    assert [number for number, text in enumerate(one) if text] == [5]
    assert one[5].startswith("rank 1 takes")
