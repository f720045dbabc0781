"""Launches without progress end with a code that no scheduler retries."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from cmtmae_scale.api.pretrain import own_handlers
from cmtmae_scale.checkpoint.find import find_checkpoint
from cmtmae_scale.checkpoint.layout import folder_of
from cmtmae_scale.engine.ending import Ending
from cmtmae_scale.engine.launches import (
    COUNT_FILE,
    increment_count,
    launches_from,
    reset_launch_count,
    take_back_launch,
)
from cmtmae_scale.engine.stop import LaunchInterrupted, interrupt_launch
from cmtmae_scale.errors import CheckpointError, RankLostError
from cmtmae_scale.runtime.exit_code import EXIT_FILE, read_finished
from tests.checkpoint.save_case import save
from tests.engine.fault_case import (
    build_after_takeover,
    commands_on_ranks,
    leave,
    resume_with_a_readable_image,
)
from tests.engine.run_case import TASKS, write_task_recipe
from tests.processes import run_ranks, started

SHORT = ["checkpoint.every=100", "train.micro_batch_size=8"]
CRASH = ["optimizer.base_lr=1e30", "guard.skip_limit=0", *SHORT]
STOP = ["train.stop_after=1", *SHORT]
LATER = ["train.stop_after=2", *SHORT]


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


@pytest.mark.gloo
@pytest.mark.parametrize("task", TASKS)
def test_a_run_keeps_its_images_though_an_unreadable_one_can_be_read_again(
    tmp_path: Path, task: str
) -> None:
    recipe = write_task_recipe(task, tmp_path)
    assert run_ranks(1, resume_with_a_readable_image, recipe) == [(75, 0)]


@pytest.mark.gloo
def test_a_launch_that_lost_the_folder_while_it_was_built_cuts_no_log(tmp_path: Path) -> None:
    recipe = write_task_recipe(TASKS[0], tmp_path)
    log = tmp_path / "run" / "log.jsonl"
    log.parent.mkdir()
    log.write_text('{"step": 5}\n')  # of the launch that took over
    assert run_ranks(1, build_after_takeover, recipe) == ["taken over"]
    assert log.read_text() == '{"step": 5}\n'


@pytest.mark.gloo
@pytest.mark.parametrize("task", [TASKS[0], pytest.param(TASKS[1], marks=pytest.mark.slow)])
def test_a_launch_after_train_stop_after_trains_nothing_and_says_what_to_change(
    tmp_path: Path, task: str
) -> None:
    recipe = write_task_recipe(task, tmp_path)
    launches = [LATER, LATER, STOP, SHORT, LATER]
    (codes,) = run_ranks(1, commands_on_ranks, recipe, launches[:3])
    assert codes == [75, 0, 0]
    record = json.loads((tmp_path / "run" / "exit.json").read_text())
    assert record["code"] == 0 and record["step"] == 2
    assert record["reason"].startswith(
        "train.stop_after=1 is reached already: the run is at step 2"
    )
    assert record["reason"].endswith("raise or remove train.stop_after to continue")
    assert not (tmp_path / "run" / "result.json").exists()
    assert run_ranks(1, commands_on_ranks, recipe, launches[3:]) == [[0, 0]]
    assert json.loads((tmp_path / "run" / "exit.json").read_text())["reason"] == "done"


@pytest.mark.parametrize(
    ("reason", "advice"),
    [
        ("SIGTERM", "the same command continues"),
        ("train.stop_after=4", "raise or remove train.stop_after to continue"),
        ("file STOP", "run/STOP, then the same command continues"),
    ],
)
def test_the_last_line_names_what_continues(tmp_path: Path, reason: str, advice: str) -> None:
    assert Ending(tmp_path / "run", 0).advice(reason).endswith(advice)


def copy_checkpoint(root: Path, step: int, name: int) -> None:
    """A checkpoint that holds a run's progress, under a name of another step."""
    folder = save(root, step, state={"progress": {"step": step, "position": 8 * step}})
    shutil.copytree(folder, folder_of(root, name))


