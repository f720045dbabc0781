"""Launches without progress end in a code that no scheduler tries again."""

import json
from pathlib import Path

import pytest

from cmtmae_scale.engine.launches import COUNT_FILE, increment_count, reset_launch_count
from tests.checkpoint.save_case import save
from tests.engine.fault_case import commands_on_ranks
from tests.engine.run_case import TASKS, write_task_recipe
from tests.processes import run_ranks

CRASH = ["optimizer.base_lr=1e30", "guard.skip_limit=0", "checkpoint.every=100"]
STOP = ["train.stop_after=1", "checkpoint.every=100"]
LATER = ["train.stop_after=2", "checkpoint.every=100"]


@pytest.mark.gloo
@pytest.mark.parametrize(
    ("task", "size"),
    [(TASKS[0], 1), *(pytest.param(task, 2, marks=pytest.mark.slow) for task in TASKS)],
)
def test_the_fourth_launch_after_three_crashes_is_refused_with_70(
    tmp_path: Path, task: str, size: int
) -> None:
    recipe = write_task_recipe(task, tmp_path)
    allowed = "run.allow_change=[optimizer.base_lr]"
    changed = [[*start, allowed] for start in (CRASH, CRASH, CRASH, LATER, LATER)]
    codes = run_ranks(size, commands_on_ranks, recipe, [CRASH, STOP, *changed])
    # A stopped launch resets the count; from the limit on even a good launch is refused.
    assert codes == [[1, 75, 1, 1, 1, 70, 70]] * size
    records = (tmp_path / "run" / "starts.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in records] == [0, 0, 1, 1, 1]
    assert json.loads(records[1])["overrides"] == STOP


def test_a_newer_checkpoint_begins_the_count_anew(tmp_path: Path) -> None:
    assert [increment_count(tmp_path) for _ in range(3)] == [""] * 3
    save(tmp_path / "checkpoints", 1)
    assert [increment_count(tmp_path) for _ in range(3)] == [""] * 3
    problem = increment_count(tmp_path)
    assert (
        "3 consecutive launches ended at step 1" in problem
        and str(tmp_path / COUNT_FILE) in problem
    )
    reset_launch_count(tmp_path)
    assert increment_count(tmp_path) == ""


@pytest.mark.parametrize("text", ["", "{", "[]", '{"step": "x", "count": 9}'])
def test_a_damaged_count_refuses_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / COUNT_FILE).write_text(text)
    assert increment_count(tmp_path) == ""
