"""One run a folder: rank 0 holds ``RUN_DIR/lock`` for the life of the run.

The lock is the file with the highest number in that folder. A number is taken by exclusive
creation, which every shared file system has (``flock`` may not reach across hosts), and only files
below the highest are deleted. So of any number of starts exactly one gets the next number, and
nobody removes a lock that somebody else has just taken.

A holder on this host is alive if its process is. One on another host is alive if its file changes
while we watch; no clocks are compared.
"""

import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from cmtmae_scale.errors import ConfigError
from cmtmae_scale.runtime.collectives import text_from_first
from cmtmae_scale.runtime.processes import started
from cmtmae_scale.runtime.storage import write_atomic

logger = logging.getLogger(__name__)

BEAT_S = 10.0
PATIENCE_S = 60.0
PID_NAMESPACE = Path("/proc/self/ns/pid")
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@contextmanager
def hold_run(
    run_dir: Path, rank: int, beat_s: float = BEAT_S, patience_s: float = PATIENCE_S
) -> Iterator[None]:
    """Hold a run's folder; all ranks wait for rank 0, which takes it.

    Args:
        run_dir: the folder; made if it is absent.
        rank: this rank.
        beat_s: seconds between signs of life.
        patience_s: seconds without a sign after which a holder on another host counts as gone.

    Raises:
        ConfigError: on every rank, if another run holds it or it cannot be written.
    """
    lock, problem = None, ""
    if rank == 0:
        try:
            lock = RunLock(run_dir, beat_s, patience_s)
        except ConfigError as error:
            problem = str(error)
        except OSError as error:
            problem = (
                f"run.output_dir={run_dir} cannot be written ({error.strerror}: {error.filename}); "
                "correct it or choose another"
            )
    problem = text_from_first(problem)
    if problem:
        raise ConfigError(problem)
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


class RunLock:
    """A held lock; taken when it is built.

    Raises:
        ConfigError: names the holder.
        OSError: if the folder cannot be written.
    """

    def __init__(self, run_dir: Path, beat_s: float, patience_s: float) -> None:
        self.folder = run_dir / "lock"
        self.beat_s = beat_s
        self.holder = this_process()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.number = 0
        while not self.number:
            newest = newest_number(self.folder)
            if newest:
                wait_until_gone(run_dir, path_of(self.folder, newest), self.holder, patience_s)
            if create(path_of(self.folder, newest + 1), self.holder):
                if newest_number(self.folder) == newest + 1:
                    self.number = newest + 1
                else:  # ours had been taken, held and deleted while we watched
                    path_of(self.folder, newest + 1).unlink(missing_ok=True)
        for old in numbers(self.folder):
            if old < self.number:
                path_of(self.folder, old).unlink(missing_ok=True)
        self.released = threading.Event()
        self.thread = threading.Thread(target=self.beat, name="lock", daemon=True)
        self.thread.start()

    def beat(self) -> None:
        """Show every now and then that the holder lives."""
        path = path_of(self.folder, self.number)
        while not self.released.wait(self.beat_s):
            try:
                os.utime(path)
                lost = newest_number(self.folder) > self.number
            except OSError:
                continue  # a store that fails for a while; the next beat tells
            if lost:
                logger.error(
                    "%s was taken over while this process stood still; stopping", self.folder
                )
                signal.raise_signal(signal.SIGTERM)
                return

    def release(self) -> None:
        """Free the folder; the file stays as a record, and so that numbers only grow."""
        self.released.set()
        self.thread.join()
        path = path_of(self.folder, self.number)
        try:
            if path.exists():
                write_atomic(path, json.dumps(self.holder | {"released": True}))
        except OSError as error:  # the next start finds a dead process
            logger.warning("%s could not be released (%s)", path, error)


def path_of(folder: Path, number: int) -> Path:
    """File of a number."""
    return folder / f"{number:08d}.json"


def numbers(folder: Path) -> list[int]:
    """All numbers in a lock's folder."""
    return [int(path.stem) for path in folder.glob("*.json") if path.stem.isdigit()]


def newest_number(folder: Path) -> int:
    """Highest number, or 0."""
    return max(numbers(folder), default=0)


def create(path: Path, holder: dict[str, Any]) -> bool:
    """Write a file that must not exist; whether we did."""
    try:
        with path.open("x") as opened:
            opened.write(json.dumps(holder))
    except FileExistsError:
        return False
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return True


def this_process() -> dict[str, Any]:
    """What a lock says about its holder."""
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "pid": pid,
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "started": started(pid),
        "pids": f"{BOOT_ID.read_text().strip()} {os.readlink(PID_NAMESPACE)}",
        "job": os.environ.get("SLURM_JOB_ID"),
        "restart": os.environ.get("SLURM_RESTART_COUNT", "0"),
    }


def is_gone(holder: dict[str, Any], me: dict[str, Any]) -> bool | None:
    """Whether a holder has ended; ``None`` if that cannot be seen from here."""
    if holder.get("released"):
        return True
    if holder["pids"] == me["pids"]:
        return started(holder["pid"]) != holder["started"]
    if me["job"] is not None and holder.get("job") == me["job"]:
        return True if holder.get("restart") != me["restart"] else None
    return None


def wait_until_gone(run_dir: Path, path: Path, me: dict[str, Any], patience_s: float) -> None:
    """Return when a lock's holder is gone.

    Raises:
        ConfigError: if it is alive.
    """
    began, first, told = time.monotonic(), None, False
    while time.monotonic() - began < patience_s:
        try:
            with path.open() as opened:  # opening fetches a network file's present state
                seen, text = os.fstat(opened.fileno()).st_mtime_ns, opened.read()
        except FileNotFoundError:
            return  # a later number has been taken
        holder = parse(text)
        gone = is_gone(holder, me) if holder else None
        first = first or (seen if holder else None)
        if gone:
            if not (holder or {}).get("released"):
                logger.warning(
                    "taking over run.output_dir=%s from %s, which is gone", run_dir, name(holder)
                )
            return
        if gone is False or (holder and seen != first):
            raise ConfigError(
                f"run.output_dir={run_dir} is in use by {name(holder)}; stop that run or choose another "
                "run.output_dir"
            )
        if not told:
            logger.warning(
                "run.output_dir=%s was held by %s; watching for %.0f s whether it still is",
                run_dir,
                name(holder),
                patience_s,
            )
            told = True
        time.sleep(min(0.5, patience_s / 20))
    logger.warning("taking over run.output_dir=%s: no sign of life for %.0f s", run_dir, patience_s)


def parse(text: str) -> dict[str, Any] | None:
    """Read a lock's text; ``None`` while it is being written, or if it is no lock's."""
    try:
        holder = json.loads(text)
    except ValueError:
        return None
    known = (
        isinstance(holder, dict) and {"host", "pid", "since", "started", "pids"} <= holder.keys()
    )
    return cast(dict[str, Any], holder) if known else None


def name(holder: dict[str, Any] | None) -> str:
    """How a holder is named in messages."""
    if holder is None:
        return "an unknown process"
    job = f" (SLURM job {holder['job']})" if holder.get("job") else ""
    return f"pid {holder['pid']} on {holder['host']} since {holder['since']}{job}"
