"""One run per folder: rank 0 holds ``RUN_DIR/lock`` for the lifetime of the run.

The lock is the file with the highest number in that folder. A process takes a number by exclusive
creation, which every shared file system supports (``flock`` may not work across hosts), and deletes
only files with lower numbers. So exactly one of concurrent launches gets the next number, and no
process deletes a lock that another process has just taken.

The number is a fencing number: a holder compares it with the folder at every heartbeat, and again
before it publishes, prunes or sweeps checkpoints. A process that was suspended while another one
took over stops without saving.

A holder on this host is alive if its process is alive. A holder on another host is alive if its
file changes while this process watches; no clocks are compared.
"""

import errno
import json
import logging
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from cmtmae_scale.errors import ConfigError, LockLostError, StorageError, may_pass, remedy_for
from cmtmae_scale.runtime.collectives import all_ranks_agree, broadcast_text
from cmtmae_scale.runtime.launch import BOOT_ID
from cmtmae_scale.runtime.processes import start_ticks
from cmtmae_scale.runtime.storage import list_names, write_atomic

logger = logging.getLogger(__name__)

BEAT_S = 10.0
PATIENCE_S = 60.0
PID_NAMESPACE = Path("/proc/self/ns/pid")


@contextmanager
def hold_run(
    run_dir: Path, rank: int, beat_s: float = BEAT_S, patience_s: float = PATIENCE_S
) -> Iterator["RunLock | None"]:
    """Hold a run's folder; all ranks wait until rank 0 has taken the lock, and rank 0 gets it.

    Args:
        run_dir: created if it is absent.
        rank: this rank.
        beat_s: seconds between heartbeats.
        patience_s: seconds without a heartbeat after which a holder on another host counts as dead.

    Raises:
        ConfigError: on every rank, if another run holds the folder or it cannot be written.
        StorageError: on every rank, if its store is full or fails.
    """
    lock, problem, passes = None, "", False
    if rank == 0:
        try:
            lock = RunLock(run_dir, beat_s, patience_s)
        except ConfigError as error:
            problem = str(error)
        except OSError as error:
            refusal = describe_unusable(run_dir, error)
            problem, passes = str(refusal), isinstance(refusal, StorageError)
    problem, passes = broadcast_text(problem), not all_ranks_agree(not passes)
    if problem:
        raise (StorageError if passes else ConfigError)(problem)
    try:
        yield lock
    finally:
        if lock is not None:
            lock.release()


def describe_unusable(run_dir: Path, error: OSError) -> ConfigError | StorageError:
    """Return what to raise for a run's folder that cannot be read or written."""
    return (StorageError if may_pass(error) else ConfigError)(
        f"run.output_dir={run_dir} cannot be used ({error.strerror}: {error.filename or run_dir}); "
        f"{remedy_for(error, 'correct it or choose another')}"
    )


class RunLock:
    """A held lock; the constructor takes it.

    Raises:
        ConfigError: if another process holds the lock.
        OSError: if the folder cannot be written.
    """

    def __init__(self, run_dir: Path, beat_s: float, patience_s: float) -> None:
        self.run_dir = run_dir
        self.folder = run_dir / "lock"
        self.beat_s = beat_s
        self.holder = identify_process() | {"token": secrets.token_hex(8)}
        self.folder.mkdir(parents=True, exist_ok=True)
        self.number = 0
        while not self.number:
            newest = newest_number(self.folder)
            if newest:
                await_holder(run_dir, lock_path(self.folder, newest), self.holder, patience_s)
            if create_lock(lock_path(self.folder, newest + 1), self.holder):
                if newest_number(self.folder) == newest + 1:
                    self.number = newest + 1
                else:  # another process took, held and deleted this number in the meantime
                    lock_path(self.folder, newest + 1).unlink(missing_ok=True)
        for old in list_numbers(self.folder):
            if old < self.number:
                lock_path(self.folder, old).unlink(missing_ok=True)
        self.released = threading.Event()
        self.thread = threading.Thread(target=self.beat, name="lock", daemon=True)
        self.thread.start()

    def beat(self) -> None:
        """Touch the lock file at intervals; stop the run if another process has taken over."""
        path = lock_path(self.folder, self.number)
        while not self.released.wait(self.beat_s):
            try:
                if self.is_held():
                    os.utime(path)
                    continue
            except FileNotFoundError:
                continue  # taken over in the meantime; the next beat detects it
            except OSError:
                continue  # the store failed; the next beat tries again
            logger.error("%s; stopping without saving", self.loss())
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
            return

    def is_held(self) -> bool:
        """Return whether this process still holds the folder, as the folder shows now.

        Raises:
            OSError: if the store does not answer.
        """
        return self.read_newer() is None

    def read_newer(self) -> dict[str, Any] | None:
        """Return the process that took over the lock, empty if unknown; ``None``: there is none.

        An own lock file that is absent, or names another process, is a loss too: a process deletes
        lower numbers when it takes over, and a person may have deleted the folder before another
        launch.

        Raises:
            OSError: if the store does not answer.
        """
        newest = newest_number(self.folder)
        own = read_lock(lock_path(self.folder, self.number))
        is_own = own is not None and own.get("token") == self.holder["token"]
        if is_own and newest <= self.number:
            return None
        return (read_lock(lock_path(self.folder, newest)) if newest else None) or {}

    def loss(self) -> str:
        """Return the message that the folder was taken over, with its new holder."""
        try:
            newer = self.read_newer()
        except OSError:
            newer = None
        holder = f"now held by {format_holder(newer)}" if newer else "or its lock was deleted"
        return (
            f"run.output_dir={self.run_dir} was taken over while this process was suspended "
            f"({holder})"
        )

    def require(self) -> None:
        """Verify that this process still holds the folder; reads the lock file.

        Raises:
            LockLostError: if another process took over.
            OSError: if the store does not answer.
        """
        if not self.is_held():
            raise LockLostError(f"{self.loss()}; nothing more is saved here")

    def release(self) -> None:
        """Release the folder; the file stays, so that numbers only grow."""
        self.released.set()
        self.thread.join()
        path = lock_path(self.folder, self.number)
        try:
            if self.is_held():
                write_atomic(path, json.dumps(self.holder | {"released": True}))
        except OSError as error:  # the next launch finds a dead process
            logger.warning("%s could not be released (%s)", path, error)


