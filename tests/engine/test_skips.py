"""Skipped steps, roll-backs, and giving up."""

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cmtmae_scale.checkpoint import layout
from cmtmae_scale.config.schema import Guard
from cmtmae_scale.engine.skips import FEWEST, Skips
from tests.engine.fault_case import incidents, run_each
from tests.engine.run_case import STEPS, TASKS, read_log, write_task_recipe
from tests.processes import run_ranks

NAN = float("nan")
TWO = ["guard.skip_limit=2", "checkpoint.keep=9"]
SPIKES = ["train.steps=18", "guard.spike_factor=10", "checkpoint.every=100"]
CASES = {
    "one": ([], {3: NAN}),
    "infinite": ([], {3: math.inf}),
    "stretch": (TWO, {3: NAN, 4: NAN}),
    "between entries": ([*TWO, "log.every=4"], {3: NAN, 4: NAN}),
    "measured": ([*TWO, "log.diagnostics_every=2"], {3: NAN, 4: NAN}),
    "beyond a save": (TWO, {4: NAN, 5: NAN}),
    "hopeless": ([*TWO, "guard.rollback_limit=1"], dict.fromkeys(range(3, 99), NAN)),
    "none allowed": (["guard.skip_limit=0"], {3: NAN}),
    "no checkpoint": (["guard.skip_limit=1"], {1: NAN}),
    "spike": (SPIKES, {18: 10.0}),
    "spike without a bound": (SPIKES[:1] + SPIKES[2:], {18: 10.0}),
}


# The engine is the same for both tasks: most cases of fine-tuning are rare.
either = pytest.mark.parametrize("seen", TASKS, indirect=True)
mostly = pytest.mark.parametrize(
    "seen", [TASKS[0], pytest.param(TASKS[1], marks=pytest.mark.slow)], indirect=True
)


@pytest.fixture(scope="module")
def seen(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, list[Any]]]:
    """A case on two ranks, with rank 1's losses changed: its folder and the ranks' views."""
    folder = tmp_path_factory.mktemp("skips")
    recipe = write_task_recipe(request.param, folder)

    @functools.cache
    def run_case(name: str) -> tuple[Path, list[Any]]:
        overrides, change = CASES[name]
        cases = [([f"run.output_dir={folder / name}", *overrides], change)]
        ranks = run_ranks(2, run_each, recipe, cases, 1)
        return folder / name, [rank[0] for rank in ranks]

    return run_case


@mostly
@pytest.mark.gloo
@pytest.mark.parametrize("name", ["one", pytest.param("infinite", marks=pytest.mark.slow)])
def test_a_step_that_is_not_finite_changes_nothing_on_any_rank(seen: Any, name: str) -> None:
    folder, ranks = seen(name)
    for view in ranks:
        assert view["error"] == ""
        assert view["states"][3] == (False, True)  # not applied; every state has the same bits
        assert all(view["states"][n] == (True, False) for n in (2, 4, 5, 6))
        assert (view["progress"]["step"], view["progress"]["applied"]) == (STEPS, STEPS - 1)
    (line,) = incidents(folder)
    assert (line["step"], line["incident"], line["in_succession"]) == (3, "step skipped", 1)
    assert line["why"].startswith("step 3: not finite on ranks 1: loss/total")
    assert [entry["step"] for entry in read_log(folder) if "loss/total" in entry] == [1, 2, 4, 5, 6]


@mostly
@pytest.mark.gloo
def test_after_too_many_in_a_row_the_run_goes_back_and_on_with_later_data(seen: Any) -> None:
    folder, ranks = seen("stretch")
    for view in ranks:
        assert view["error"] == ""
        assert sorted(view["states"]) == list(range(1, STEPS + 3))  # steps 3 to 6 on later data
        assert view["progress"] == {
            "step": STEPS, "applied": STEPS, "step0": 2, "position0": 4 * 8,
            "position": (STEPS + 2) * 8, "end_step": STEPS, "horizon": (STEPS + 2) * 8,
        }  # fmt: skip
    kinds = [line["incident"] for line in incidents(folder)]
    assert kinds == ["step skipped", "step skipped", "rolled back"]
    assert (incidents(folder)[2]["to_step"], incidents(folder)[2]["position"]) == (2, 32)
    losses = [entry for entry in read_log(folder) if "loss/total" in entry]
    assert [entry["step"] for entry in losses] == list(range(1, STEPS + 1))
    # A restart from there would not meet the stretch again.
    saved = layout.read_state(layout.folder_of(folder / "checkpoints", 2))
    assert saved["progress"]["position"] == 32 and saved["progress"]["step"] == 2


@pytest.mark.slow
@either
@pytest.mark.gloo
def test_going_back_keeps_the_values_that_are_not_logged_yet(seen: Any) -> None:
    """Those of steps 1 and 2, for the entry of step 4."""
    folder, _ = seen("between entries")
    saved = layout.read_state(layout.folder_of(folder / "checkpoints", 2))
    assert saved["progress"]["position"] == 32  # written anew by the roll-back
    assert saved["log_interval"]["counts"]["loss/total"] == 2


