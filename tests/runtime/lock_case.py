"""Processes that want the same run folder."""

import os
import signal
import time
from pathlib import Path

from cmtmae_scale.errors import ConfigError
from cmtmae_scale.runtime.lock import RunLock, hold_run


def race(folder: Path, rounds: int) -> list[bool]:
    """All ranks want a fresh folder at the same moment, each round; whether this rank got it."""
    import torch.distributed as dist

    won = []
    for number in range(rounds):
        dist.barrier()
        lock = None
        try:
            lock = RunLock(folder / f"{number}", 10, 20)
        except ConfigError as error:
            assert "is in use by pid" in str(error)
        won.append(lock is not None)
        dist.barrier()  # no rank releases it before all have tried
        if lock is not None:
            lock.release()
    return won


def hold_together(run_dir: Path) -> str:
    """All ranks launch on a folder; returns the error."""
    import torch.distributed as dist

    try:
        with hold_run(run_dir, dist.get_rank()):
            return ""
    except ConfigError as error:
        return str(error)


def hold_and_die(run_dir: Path) -> None:
    """Take a folder and be killed."""
    RunLock(run_dir, 10, 20)
    os.kill(os.getpid(), signal.SIGKILL)


def hold_for(run_dir: Path, ready: Path, stop: Path) -> None:
    """Hold a folder, with frequent heartbeats, until asked to release it."""
    with hold_run(run_dir, 0, beat_s=0.05):
        ready.touch()
        while not stop.exists():
            time.sleep(0.01)


def start(recipe: Path) -> None:
    """The command line, in this process."""
    from cmtmae_scale.commands.pretrain import pretrain

    raise SystemExit(pretrain(["--config", str(recipe)]))
