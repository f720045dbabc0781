"""Ways to be stopped: signals at any moment on any rank, time limits, the launcher's death."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cmtmae_scale.checkpoint import layout
from cmtmae_scale.engine import stop
from cmtmae_scale.engine.stop import END_MARGIN_S, StopRequest, find_time_limits
from tests.engine.fault_case import command_on_ranks
from tests.engine.run_case import TASKS, write_recipe, write_task_recipe
from tests.processes import run_ranks

ROOT = Path(__file__).parents[2]
ENDLESS = ["train.steps=100000", "checkpoint.every=7"]


def check_stopped(run_dir: Path, reason: str) -> None:
    """The outcome is written, and the step that it names is saved whole."""
    record = json.loads((run_dir / "exit.json").read_text())
    assert record["code"] == 75 and reason in record["reason"]
    newest = layout.list_checkpoints(run_dir / "checkpoints")[0]
    assert layout.step_of(newest) == record["step"] and layout.find_damage(newest) is None


@pytest.mark.gloo
@pytest.mark.parametrize(
    "times", [pytest.param(2), pytest.param(50, marks=pytest.mark.slow)], ids=["2", "50"]
)
@pytest.mark.parametrize("task", [TASKS[0], pytest.param(TASKS[1], marks=pytest.mark.slow)])
def test_a_signal_on_any_rank_at_any_moment_stops_all_at_the_same_step(
    tmp_path: Path, task: str, times: int
) -> None:
    """The run continues from stop to stop."""
    recipe = write_task_recipe(task, tmp_path)
    steps = [0]
    for number in range(times):
        codes = run_ranks(2, command_on_ranks, recipe, ENDLESS, "stop", number % 2)
        assert codes == [75, 75]
        check_stopped(tmp_path / "run", "SIGTERM" if number % 2 == 0 else "request on another")
        steps.append(json.loads((tmp_path / "run" / "exit.json").read_text())["step"])
        (tmp_path / "run" / "log.jsonl").unlink()
    assert steps == sorted(set(steps))


@pytest.mark.gloo
@pytest.mark.parametrize("task", [TASKS[0], pytest.param(TASKS[1], marks=pytest.mark.slow)])
def test_a_time_limit_stops_all_ranks_and_may_change_at_a_resume(tmp_path: Path, task: str) -> None:
    recipe = write_task_recipe(task, tmp_path)
    for limit in ("0.5", "0.4"):
        line = [*ENDLESS, f"run.time_limit_s={limit}"]
        assert run_ranks(2, command_on_ranks, recipe, line) == [75, 75]
        check_stopped(tmp_path / "run", f"run.time_limit_s={limit}")


def test_slurms_time_limit_leaves_time_for_a_save() -> None:
    end = int(time.time() + END_MARGIN_S + 3600)
    ((name, limit),) = find_time_limits(None, {"SLURM_JOB_END_TIME": str(end)}).items()
    assert "SLURM's time limit" in name
    assert limit == pytest.approx(time.monotonic() + 3600, abs=30)


@pytest.mark.parametrize("off_s", [0, -7200])
def test_a_clock_that_is_wrong_ends_no_run(off_s: int, caplog: pytest.LogCaptureFixture) -> None:
    """By a skewed clock the job would be over before it begins; SLURM's signal ends it then."""
    assert find_time_limits(None, {"SLURM_JOB_END_TIME": str(int(time.time() + off_s))}) == {}
    assert "waiting for SLURM's signal" in caplog.text


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES, errno.ETIMEDOUT])
def test_a_store_that_fails_is_no_request(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    request, stat = StopRequest(tmp_path), os.stat

    def refuse(path: Any, *rest: Any, **options: Any) -> os.stat_result:
        if str(path) == str(tmp_path / "STOP"):
            raise OSError(number, os.strerror(number))
        return stat(path, *rest, **options)

    monkeypatch.setattr(os, "stat", refuse)
    assert request.find_request() is None


CHILD = """
import sys, time
from pathlib import Path
from typing import Any
from cmtmae_scale.engine.stop import StopRequest

request = StopRequest(Path(sys.argv[1]))
print("ready", flush=True)
while not request.is_requested():
    time.sleep(0.02)
Path(sys.argv[1], "reason").write_text(request.reason)
"""
PARENT = """
import subprocess, sys
subprocess.run([sys.executable, *sys.argv[1:]])
"""


def run_under(tmp_path: Path, names: list[str]) -> subprocess.Popen[str]:
    """A process under programs of such names, the outermost first."""
    (tmp_path / "child.py").write_text(CHILD)
    line: list[str] = [str(tmp_path / "child.py"), str(tmp_path)]
    for name in reversed(names):
        (tmp_path / name).write_text(PARENT)
        line = [str(tmp_path / name), *line]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, *line], env=environment, stdout=subprocess.PIPE, text=True
    )


def wait_for(path: Path, limit_s: float = 60) -> None:
    limit = time.monotonic() + limit_s
    while not path.exists():
        assert time.monotonic() < limit, path
        time.sleep(0.02)


