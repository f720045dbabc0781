"""Jobs run as processes: in order, once, until time is up, and a failure stops its own run."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from cmtmae_scale.errors import EXIT_STOPPED, ConfigError
from cmtmae_scale.tools.study.execute import (
    JOBS,
    Executor,
    Outcome,
    study_exit_code,
    training_minutes,
)
from cmtmae_scale.tools.study.file import load_study
from cmtmae_scale.tools.study.work import Job, Run, plan_runs
from tests.tools.study.study_case import study_tree, write_study

WAITS = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
open(sys.argv[1], "w").close()
time.sleep(60)
"""


def some_run(folder: Path, name: str, *jobs: Job) -> Run:
    """A run of other jobs than the study's, one of which evaluates it."""
    assert any(job.kind == "evaluate" for job in jobs)
    (run, *_) = plan_runs(load_study(write_study(folder, study_tree(folder))))
    return Run(name, 0, folder / name, run.config, jobs, run.linear, run.knn)


def script(kind: str, text: str, result: Path) -> Job:
    return Job(kind, ("-c", text, str(result)), result, result.exists, True)


def writes(kind: str, result: Path, also: str = "") -> Job:
    text = f"import sys; {also}; print('hello'); open(sys.argv[1], 'x').close()"
    return script(kind, text.replace("; ;", ";"), result)


def test_jobs_run_in_order_and_only_those_that_are_missing(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    second = writes("evaluate", b, f"assert __import__('os').path.exists({str(a)!r})")
    run = some_run(tmp_path, "one", writes("train", a), second)
    assert Executor(1, None).run([run]) == [Outcome.DONE]
    assert a.exists() and b.exists()
    assert (run.folder / "output.log").read_text() == "hello\n" * 2
    entries = [json.loads(line) for line in (run.folder / JOBS).read_text().splitlines()]
    assert [(one["kind"], one["code"]) for one in entries] == [("train", 0), ("evaluate", 0)]
    assert training_minutes(run) == entries[0]["seconds"] / 60
    with (run.folder / JOBS).open("a") as opened:
        opened.write('\n{"kind": "tra\n[]\n{"kind": "train", "seconds": 1e999}')
    assert training_minutes(run) == entries[0]["seconds"] / 60
    (run.folder / JOBS).write_text("".join(json.dumps(one) + "\n" for one in entries))
    assert Executor(1, None).run([run]) == [Outcome.DONE]  # open(.., 'x') would fail
    assert len((run.folder / JOBS).read_text().splitlines()) == 2


def test_what_two_runs_share_is_made_once(tmp_path: Path) -> None:
    shared = writes("cache", tmp_path / "cache", "import time; time.sleep(0.5)")
    names = ("one", "two")
    runs = [
        some_run(tmp_path, n, shared, writes("evaluate", tmp_path / f"{n}.done")) for n in names
    ]
    assert Executor(2, None).run(runs) == [Outcome.DONE] * 2
    made = [run for run in runs if "cache" in (run.folder / JOBS).read_text().split('"')]
    assert len(made) == 1


def test_a_failure_stops_its_own_run_and_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad = script("train", "raise SystemExit(3)", tmp_path / "never")
    after = writes("evaluate", tmp_path / "after")
    runs = [some_run(tmp_path, "bad", bad, after)]
    runs.append(some_run(tmp_path, "good", writes("evaluate", tmp_path / "good.done")))
    outcomes = Executor(1, None).run(runs)
    assert outcomes == [Outcome.FAILED, Outcome.DONE] and study_exit_code(outcomes) == 1
    assert not (tmp_path / "after").exists() and (tmp_path / "good.done").exists()
    expected = f"bad, seed 0: train ended with exit code 3; see {tmp_path / 'bad' / 'output.log'}"
    assert expected in caplog.text


def test_a_result_that_cannot_be_used_stops_its_own_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def is_done() -> bool:
        raise ConfigError("exit.json: cannot be read; delete it")

    damaged = Job("evaluate", ("-c", ""), tmp_path / "damaged", is_done, False)
    runs = [some_run(tmp_path, "bad", damaged)]
    runs += [some_run(tmp_path, n, writes("evaluate", tmp_path / n)) for n in ("a.done", "b.done")]
    assert Executor(1, None).run(runs) == [Outcome.FAILED, Outcome.DONE, Outcome.DONE]
    assert "bad, seed 0: exit.json: cannot be read; delete it" in caplog.text


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file; when it appears, an hour has passed."""
    file, began = tmp_path / "begun", time.monotonic()
    later = lambda: began + 3600 * file.exists()  # noqa: E731
    monkeypatch.setattr("cmtmae_scale.tools.study.execute.time.monotonic", later)
    return file


def test_when_time_is_up_a_training_is_asked_to_stop_and_nothing_begins(
    tmp_path: Path, begun: Path
) -> None:
    long = Job("train", ("-c", WAITS, str(begun)), begun, lambda: False, True)
    runs = [some_run(tmp_path, "long", long, writes("evaluate", tmp_path / "judged"))]
    runs.append(some_run(tmp_path, "next", writes("evaluate", tmp_path / "next.done")))
    outcomes = Executor(1, 10).run(runs)
    assert outcomes == [Outcome.STOPPED] * 2 and study_exit_code(outcomes) == EXIT_STOPPED
    assert begun.exists() and not (tmp_path / "next.done").exists()
    entry = json.loads((runs[0].folder / JOBS).read_text())
    assert entry["code"] == 75


def test_when_time_is_up_an_evaluation_comes_to_its_end(tmp_path: Path, begun: Path) -> None:
    text = "import sys, time; open(sys.argv[1], 'x'); time.sleep(1); open(sys.argv[1] + '2', 'x')"
    end = Path(f"{begun}2")
    slow = Job("evaluate", ("-c", text, str(begun)), begun, end.exists, False)
    run = some_run(tmp_path, "one", slow, writes("evaluate", tmp_path / "f"))
    assert Executor(1, 10).run([run]) == [Outcome.STOPPED]
    assert end.exists() and not (tmp_path / "f").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_everything_and_leaves_handlers_as_they_were(
    tmp_path: Path, number: signal.Signals
) -> None:
    begun = tmp_path / "begun"
    long = Job("evaluate", ("-c", WAITS, str(begun)), begun, lambda: False, False)
    before = signal.getsignal(number)

    def send() -> None:
        while not begun.exists():
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=send)
    sender.start()
    assert Executor(1, None).run([some_run(tmp_path, "long", long)]) == [Outcome.STOPPED]
    sender.join()
    assert signal.getsignal(number) is before


def test_parallel_runs_share_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    text = "import os, sys; open(sys.argv[1], 'w').write(os.environ.get('OMP_NUM_THREADS', '-'))"
    cores = len(os.sched_getaffinity(0))
    for jobs, expected in ((1, "-"), (2, str(max(1, cores // 2)))):
        result = tmp_path / f"threads{jobs}"
        run = some_run(tmp_path, "one", script("evaluate", text, result))
        Executor(jobs, None).run([run])
        assert result.read_text() == expected
