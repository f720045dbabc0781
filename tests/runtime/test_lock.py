"""Two runs on one folder: exactly one has it, a dead one's is taken over, a live one's never."""

import errno
import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from cmtmae_scale.errors import EXIT_CONFIG, CmtMaeError, ConfigError, LockLostError
from cmtmae_scale.runtime.lock import RunLock, hold_run, lock_path, newest_number
from tests.engine.run_case import write_recipe
from tests.processes import CONTEXT, run_ranks
from tests.runtime.lock_case import hold_and_die, hold_for, hold_together, race, start

ROUNDS = 6


def change(run_dir: Path, **facts: Any) -> None:
    """Change fields of the newest lock, as another host or job would."""
    path = lock_path(run_dir / "lock", newest_number(run_dir / "lock"))
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))


def waited_for(path: Path) -> None:
    for _ in range(3000):
        if path.exists():
            return
        threading.Event().wait(0.01)
    raise AssertionError(f"{path} did not come")


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[Any]:
    """Another process that holds ``tmp_path / run``."""
    ready, stop = tmp_path / "ready", tmp_path / "stop"
    child = CONTEXT.Process(target=hold_for, args=(tmp_path / "run", ready, stop), daemon=True)
    child.start()
    waited_for(ready)
    yield child
    stop.touch()
    child.join(30)


def test_the_second_run_leaves_with_78_and_names_the_holder(tmp_path: Path, holder: Any) -> None:
    with (
        pytest.raises(ConfigError, match=f"in use by pid {holder.pid} on .* since 20") as raised,
        hold_run(tmp_path / "run", 0),
    ):
        pass
    assert raised.value.exit_code == EXIT_CONFIG
    assert str(raised.value).startswith(f"run.output_dir={tmp_path / 'run'} is in use")


def test_a_holder_elsewhere_is_known_by_its_heartbeats(tmp_path: Path, holder: Any) -> None:
    change(tmp_path / "run", pids="another host", host="far")
    with (
        pytest.raises(ConfigError, match=f"in use by pid {holder.pid} on far since"),
        hold_run(tmp_path / "run", 0, patience_s=30),
    ):
        pass


def test_a_holder_elsewhere_without_heartbeats_is_taken_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    left = RunLock(tmp_path, 1000, 1)
    change(tmp_path, pids="another host", host="far")
    os.utime(lock_path(tmp_path / "lock", 1), (4e9, 4e9))  # its clock is years ahead
    with hold_run(tmp_path, 0, patience_s=0.3):
        assert newest_number(tmp_path / "lock") == 2
    assert "was held by pid" in caplog.messages[0] and "on far" in caplog.messages[0]
    assert "no heartbeat" in caplog.messages[1]
    left.release()  # is too late: frees nothing of the new holder's
    assert not lock_path(tmp_path / "lock", 1).exists()


@pytest.mark.gloo
def test_a_killed_holder_is_taken_over_at_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    child = CONTEXT.Process(target=hold_and_die, args=(tmp_path,))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    with hold_run(tmp_path, 0, patience_s=1000):
        pass
    assert f"taking over run.output_dir={tmp_path} from pid {child.pid}" in caplog.text


def test_another_process_with_the_same_number_is_not_the_holder(tmp_path: Path) -> None:
    lock = RunLock(tmp_path, 1000, 1000)
    change(tmp_path, started=1)  # our pid was another process's before
    with hold_run(tmp_path, 0, patience_s=1000):
        pass
    lock.release()


