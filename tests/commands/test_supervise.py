"""The supervisor with stand-ins for launchers and ranks, which start at once."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cmtmae_scale.commands.rank import run_as_rank
from cmtmae_scale.commands.supervise import supervise
from cmtmae_scale.engine.stop import LaunchInterrupted
from cmtmae_scale.errors import EXIT_STOPPED
from cmtmae_scale.runtime.exit_code import SUPERVISOR, common_code

ROOT = Path(__file__).parents[2]
RANK = str(ROOT / "tests" / "commands" / "rank_case.py")
# Launchers: starts ranks in sessions of their own as torchrun does, and waits.
LAUNCH = (
    "import subprocess, sys; n = int(sys.argv[1]); "
    "ranks = [subprocess.Popen(sys.argv[2:], start_new_session=True) for _ in range(n)]; "
    "codes = [rank.wait() for rank in ranks]; sys.exit(int(any(codes)))"
)


def launcher(ranks: int, *rank: object) -> list[str]:
    return [sys.executable, "-c", LAUNCH, str(ranks), sys.executable, RANK, *map(str, rank)]


def command(*words: object, grace: float = 10) -> list[str]:
    supervisor = str(ROOT / "launchers" / "supervise.py")
    return [sys.executable, supervisor, "--grace", str(grace), "--", *map(str, words)]


@contextmanager
def supervised(*words: object, grace: float = 10) -> Iterator[subprocess.Popen[str]]:
    line = command(*words, grace=grace)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    child = subprocess.Popen(line, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


def until(condition: Callable[[], bool], limit_s: float = 20) -> None:
    limit = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.02)


def lines(file: Path) -> list[list[str]]:
    return [line.split() for line in file.read_text().splitlines()] if file.exists() else []


def pids(file: Path) -> set[int]:
    return {int(pid) for pid, _ in lines(file)}


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_reaches_every_rank_once_and_their_code_is_returned(
    tmp_path: Path, name: str
) -> None:
    file = tmp_path / "file"
    with supervised(*launcher(2, file, "stop")) as child:
        until(lambda: len(lines(file)) == 2)
        child.send_signal(signal.Signals[name])
        child.send_signal(signal.Signals[name])
        assert child.wait(20) == 75
    assert sorted(text for _, text in lines(file)) == [name, name, "here", "here"]
    assert not any(map(alive, pids(file)))


@pytest.mark.parametrize(("reported", "expected"), [("78", 78), ("70", 70), ("0", 0), ("crash", 1)])
def test_the_ranks_code_comes_through_whatever_the_launcher_makes_of_it(
    tmp_path: Path, reported: str, expected: int
) -> None:
    with supervised(*launcher(2, tmp_path / "file", reported)) as child:
        assert child.wait(20) == expected


def test_ranks_that_ignore_the_signal_are_killed_after_the_grace(tmp_path: Path) -> None:
    file = tmp_path / "file"
    with supervised(*launcher(2, file, "deaf"), grace=0.5) as child:
        until(lambda: len(lines(file)) == 2)
        child.send_signal(signal.SIGTERM)
        assert child.wait(20) == 1
    assert not any(map(alive, pids(file)))


def test_a_launcher_that_dies_leaves_no_process(tmp_path: Path) -> None:
    """Its ranks become the supervisor's, which waits for them, and passes signals on."""
    file = tmp_path / "file"
    with supervised("sh", "-c", f"{sys.executable} {RANK} {file} stop & sleep 1") as child:
        until(lambda: len(lines(file)) == 1)
        time.sleep(1.5)
        assert child.poll() is None
        child.send_signal(signal.SIGTERM)
        assert child.wait(20) == 75
    assert not any(map(alive, pids(file)))


def test_ranks_left_behind_are_killed_after_the_grace(tmp_path: Path) -> None:
    file = tmp_path / "file"
    line = f"{sys.executable} {RANK} {file} stop & sleep 1"
    with supervised("sh", "-c", line, grace=0.5) as child:
        assert child.wait(20) == 1
    assert lines(file) and not any(map(alive, pids(file)))