def test_a_renamed_copy_of_a_checkpoint_is_named_and_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "checkpoints"
    copy_checkpoint(root, 4, 99)
    assert find_checkpoint(root, 0, 1) == folder_of(root, 4)
    assert "step-00000099: holds step 4: it is a renamed copy; delete it" in caplog.text
    assert "step-00000004" in caplog.text
    assert [increment_count(tmp_path) for _ in range(4)][-1].count("at step 4 ") == 1
    save(root, 5, state={"progress": {"step": 5, "position": 40}})
    assert increment_count(tmp_path) == ""  # the copy does not hide the progress
    shutil.rmtree(folder_of(root, 4))
    shutil.rmtree(folder_of(root, 5))
    with pytest.raises(CheckpointError, match="none of 1 checkpoints is intact"):
        find_checkpoint(root, 0, 1)


@pytest.mark.gloo
@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_signal_on_one_rank_before_the_first_step_is_no_crash_of_any(
    tmp_path: Path, victim: int
) -> None:
    recipe, run_dir = write_task_recipe(TASKS[0], tmp_path), tmp_path / "run"
    run_dir.mkdir()
    increment_count(run_dir)  # a launch that crashed
    with started(2, leave, recipe, [], "interrupt", victim) as (children, _):
        for child in children:
            child.join(60)
        assert [child.exitcode for child in children] == [75, 75]
    assert launches_from(run_dir, []) == 1
    record = json.loads((run_dir / "exit.json").read_text())
    assert record["code"] == 75 and "before the first step" in record["reason"]


def test_the_launchers_signal_after_a_rank_died_is_a_crash(tmp_path: Path) -> None:
    """torchrun and deepspeed end all ranks when one dies; ranks that a signal ends leave a mark."""
    outcomes: list[tuple[int, int]] = []
    for dead, is_marked in (([1], False), ([1], True), ([], False)):
        increment_count(tmp_path)
        with (
            pytest.raises((RankLostError, LaunchInterrupted)) as caught,
            Ending(tmp_path, 0) as end,
        ):
            end.launch, end.is_counted, end.find_dead = "abc", True, lambda dead=dead: dead
            if is_marked:
                Ending.mark_interrupted(end)
            raise LaunchInterrupted("SIGTERM")
        is_crash = isinstance(caught.value, RankLostError)
        assert is_crash == (dead == [1] and not is_marked)
        record = json.loads((tmp_path / EXIT_FILE).read_text())
        outcomes.append((record["code"], launches_from(tmp_path, [])))
        assert ("rank 1 died on this machine" in record["reason"]) == is_crash
    assert outcomes == [(1, 1), (75, 1), (75, 1)]


def test_a_signal_while_the_outcome_is_written_does_not_replace_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def struck(ending: Ending) -> bool:
        os.kill(os.getpid(), signal.SIGTERM)
        return False

    monkeypatch.setattr(Ending, "is_interrupted", struck)
    with own_handlers():
        interrupt_launch()
        with pytest.raises(ValueError, match="a bug"), Ending(tmp_path, 0):
            raise ValueError("a bug")
    assert json.loads((tmp_path / EXIT_FILE).read_text())["code"] == 1


def test_an_interrupted_launch_takes_back_its_own_count_alone(tmp_path: Path) -> None:
    for left in (2, 1, 0):
        for _ in range(left + 1):
            assert increment_count(tmp_path) == ""
        take_back_launch(tmp_path)
        assert launches_from(tmp_path, []) == left
        reset_launch_count(tmp_path)
    take_back_launch(tmp_path)
    for damaged in ("[]", '{"checkpoints": [], "count": 1e999}', "[" * 99999):
        (tmp_path / COUNT_FILE).write_text(damaged)
        take_back_launch(tmp_path)  # a damaged count is left to the next launch
        assert launches_from(tmp_path, []) == 0
        (tmp_path / EXIT_FILE).write_text(damaged.replace("count", "code"))
        assert read_finished(tmp_path) is None


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


def test_checkpoints_before_a_damaged_one_are_progress(tmp_path: Path) -> None:
    """The run resumes before the damaged one, and its newest step does not change."""
    root = tmp_path / "checkpoints"
    for step in (9, 15):
        save(root, step)
    for step in (10, 11, 12, 13, 14):
        assert increment_count(tmp_path) == ""  # and is killed after its save
        save(root, step)
    assert [increment_count(tmp_path) for _ in range(3)] == [""] * 3
    assert "ended at step 15 without a new checkpoint" in increment_count(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"checkpoints": 3, "count": 9}', '{"step": 0, "count": 9}']
)
def test_a_damaged_count_refuses_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / COUNT_FILE).write_text(text)
    assert increment_count(tmp_path) == ""