def lock_path(folder: Path, number: int) -> Path:
    """Return the file of a number."""
    return folder / f"{number:08d}.json"


def list_numbers(folder: Path) -> list[int]:
    """Return all numbers in a lock's folder.

    Raises:
        OSError: if the store does not answer.
    """
    stems = (name.removesuffix(".json") for name in list_names(folder) if name.endswith(".json"))
    return [int(stem) for stem in stems if stem.isdecimal()]


def newest_number(folder: Path) -> int:
    """Return the highest number, or 0."""
    return max(list_numbers(folder), default=0)


def read_lock(path: Path) -> dict[str, Any] | None:
    """Return the holder in a lock file; ``None`` if the file is absent or names no holder.

    Raises:
        OSError: if the store does not answer.
    """
    try:
        with path.open() as opened:  # opening a network file fetches its current state
            return parse_holder(opened.read())
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno == errno.ESTALE:
            return None  # deleted by another client of a network file system
        raise


def create_lock(path: Path, holder: dict[str, Any]) -> bool:
    """Create a lock file; return whether it did not exist."""
    try:
        with path.open("x") as opened:
            opened.write(json.dumps(holder))
    except FileExistsError:
        return False
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return True


def identify_process() -> dict[str, Any]:
    """Return what identifies this process on any host."""
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "pid": pid,
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "started": start_ticks(pid),
        "pids": f"{BOOT_ID.read_text().strip()} {os.readlink(PID_NAMESPACE)}",
        "job": os.environ.get("SLURM_JOB_ID"),
        "restart": os.environ.get("SLURM_RESTART_COUNT", "0"),
    }


def is_dead(holder: dict[str, Any], me: dict[str, Any]) -> bool | None:
    """Return whether a holder has released the lock or ended; ``None`` if this host cannot know."""
    if holder.get("released"):
        return True
    if holder["pids"] == me["pids"]:
        return start_ticks(holder["pid"]) != holder["started"]
    if me["job"] is not None and holder.get("job") == me["job"]:
        return True if holder.get("restart") != me["restart"] else None
    return None


def await_holder(run_dir: Path, path: Path, me: dict[str, Any], patience_s: float) -> None:
    """Wait until a lock's holder is known to be dead.

    Raises:
        ConfigError: if the holder is alive.
    """
    began, first, warned = time.monotonic(), None, False
    while time.monotonic() - began < patience_s:
        try:
            with path.open() as opened:  # opening a network file fetches its current state
                seen, text = os.fstat(opened.fileno()).st_mtime_ns, opened.read()
        except FileNotFoundError:
            return  # a later number has been taken
        holder = parse_holder(text)
        dead = is_dead(holder, me) if holder else None
        first = first or (seen if holder else None)
        if dead:
            if not (holder or {}).get("released"):
                text = "taking over run.output_dir=%s from %s, which is dead"
                logger.warning(text, run_dir, format_holder(holder))
            return
        if dead is False or (holder and seen != first):
            raise in_use(run_dir, holder)
        if not warned:
            text = "run.output_dir=%s was held by %s; checking for %.0f s whether it is alive"
            logger.warning(text, run_dir, format_holder(holder), patience_s)
            warned = True
        time.sleep(min(0.5, patience_s / 20))
    logger.warning("taking over run.output_dir=%s: no heartbeat for %.0f s", run_dir, patience_s)


def refuse_living_holder(run_dir: Path) -> None:
    """Refuse a folder whose holder is alive on this host, without taking the lock or waiting.

    Raises:
        ConfigError: names the holder, or the lock that cannot be read.
    """
    number = newest_number(run_dir / "lock")
    path = lock_path(run_dir / "lock", number)
    try:
        holder = read_lock(path) if number else None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); correct it") from error
    if holder is not None and is_dead(holder, identify_process()) is False:
        raise in_use(run_dir, holder)


def in_use(run_dir: Path, holder: dict[str, Any] | None) -> ConfigError:
    """Return the error of a folder that another run holds."""
    return ConfigError(
        f"run.output_dir={run_dir} is in use by {format_holder(holder)}; stop that run or choose "
        "another run.output_dir"
    )


def has_holder(run_dir: Path) -> bool:
    """Return whether a launch holds a run's folder, or died holding it; true if unknown."""
    try:
        number = newest_number(run_dir / "lock")
        holder = read_lock(lock_path(run_dir / "lock", number)) if number else None
    except OSError:
        return True
    return holder is not None and not holder.get("released")


def parse_holder(text: str) -> dict[str, Any] | None:
    """Parse a lock file; return ``None`` if it is incomplete or not a lock file."""
    try:
        holder = json.loads(text)
    except ValueError:
        return None
    known = (
        isinstance(holder, dict) and {"host", "pid", "since", "started", "pids"} <= holder.keys()
    )
    return cast(dict[str, Any], holder) if known else None


def format_holder(holder: dict[str, Any] | None) -> str:
    """Return a holder's name for messages."""
    if holder is None:
        return "an unknown process"
    job = f" (SLURM job {holder['job']})" if holder.get("job") else ""
    return f"pid {holder['pid']} on {holder['host']} since {holder['since']}{job}"