@pytest.mark.parametrize(("restart", "free"), [("1", True), ("0", False)])
def test_a_requeued_job_takes_its_own_lock_over(
    tmp_path: Path, restart: str, free: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    lock = RunLock(tmp_path, 1000, 1)
    change(tmp_path, pids="another host")
    monkeypatch.setenv("SLURM_RESTART_COUNT", restart)
    if free:
        with hold_run(tmp_path, 0, patience_s=1000):
            pass
    else:  # two steps of one job: the other one is alive
        touch = threading.Timer(0.2, os.utime, [lock_path(tmp_path / "lock", 1)])
        touch.start()
        with pytest.raises(ConfigError, match="SLURM job 7"), hold_run(tmp_path, 0, patience_s=10):
            pass
        touch.join()
    lock.release()


@pytest.mark.parametrize("text", ["", "[]", "{", "{}"])
def test_a_lock_of_nobody_is_taken_over_in_the_end(tmp_path: Path, text: str) -> None:
    (tmp_path / "lock").mkdir()
    lock_path(tmp_path / "lock", 4).write_text(text)
    with hold_run(tmp_path, 0, patience_s=0.2):
        assert newest_number(tmp_path / "lock") == 5


def test_released_folders_are_free_and_leave_one_small_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(3):
        with hold_run(tmp_path / "new" / "run", 0, patience_s=1000):
            pass
    assert [path.name for path in (tmp_path / "new/run/lock").iterdir()] == ["00000003.json"]
    assert not caplog.messages


def test_a_holder_that_was_taken_over_stops(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stopped = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda number, frame: stopped.set())
    try:
        slow = RunLock(tmp_path, 0.05, 1)
        lock_path(tmp_path / "lock", 2).write_text("{}")
        slow.thread.join(30)
        assert stopped.wait(30)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "was taken over while this process was suspended" in caplog.text


@pytest.mark.parametrize("loss", ["deleted", "folder deleted", "newer", "same number"])
def test_a_holder_notices_every_kind_of_loss_and_touches_nothing(
    tmp_path: Path, loss: str, caplog: pytest.LogCaptureFixture
) -> None:
    """As after a pause: the next heartbeat comes when the process runs again."""
    stopped = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda number, frame: stopped.set())
    own = lock_path(tmp_path / "lock", 1)
    try:
        slow = RunLock(tmp_path, 1000, 1)
        slow.require()
        other = json.dumps(json.loads(own.read_text()) | {"host": "far", "token": "x"})
        if loss == "folder deleted":
            shutil.rmtree(tmp_path / "lock")
        elif loss == "deleted":
            own.unlink()
        else:
            lock_path(tmp_path / "lock", 2 if loss == "newer" else 1).write_text(other)
        with pytest.raises(LockLostError, match="taken over while this process was suspended"):
            slow.require()
        slow.beat_s, left = 0.01, {path: path.read_text() for path in tmp_path.rglob("*.json")}
        beats = threading.Thread(target=slow.beat)
        beats.start()
        beats.join(30)
        assert stopped.wait(30)
        slow.release()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "stopping without saving" in caplog.text
    assert ("now held by" in caplog.text) == (loss in ("newer", "same number"))
    assert {path: path.read_text() for path in tmp_path.rglob("*.json")} == left


def test_a_store_that_does_not_answer_is_no_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = RunLock(tmp_path, 0.01, 1)

    def failing(*_: Any) -> Any:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr("cmtmae_scale.runtime.lock.newest_number", failing)
        with pytest.raises(OSError, match="Input/output error"):
            lock.require()
        threading.Event().wait(0.1)
    lock.require()
    lock.release()


@pytest.mark.gloo
def test_of_many_starts_at_the_same_moment_exactly_one_wins(tmp_path: Path) -> None:
    for number in range(1, ROUNDS, 2):  # every other folder was left by a dead process
        RunLock(tmp_path / f"{number}", 1000, 1)
        change(tmp_path / f"{number}", started=1)
    results = run_ranks(6, race, tmp_path, ROUNDS)
    assert [sum(won) for won in zip(*results, strict=True)] == [1] * ROUNDS


@pytest.mark.gloo
def test_all_ranks_leave_with_rank_0s_answer(tmp_path: Path) -> None:
    assert run_ranks(3, hold_together, tmp_path / "free") == ["", "", ""]
    with hold_run(tmp_path / "held", 0):
        answers = run_ranks(3, hold_together, tmp_path / "held")
    assert len(set(answers)) == 1
    assert f"is in use by pid {os.getpid()}" in answers[0]


def test_a_folder_that_cannot_be_listed_holds_no_unknown_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    assert newest_number(tmp_path / "absent") == 0
    monkeypatch.setattr(os, "listdir", refuse)
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError):
        newest_number(tmp_path)


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "x")
    for place in (tmp_path / "file" / "run", tmp_path / "file", Path("/proc/run")):
        with (
            pytest.raises(ConfigError, match=f"run.output_dir={place} cannot be used"),
            hold_run(place, 0),
        ):
            pass


def hold_on_a_failing_store(run_dir: Path, number: int) -> int:
    """The exit code of a rank whose lock cannot be written."""
    from cmtmae_scale.runtime import lock

    def refuse(*_: object) -> bool:
        raise OSError(number, os.strerror(number))

    lock.create_lock = refuse
    try:
        with hold_run(run_dir, dist.get_rank()):
            return 0
    except CmtMaeError as error:
        assert os.strerror(number) in str(error)
        return error.exit_code


@pytest.mark.gloo
@pytest.mark.parametrize(
    ("number", "code"), [(errno.ENOSPC, 75), pytest.param(errno.EROFS, 78, marks=pytest.mark.slow)]
)
def test_all_ranks_leave_a_full_store_with_75(tmp_path: Path, number: int, code: int) -> None:
    assert run_ranks(2, hold_on_a_failing_store, tmp_path, number) == [code] * 2


@pytest.mark.gloo
def test_the_refused_command_touches_nothing_of_the_holder(tmp_path: Path) -> None:
    recipe, run_dir = write_recipe(tmp_path), tmp_path / "run"
    with hold_run(run_dir, 0):
        for name in ("exit.json", "config.yaml"):
            (run_dir / name).write_text("the holder's")
        before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
        child = CONTEXT.Process(target=start, args=(recipe,))
        child.start()
        child.join(120)
        assert child.exitcode == EXIT_CONFIG
        assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before
