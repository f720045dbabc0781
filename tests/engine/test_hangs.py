"""Ranks that die or stall: the others name them, and exit without waiting for them."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from cmtmae_scale.engine import watchdog
from cmtmae_scale.engine.watchdog import SLOW_STAGE_FACTOR, Place, Watchdog
from cmtmae_scale.runtime.lock import identify_process
from cmtmae_scale.runtime.processes import process_status
from tests.engine.fault_case import command_on_ranks, incidents
from tests.engine.run_case import TASKS, write_task_recipe
from tests.processes import run_ranks, started

ENDLESS = "train.steps=100000"


def left(recipe: Path, fault: str, *overrides: str) -> tuple[list[int | None], Path]:
    """Exit codes of two ranks of which the second meets a fault (``None``: still running)."""
    run_dir = recipe.parent / "run"
    line = [f"run.output_dir={run_dir}", ENDLESS, "checkpoint.every=100000", *overrides]
    with started(2, command_on_ranks, recipe, line, fault, 1) as (children, _):
        children[0].join(60)
        if fault != "freeze":
            children[1].join(30)
        codes = [child.exitcode for child in children]
        if codes[1] is None:
            children[1].kill()
        return codes, run_dir


@pytest.mark.gloo
@pytest.mark.parametrize("task", [TASKS[0], pytest.param(TASKS[1], marks=pytest.mark.slow)])
def test_a_rank_that_is_killed_ends_the_others(tmp_path: Path, task: str) -> None:
    codes, run_dir = left(write_task_recipe(task, tmp_path), "kill")
    assert codes == [1, -9]
    record = json.loads((run_dir / "exit.json").read_text())
    assert record["code"] == 1 and record["step"] >= 1 and record["reason"]


@pytest.mark.gloo
@pytest.mark.parametrize("task", [TASKS[0], pytest.param(TASKS[1], marks=pytest.mark.slow)])
def test_a_rank_that_stands_still_is_named_and_ends_the_others(tmp_path: Path, task: str) -> None:
    codes, run_dir = left(write_task_recipe(task, tmp_path), "freeze", "guard.hang_seconds=3")
    assert codes == [1, None]
    (line,) = incidents(run_dir)
    assert line["incident"] == "ended"
    assert "no progress for" in line["why"] and "no heartbeat from rank 1" in line["why"]
    assert json.loads((run_dir / "exit.json").read_text())["reason"] == line["why"]
    assert "in train" in (run_dir / "stacks" / "rank-00000.txt").read_text()


@pytest.mark.gloo
@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_a_rank_that_waits_for_something_is_named_and_its_stack_shows_it(
    tmp_path: Path, task: str
) -> None:
    codes, run_dir = left(write_task_recipe(task, tmp_path), "sleep", "guard.hang_seconds=4")
    assert codes == [1, 1]
    (line,) = incidents(run_dir)
    assert "rank 1 is behind, at step 1, micro-step 2, data" in line["why"]  # drawn ahead
    assert "in slow" in (run_dir / "stacks" / "rank-00001.txt").read_text()


def dog(folder: Path, ranks: list[dict[str, Any]], hang_s: float | None, place: Place) -> Any:
    """A watchdog that reports its last message instead of ending the tests."""
    words: list[str] = []
    made = Watchdog(folder, 0, place, hang_s, ranks, words.append)
    return made, words


def test_a_neighbour_that_dies_is_seen_without_any_collective(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on GPUs, where a rank waits in a kernel and no connection breaks."""
    monkeypatch.setattr(watchdog, "TICK_S", 0.05)
    ended = threading.Event()
    monkeypatch.setattr(os, "_exit", lambda code: ended.set())
    neighbour = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    me, started_at = identify_process(), process_status(neighbour.pid)
    assert started_at is not None
    other = me | {"pid": neighbour.pid, "started": started_at.started}
    elsewhere = me | {"pids": "another machine", "pid": 1, "started": 0}
    watching, words = dog(tmp_path, [me, other, elsewhere], None, Place())
    watching.start()
    assert not ended.wait(0.3)
    neighbour.kill()
    assert ended.wait(10)
    neighbour.communicate()
    assert words == ["rank 1 died on this machine"]
    assert (tmp_path / "stacks" / "rank-00000.txt").read_text().startswith("rank 0, step 0")


def beat_of(folder: Path, rank: int, count: int, place: list[int]) -> None:
    (folder / "heartbeats" / f"{rank:05d}").write_text(json.dumps({"beat": count, "place": place}))


