"""Run what is missing, some at a time, until it is done, time is up, or somebody says stop."""

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

from cmtmae_scale.errors import EXIT_DONE, EXIT_STOPPED
from cmtmae_scale.tools.study.work import Piece, Run

logger = logging.getLogger(__name__)

PAUSE_S = 0.2
OUTPUT, PIECES = "output.log", "pieces.jsonl"


class Outcome(Enum):
    """How a run stands."""

    DONE = "done"
    STOPPED = "stopped"
    FAILED = "failed"


class Executor:
    """Runs pieces as processes of their own.

    Args:
        jobs: runs at a time.
        minutes: after these no piece begins, and those that go on where they were stopped are asked
            to stop; ``None``: no end.
    """

    def __init__(self, jobs: int, minutes: float | None) -> None:
        self._jobs = jobs
        self._end = None if minutes is None else time.monotonic() + 60 * minutes
        self._stop = threading.Event()
        self._turns: dict[Path, threading.Lock] = {}
        self._environment = dict(os.environ)
        if jobs > 1:  # threads of neighbours that fight for cores cost more than they bring
            cores = len(os.sched_getaffinity(0))
            self._environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // jobs)))

    def run(self, runs: Sequence[Run]) -> list[Outcome]:
        """Run what each run lacks, in order; a failure stops its own run only."""
        self._turns = {piece.place: threading.Lock() for run in runs for piece in run.pieces}
        with self._stopping(), ThreadPoolExecutor(self._jobs, "run") as pool:
            return list(pool.map(self._finish, runs))

    @contextmanager
    def _stopping(self) -> Iterator[None]:
        """Let SIGTERM and an interrupt from the keyboard stop the pieces, then us."""

        def stop(number: int, frame: FrameType | None) -> None:
            self._stop.set()

        numbers = (signal.SIGTERM, signal.SIGINT)
        before = {number: signal.signal(number, stop) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _finish(self, run: Run) -> Outcome:
        """Run a run's missing pieces; in a thread."""
        for piece in run.missing():
            with self._turns[piece.place]:
                if piece.done():  # another run brought it meanwhile
                    continue
                if self._time_is_up():
                    return Outcome.STOPPED
                code = self._run(run, piece)
            if piece.done():
                continue
            if code == EXIT_STOPPED or self._time_is_up():
                return Outcome.STOPPED
            logger.error(
                "%s, seed %d: %s ended with exit code %d; see %s",
                run.row,
                run.seed,
                piece.kind,
                code,
                run.folder / OUTPUT,
            )
            return Outcome.FAILED
        return Outcome.DONE

    def _time_is_up(self) -> bool:
        return self._stop.is_set() or (self._end is not None and time.monotonic() >= self._end)

    def _run(self, run: Run, piece: Piece) -> int:
        """Run one piece to its end or until time is up; returns its exit code."""
        run.folder.mkdir(parents=True, exist_ok=True)
        logger.info("%s, seed %d: %s", run.row, run.seed, piece.command)
        began = time.monotonic()
        with (run.folder / OUTPUT).open("a") as output:
            process = subprocess.Popen(
                [sys.executable, *piece.arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,  # an interrupt from the keyboard reaches us alone
            )
            asked = False
            while process.poll() is None:
                time.sleep(PAUSE_S)
                wanted = self._time_is_up() if piece.gentle else self._stop.is_set()
                if wanted and not asked:
                    process.send_signal(signal.SIGTERM)
                    asked = True
        note(run.folder, piece, process.returncode, time.monotonic() - began)
        return process.returncode


def note(folder: Path, piece: Piece, code: int, seconds: float) -> None:
    """Leave how long a piece took beside the run."""
    entry = {"kind": piece.kind, "code": code, "seconds": round(seconds, 1)}
    with (folder / PIECES).open("a") as opened:
        opened.write(json.dumps(entry | {"command": piece.command}) + "\n")


def minutes_of(run: Run) -> float | None:
    """Wall time of a run's training over all its starts; ``None`` where it was not noted."""
    file = run.folder / PIECES
    if not file.exists():
        return None
    entries = [json.loads(line) for line in file.read_text().splitlines()]
    seconds = [one["seconds"] for one in entries if one["kind"] == "train"]
    return sum(seconds) / 60 if seconds else None


def worst(outcomes: Sequence[Outcome]) -> int:
    """Exit code of a study: 1 where a run failed, 75 where something is missing, else 0."""
    if Outcome.FAILED in outcomes:
        return 1
    return EXIT_STOPPED if Outcome.STOPPED in outcomes else EXIT_DONE