@pytest.mark.parametrize(
    "names", [["torchrun"], ["deepspeed", "torch.distributed.run", "supervise.py"]]
)
def test_the_outermost_launchers_death_is_a_request(tmp_path: Path, names: list[str]) -> None:
    launcher = run_under(tmp_path, names)
    assert launcher.stdout is not None and launcher.stdout.readline() == "ready\n"
    launcher.kill()
    wait_for(tmp_path / "reason")
    launcher.communicate()
    assert (tmp_path / "reason").read_text() == f"the launcher, process {launcher.pid}, is gone"


def test_a_shell_that_ends_stops_nothing(tmp_path: Path) -> None:
    """As after ``nohup ... &`` and logging out."""
    shell = run_under(tmp_path, ["shell"])
    assert shell.stdout is not None and shell.stdout.readline() == "ready\n"
    shell.kill()
    time.sleep(0.5)
    assert not (tmp_path / "reason").exists()
    (tmp_path / "STOP").touch()
    wait_for(tmp_path / "reason")
    shell.communicate()
    assert (tmp_path / "reason").read_text() == "file STOP"


def test_one_rank_per_node_looks_for_the_file_once_a_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(stop.time, "monotonic", lambda: clock[0])
    request, other = StopRequest(tmp_path), StopRequest(tmp_path, watches_file=False)
    assert not request.is_requested()
    (tmp_path / "STOP").touch()
    clock[0] += stop.POLL_S / 2
    assert not request.is_requested()
    clock[0] += stop.POLL_S / 2
    assert request.is_requested() and request.reason == "file STOP"
    assert not other.is_requested()


def test_the_first_reason_counts_and_a_second_signal_changes_nothing(tmp_path: Path) -> None:
    request = StopRequest(tmp_path, 1e-9)
    request.handle(signal.SIGUSR1, None)
    request.handle(signal.SIGTERM, None)
    assert request.is_requested() and request.reason == "SIGUSR1"


BINARIES = Path(sys.executable).parent
PYTHON = sys.executable
SUPERVISOR = [PYTHON, str(ROOT / "launchers" / "supervise.py"), "--"]
SUPERVISE = [PYTHON, "-m", "cmtmae_scale", "supervise", "--"]
TORCHRUN = [str(BINARIES / "torchrun"), "--standalone", "--nproc-per-node=2"]
DEEPSPEED = [str(BINARIES / "deepspeed"), "--num_gpus=2"]
SCRIPT = str(ROOT / "launchers" / "pretrain.py")
MODULE = ["cmtmae_scale", "pretrain"]
LAUNCHERS = {
    "python": ([PYTHON, SCRIPT], 75),
    "torchrun": ([*TORCHRUN, SCRIPT], 1),
    "supervisor, python": ([*SUPERVISOR, PYTHON, SCRIPT], 75),
    "supervisor, torchrun": ([*SUPERVISE, *TORCHRUN, "-m", *MODULE], 75),
    "supervisor, deepspeed": ([*SUPERVISE, *DEEPSPEED, "--module", *MODULE], 75),
}
"""Command and its exit code after a signal."""


@contextmanager
def launched(command: list[str], recipe: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The real command under a launcher, in an environment of its own."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PET_")}
    environment = {
        **kept,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(ROOT),
    }
    line = [*command, "--config", str(recipe), *ENDLESS]
    child = subprocess.Popen(
        line, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    try:
        yield child
    finally:
        child.kill()
        child.wait()


def users_of(folder: Path) -> list[int]:
    """Processes that name a folder in their command lines."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(folder).encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


@pytest.mark.gloo
@pytest.mark.slow
@pytest.mark.parametrize("attempt", range(5))
@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_signal_to_the_outermost_command_saves_under_every_launcher(
    tmp_path: Path, name: str, attempt: int
) -> None:
    command, expected = LAUNCHERS[name]
    if "deepspeed" in name and shutil.which(DEEPSPEED[0]) is None:
        pytest.skip("deepspeed is not installed")
    recipe = write_recipe(tmp_path)
    with launched(command, recipe) as child:
        wait_for(tmp_path / "run" / "log.jsonl", 300)
        time.sleep(0.13 * attempt)
        child.send_signal(signal.SIGTERM)
        assert child.wait(120) == expected
    check_stopped(tmp_path / "run", "")
    limit = time.monotonic() + 10
    while users_of(tmp_path):
        assert time.monotonic() < limit
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.gloo
def test_a_run_that_was_taken_over_stops_and_writes_nothing_of_the_folder(tmp_path: Path) -> None:
    recipe, run_dir = write_recipe(tmp_path), tmp_path / "run"
    codes = run_ranks(2, command_on_ranks, recipe, ["checkpoint.every=2"], "takeover", 0)
    assert codes == [78, 78]
    assert not (run_dir / "exit.json").exists()
    assert layout.list_checkpoints(run_dir / "checkpoints") == []
    assert [path.name for path in (run_dir / "lock").iterdir()] == ["00000009.json"]