@pytest.mark.gloo
@pytest.mark.parametrize("seen", TASKS[:1], indirect=True)
def test_going_back_measures_no_step_twice(seen: Any) -> None:
    """Step 2, to which the run rolls back after step 4, which was due."""
    folder, _ = seen("measured")
    measured = [line["step"] for line in read_log(folder) if "diagnostics/time_fraction" in line]
    assert measured == [2, 4, 6]


@pytest.mark.slow
@either
@pytest.mark.gloo
def test_nothing_is_saved_between_steps_that_are_left_out(seen: Any) -> None:
    """A checkpoint of step 4 would hold the cause."""
    folder, ranks = seen("beyond a save")
    assert [view["error"] for view in ranks] == ["", ""]
    assert incidents(folder)[-1]["to_step"] == 2


@mostly
@pytest.mark.gloo
def test_a_run_that_fails_on_all_data_is_given_up(seen: Any) -> None:
    folder, ranks = seen("hopeless")
    for view in ranks:
        assert (
            "given up: the run rolled back to step 2 1 times (guard.rollback_limit)"
            in view["error"]
        )
        assert sorted(view["states"]) == list(range(1, 7))
    assert layout.find_damage(layout.folder_of(folder / "checkpoints", 2)) is None


@mostly
@pytest.mark.gloo
def test_the_first_one_ends_a_run_that_allows_none(seen: Any) -> None:
    _, ranks = seen("none allowed")
    for view in ranks:
        assert view["error"].startswith("step 3: not finite on ranks 1: loss/total")
        assert view["progress"]["step"] == 2


@mostly
@pytest.mark.gloo
def test_without_a_checkpoint_there_is_no_going_back(seen: Any) -> None:
    _, ranks = seen("no checkpoint")
    assert all("there is no checkpoint yet to roll back to" in view["error"] for view in ranks)


@mostly
@pytest.mark.gloo
def test_a_spike_is_left_out_where_a_bound_is_set(seen: Any) -> None:
    folder, ranks = seen("spike")
    assert [view["states"][18] for view in ranks] == [(False, True)] * 2
    (line,) = incidents(folder)
    assert "guard.spike_factor=10" in line["why"] and line["step"] == 18


@pytest.mark.slow
@either
@pytest.mark.gloo
def test_a_spike_is_taken_where_no_bound_is_set(seen: Any) -> None:
    folder, ranks = seen("spike without a bound")
    assert [view["states"][18] for view in ranks] == [(True, False)] * 2
    assert incidents(folder) == []


def test_the_bound_is_the_median_and_a_robust_spread() -> None:
    skips = Skips(Guard(spike_factor=4.0))
    for loss in [2.0, 1.0, 3.0] * 6 + [1000.0]:
        skips.record_applied(loss)
    assert skips.bound() == pytest.approx(2.0 + 4.0 * 1.4826)
    assert skips.find_spike(7.9) is None and skips.find_spike(math.nan) is None
    assert skips.find_spike(8.0) is not None


def test_a_steady_loss_still_has_a_spread() -> None:
    skips = Skips(Guard(spike_factor=5.0))
    for _ in range(FEWEST):
        assert skips.bound() == math.inf
        skips.record_applied(2.0)
    assert skips.bound() == pytest.approx(2.1)


def test_a_jump_of_a_schedule_begins_a_new_bound() -> None:
    skips = Skips(Guard(spike_factor=5.0))
    for number in range(40):
        skips.expect([0.5 + 0.001 * number, 0.5])
        skips.record_applied(2.0)
    assert len(skips.losses) == 40
    skips.expect([1.0, 0.5])
    assert skips.bound() == math.inf


def test_what_is_saved_continues_the_count() -> None:
    one, other = Skips(Guard(spike_factor=5.0)), Skips(Guard(spike_factor=5.0))
    for number in range(200):
        one.expect([0.5, 0.5])
        one.record_applied(1 / (number + 1))
    one.record_skip()
    other.restore(one.to_dict(), 200)
    assert other.to_dict() == one.to_dict() and other.bound() == one.bound()


def test_losses_of_other_settings_are_no_bound() -> None:
    """An allowed change, such as of ``loss.type``, may make every later loss larger."""
    one, other = Skips(Guard(spike_factor=5.0)), Skips(Guard(spike_factor=5.0))
    for _ in range(FEWEST):
        one.record_applied(2.0)
    other.changed_step = 16
    other.restore(one.to_dict(), 16)  # at the launch, and at a roll-back before the next save
    assert other.bound() == math.inf
    other.restore(one.to_dict(), 18)  # at a roll-back to a checkpoint of this launch
    assert other.bound() == one.bound()


@pytest.mark.gloo
def test_an_allowed_change_may_raise_the_loss(tmp_path: Path) -> None:
    recipe = write_task_recipe(TASKS[0], tmp_path)
    bound = ["train.steps=20", "guard.spike_factor=1", "guard.skip_limit=1", "train.stop_after=16"]
    allowed = ["optimizer.weight_decay=0.1", "run.allow_change=[optimizer.weight_decay]"]
    cases = [(bound, {}), ([*bound[:3], *allowed], dict.fromkeys(range(17, 21), 10.0))]
    ((_, view),) = run_ranks(1, run_each, recipe, cases, 0)
    assert (view["error"], view["progress"]["applied"]) == ("", 20)