def test_a_cleaner_of_the_temporary_folder_finds_no_old_files(tmp_path: Path) -> None:
    """Such as systemd's, which deletes files that are unused for ten days."""
    file, script = tmp_path / "file", "from cmtmae_scale.commands import supervise as command"
    script = f"{script}; command.TOUCH_S = 0.1; command.supervise()"
    line = [sys.executable, "-c", script, "--", sys.executable, RANK, str(file), "stop"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    with subprocess.Popen(line, env=environment) as child:
        try:
            until(lambda: len(lines(file)) == 1)
            (folder,) = tmp_path.glob("supervise-*")
            files = [folder, *folder.iterdir()]
            assert len(files) == 2
            for path in files:
                os.utime(path, (0, 0))
            until(lambda: all(path.stat().st_mtime > 0 for path in files))
        finally:
            child.terminate()
            child.wait(20)


def test_without_its_temporary_folder_it_still_ends_what_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with supervised(*launcher(1, file, "stop"), grace=0.5) as child:
        until(lambda: len(lines(file)) == 1)
        (folder,) = tmp_path.glob("supervise-*")
        shutil.rmtree(folder)
        child.send_signal(signal.SIGTERM)
        try:
            assert child.wait(20) == EXIT_STOPPED
            assert not any(map(alive, pids(file)))
        finally:
            for pid in filter(alive, pids(file)):
                os.kill(pid, signal.SIGKILL)


def test_a_signal_before_the_ranks_start_means_run_again() -> None:
    with supervised("sleep", "60", grace=0.3) as child:
        children = Path(f"/proc/{child.pid}/task/{child.pid}/children")
        until(lambda: bool(children.read_text()))
        child.send_signal(signal.SIGTERM)
        assert child.wait(20) == 75


def test_without_ranks_the_commands_own_code_counts(tmp_path: Path) -> None:
    with supervised(sys.executable, RANK, tmp_path / "file", "nothing") as child:
        assert child.wait(20) == 3


def test_an_absent_command_is_named() -> None:
    done = subprocess.run(command("no-such-launcher"), capture_output=True, text=True)
    assert done.returncode == 78
    assert "no-such-launcher: No such file or directory; correct the command" in done.stderr


def test_no_command_is_a_usage_error() -> None:
    done = subprocess.run(command()[:-1], capture_output=True, text=True)
    assert done.returncode == 78 and "no command; give -- torchrun" in done.stderr


def test_process_1_reaps_and_stops(tmp_path: Path) -> None:
    """In a pid namespace of its own the kernel drops signals that process 1 has no handler for."""
    inside = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    if subprocess.run([*inside, "true"], capture_output=True).returncode:
        pytest.skip("no permission to make a pid namespace")
    file = tmp_path / "file"
    line = [*inside, *command(*launcher(2, file, "stop"))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    child = subprocess.Popen(line, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        until(lambda: len(lines(file)) == 2)
        (first,) = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
        os.kill(int(first), signal.SIGTERM)
        assert child.wait(20) == 75
    finally:
        child.kill()
        child.communicate()


def test_the_gravest_code_counts() -> None:
    assert common_code([75, 78]) == 78
    assert common_code([None, 75, 1]) == 75
    assert common_code([0, 0]) == 0
    assert common_code([1, None]) == 1


@pytest.mark.parametrize(("left", "expected"), [("", 1), ("75", 75), (None, 75)])
def test_a_launcher_that_ends_the_ranks_because_one_died_is_no_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: str | None, expected: int
) -> None:
    """Before the run's folder is known; a rank that a signal ended has recorded its code."""

    def interrupted() -> int:
        raise LaunchInterrupted("SIGTERM")

    monkeypatch.setenv(SUPERVISOR, str(tmp_path))
    monkeypatch.setattr("cmtmae_scale.commands.rank.interrupt_launch", lambda: None)
    gone = subprocess.Popen(["true"])
    gone.wait()
    if left is not None:
        (tmp_path / str(gone.pid)).write_text(left)
    assert run_as_rank(interrupted) == expected
    assert (tmp_path / str(os.getpid())).read_text() == str(expected)


def test_a_full_temporary_folder_is_75(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryDirectory", full)
    monkeypatch.setattr("cmtmae_scale.commands.supervise.set_up_logging", lambda *_: None)
    assert supervise(["--", "true"]) == EXIT_STOPPED
    assert "No space left on device); make room in TMPDIR" in caplog.text
