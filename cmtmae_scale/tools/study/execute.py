"""Run the missing commands of a study until all are done, time is up, or a signal arrives."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from types import FrameType

from cmtmae_scale.checkpoint.layout import is_finite
from cmtmae_scale.engine.summary import read_entries
from cmtmae_scale.errors import EXIT_DONE, EXIT_STOPPED, ConfigError
from cmtmae_scale.runtime.lock import refuse_living_holder
from cmtmae_scale.runtime.storage import append_line, optional_write
from cmtmae_scale.tools.study.work import Job, Run

logger = logging.getLogger(__name__)

PAUSE_S = 0.2
ORPHAN_S = 60.0
"""Seconds in which a training that a killed launch left behind must save and exit."""
OUTPUT, JOBS = "output.log", "jobs.jsonl"


class Outcome(Enum):
    """State of a run after execution."""

    DONE = "done"
    STOPPED = "stopped"
    FAILED = "failed"


class Executor:
    """Runs jobs as subprocesses.

    Args:
        parallel: number of runs at a time.
        minutes: time limit, after which no job starts, and resumable jobs are stopped;
            ``None``: no limit.
    """

    def __init__(self, parallel: int, minutes: float | None) -> None:
        self._parallel = parallel
        self._end = None if minutes is None else time.monotonic() + 60 * minutes
        self._stop = threading.Event()
        self._locks: dict[Path, threading.Lock] = {}
        self._environment = dict(os.environ)
        if parallel > 1:  # oversubscribed cores are slower
            cores = len(os.sched_getaffinity(0))
            self._environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // parallel)))

    def run(self, runs: Sequence[Run]) -> list[Outcome]:
        """Run the missing jobs of each run, in order; a failure stops its own run only."""
        self._locks = {job.output: threading.Lock() for run in runs for job in run.jobs}
        with self._stopping(), ThreadPoolExecutor(self._parallel, "run") as pool:
            return list(pool.map(self._try_finish, runs))

    @contextmanager
    def _stopping(self) -> Iterator[None]:
        """Stop the jobs at SIGTERM and SIGINT, then this process."""

        def stop(number: int, frame: FrameType | None) -> None:
            self._stop.set()

        numbers = (signal.SIGTERM, signal.SIGINT)
        before = {number: signal.signal(number, stop) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _try_finish(self, run: Run) -> Outcome:
        """Run a run's missing jobs; results that cannot be used fail this run, not the others."""
        try:
            return self._finish(run)
        except ConfigError as error:
            logger.error("%s, seed %d: %s", run.row, run.seed, error)
            return Outcome.FAILED

    def _finish(self, run: Run) -> Outcome:
        """Run a run's missing jobs; in a thread."""
        for job in run.missing():
            with self._locks[job.output]:
                self._await_orphan(job)
                if job.done():  # by another run, or the orphan, in the meantime
                    continue
                if self._time_is_up():
                    return Outcome.STOPPED
                code = self._run(run, job)
            if job.done():
                continue
            if code == EXIT_STOPPED or self._time_is_up():
                return Outcome.STOPPED
            text = "%s, seed %d: %s ended with exit code %d; see %s"
            logger.error(text, run.row, run.seed, job.kind, code, run.folder / OUTPUT)
            return Outcome.FAILED
        return Outcome.DONE

    def _await_orphan(self, job: Job) -> None:
        """Wait for a training that a killed launch of the study left behind; it stops by itself."""
        end, has_logged = time.monotonic() + ORPHAN_S, False
        while time.monotonic() < end and not self._time_is_up():
            try:
                return refuse_living_holder(job.output)
            except ConfigError as error:
                if not has_logged:
                    logger.info("waiting: %s", error)
                has_logged = True
            time.sleep(PAUSE_S)

    def _time_is_up(self) -> bool:
        return self._stop.is_set() or (self._end is not None and time.monotonic() >= self._end)

    def _run(self, run: Run, job: Job) -> int:
        """Run one job until it ends or time is up; returns its exit code."""
        run.folder.mkdir(parents=True, exist_ok=True)
        logger.info("%s, seed %d: %s", run.row, run.seed, job.command)
        began = time.monotonic()
        with (run.folder / OUTPUT).open("a") as output:
            process = subprocess.Popen(
                [sys.executable, *job.arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,  # a keyboard interrupt reaches this process alone
            )
            signalled = False
            while process.poll() is None:
                time.sleep(PAUSE_S)
                is_due = self._time_is_up() if job.resumable else self._stop.is_set()
                if is_due and not signalled:
                    process.send_signal(signal.SIGTERM)
                    signalled = True
        record_job(run.folder, job, process.returncode, time.monotonic() - began)
        return process.returncode


def record_job(folder: Path, job: Job, code: int, seconds: float) -> None:
    """Append a job's exit code and duration to a file in the run's folder."""
    entry = {"kind": job.kind, "code": code, "seconds": round(seconds, 1)}
    with optional_write(folder / JOBS):
        append_line(folder / JOBS, json.dumps(entry | {"command": job.command}))


def training_minutes(run: Run) -> float | None:
    """Return the wall time of a run's training over all launches; ``None``: not recorded.

    Lines that cannot be read are skipped.
    """
    entries = [one for one in read_entries(run.folder / JOBS) if one.get("kind") == "train"]
    seconds = [one["seconds"] for one in entries if is_finite(one.get("seconds"))]
    return sum(seconds) / 60 if seconds else None


def study_exit_code(outcomes: Sequence[Outcome]) -> int:
    """Return a study's exit code: 1 if a run failed, 75 if a job is missing, else 0."""
    if Outcome.FAILED in outcomes:
        return 1
    return EXIT_STOPPED if Outcome.STOPPED in outcomes else EXIT_DONE
