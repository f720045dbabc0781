"""Starts without progress end in a code that no scheduler tries again."""

from pathlib import Path

import pytest

from cmtmae_scale.engine.attempts import FILE, forget_attempts, note_attempt
from tests.checkpoint.save_case import save
from tests.engine.fault_case import commands_on_ranks
from tests.engine.run_case import write_recipe
from tests.processes import run_ranks

CRASH = ["optimizer.base_lr=1e30", "guard.skip_limit=0", "checkpoint.every=100"]
STOP = ["train.stop_after=1", "checkpoint.every=100"]
LATER = ["train.stop_after=2", "checkpoint.every=100"]


@pytest.mark.gloo
def test_the_fourth_start_after_three_crashes_is_refused_with_70(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    allowed = "run.allow_change=[optimizer.base_lr]"
    changed = [[*start, allowed] for start in (CRASH, CRASH, CRASH, LATER, LATER)]
    codes = run_ranks(2, commands_on_ranks, recipe, [CRASH, STOP, *changed])
    # A start that was stopped begins the count anew; from the limit on even a good one is refused.
    assert codes == [[1, 75, 1, 1, 1, 70, 70]] * 2


def test_a_newer_checkpoint_begins_the_count_anew(tmp_path: Path) -> None:
    assert [note_attempt(tmp_path) for _ in range(3)] == [""] * 3
    save(tmp_path / "checkpoints", 1)
    assert [note_attempt(tmp_path) for _ in range(3)] == [""] * 3
    problem = note_attempt(tmp_path)
    assert "3 starts in a row ended at step 1" in problem and str(tmp_path / FILE) in problem
    forget_attempts(tmp_path)
    assert note_attempt(tmp_path) == ""


@pytest.mark.parametrize("text", ["", "{", "[]", '{"step": "x", "count": 9}'])
def test_a_damaged_count_refuses_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    assert note_attempt(tmp_path) == ""