@pytest.mark.parametrize(
    ("third", "expected"),
    [
        (None, "no heartbeat from rank 2"),
        ([7, 1, 0], "rank 2 is behind, at step 7, micro-step 1, data"),
        ([7, 1, 1], "all ranks are at the same place"),
    ],
)
def test_late_ranks_are_named_by_what_they_tell(
    tmp_path: Path, third: list[int] | None, expected: str
) -> None:
    """No clock of another machine is read: a heartbeat that changes is one."""
    (tmp_path / "heartbeats").mkdir()
    me = identify_process()
    watching, _ = dog(tmp_path, [me | {"pids": str(n)} for n in range(3)], 1.0, Place())
    watching.place.enter("compute", 7, 1)
    counts = iter(range(1, 1000))

    def others(*_: Any) -> bool:
        count = next(counts)
        beat_of(tmp_path, 1, count, [7, 1, 1])
        beat_of(tmp_path, 2, 1 if third is None else count, third or [7, 1, 1])
        return False

    others()
    watching.beat_s = 0.05
    watching.beat()
    with mock.patch.object(watching.over, "wait", others):
        assert watching.name_late() == expected


@pytest.mark.gloo
def test_a_rank_that_stalls_while_building_is_named_and_ends_the_others(tmp_path: Path) -> None:
    codes, run_dir = left(write_task_recipe(TASKS[0], tmp_path), "stall", "guard.hang_seconds=0.6")
    assert codes == [1, 1]
    reason = json.loads((run_dir / "exit.json").read_text())["reason"]
    assert "no progress for" in reason
    assert "rank 1 is behind, at step 0, micro-step 0, checkpoint" in reason
    assert "in struck" in (run_dir / "stacks" / "rank-00001.txt").read_text()


@pytest.mark.parametrize(
    ("work", "waits", "expected"),
    [
        ([0.0, 0], [True, True, True], "all ranks are at the same place"),
        ([0.0, 0], [True, True, False], "rank 2 is behind, at step 0, micro-step 0, index"),
        ([9.0, 0], [True, True, False], ""),  # it lists the images, however long that takes
        ([0.0, 10**9], [True, True, False], ""),  # it fetches weights
    ],
)
def test_while_building_a_rank_that_works_is_waited_for(
    tmp_path: Path,
    work: list[float],
    waits: list[bool],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "heartbeats").mkdir()
    me = identify_process()
    watching, _ = dog(tmp_path, [me | {"pids": str(n)} for n in range(3)], 1.0, Place())
    watching.place.enter("index", 0)
    counts = iter(range(1, 1000))
    monkeypatch.setattr(watchdog.time, "process_time", lambda: 0.0)
    monkeypatch.setattr(watchdog, "bytes_moved", lambda: 0)  # this loop never waits

    def others(*_: Any) -> bool:
        count = next(counts)
        watching.beat()
        for rank in (1, 2):
            facts = {"beat": count, "place": [0, 0, -4], "waits": waits[rank]}
            facts["work"] = [part * count for part in work] if rank == 2 else [0.0, 0]
            (tmp_path / "heartbeats" / f"{rank:05d}").write_text(json.dumps(facts))
        return False

    watching.beat_s = 0.05
    monkeypatch.setattr(watchdog.is_waiting, "is_set", lambda: waits[0])
    others()
    with mock.patch.object(watching.over, "wait", others):
        assert watching.name_late() == expected


def test_the_first_step_after_a_build_has_the_long_limit() -> None:
    place = Place()
    for stage in watchdog.BUILD_STAGES:
        place.enter(stage, 0)
    place.enter("data", 1)
    assert place.limit_s(10.0) == 10 * SLOW_STAGE_FACTOR


def test_the_first_step_saves_and_evaluations_may_take_longer() -> None:
    place = Place()
    limits = []
    for stage, step in [("data", 1), ("update", 1), ("save", 1), ("data", 2), ("evaluation", 2)]:
        place.enter(stage, step)
        limits.append(place.limit_s(10.0))
    assert limits == [
        10 * SLOW_STAGE_FACTOR,
        10 * SLOW_STAGE_FACTOR,
        10 * SLOW_STAGE_FACTOR,
        10.0,
        10 * SLOW_STAGE_FACTOR,
    ]


@pytest.mark.gloo
@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_a_run_that_ends_well_is_not_disturbed(tmp_path: Path, task: str) -> None:
    recipe = write_task_recipe(task, tmp_path)
    assert run_ranks(2, command_on_ranks, recipe, ["guard.hang_seconds=60"]) == [0, 0]
    assert json.loads((tmp_path / "run" / "exit.json").read_text())["code"] == 0
    assert not (tmp_path / "run" / "stacks").exists()
    assert sorted(p.name for p in (tmp_path / "run" / "heartbeats").iterdir()) == ["00000", "00001"]
