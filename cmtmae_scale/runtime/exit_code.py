"""Report how a launch ended: to ``RUN_DIR/exit.json``, and to the supervisor.

Launchers do not forward exit codes. Rank 0 writes ``RUN_DIR/exit.json``. Every rank that a
supervisor launched writes its process id, and at the end its exit code, to a folder of that launch,
so that no file of an earlier launch is read.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cmtmae_scale.errors import EXIT_CONFIG, EXIT_CRASH, EXIT_DONE, EXIT_NO_PROGRESS, EXIT_STOPPED
from cmtmae_scale.runtime.processes import start_ticks
from cmtmae_scale.runtime.storage import list_names, optional_write, read_json, write_atomic

EXIT_FILE = "exit.json"
STOP_AFTER = "train.stop_after="
"""Prefix of the reason of a launch that stopped at this step, or (code 0) had reached it before."""
RESERVE = ".exit.reserve"
"""File that is deleted if there is no space for ``exit.json``."""
RESERVE_BYTES = 8192
SUPERVISOR = "CMTMAE_SUPERVISOR"
"""Environment variable: folder to which the ranks of a supervised launch write their codes."""
GRAVITY = (EXIT_CONFIG, EXIT_NO_PROGRESS, EXIT_STOPPED, EXIT_DONE)
"""If codes differ between ranks, the first in this order counts. Ranks agree before they exit with
one of these codes, so a rank that crashes while exiting changes nothing."""


def write_exit(run_dir: Path, code: int, step: int, reason: str) -> None:
    """Write code, step and reason to ``RUN_DIR/exit.json``."""
    record: dict[str, Any] = {"code": code, "step": step, "reason": reason}
    reserve, text = run_dir / RESERVE, json.dumps(record) + "\n"
    try:
        write_atomic(run_dir / EXIT_FILE, text)
    except OSError:
        reserve.unlink(missing_ok=True)
        write_atomic(run_dir / EXIT_FILE, text)
    reserve.unlink(missing_ok=True)


def read_finished(run_dir: Path) -> dict[str, Any] | None:
    """Return the content of ``exit.json`` if the run is complete, else ``None``."""
    try:
        record = read_json((run_dir / EXIT_FILE).read_bytes())
        known = {"code": int(record["code"]), "step": int(record["step"])}
        reason = str(record["reason"])
        is_complete = known["code"] == EXIT_DONE and not reason.startswith(STOP_AFTER)
        return {**known, "reason": reason} if is_complete else None
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return None


def delete_exit(run_dir: Path) -> None:
    """Delete the previous launch's ``exit.json``, and reserve space for the next one.

    A run in progress has no ``exit.json``.
    """
    (run_dir / EXIT_FILE).unlink(missing_ok=True)
    (run_dir / RESERVE).write_bytes(os.urandom(RESERVE_BYTES))


class ExitReport:
    """Reports this process to its supervisor; without a supervisor it does nothing."""

    def __init__(self, folder: str | None) -> None:
        self.file = None if folder is None else Path(folder) / str(os.getpid())
        self.write("")

    def write(self, text: str) -> None:
        if self.file is not None:
            with optional_write(self.file):
                write_atomic(self.file, text, durable=False)

    def leave(self, code: int) -> None:
        self.write(str(code))

    def finds_dead_rank(self) -> bool:
        """Return whether another rank of this launch ended without a code or with code 1."""
        if self.file is None:
            return False
        reports = read_reports(self.file.parent).items()
        return any(code in (None, EXIT_CRASH) and start_ticks(pid) is None for pid, code in reports)


@contextmanager
def report_exit() -> Iterator[ExitReport]:
    """Report this rank to its supervisor, if any, and the exit code of a ``SystemExit``."""
    report = ExitReport(os.environ.get(SUPERVISOR))
    try:
        yield report
    except SystemExit as error:
        if isinstance(error.code, int):
            report.leave(error.code)
        raise


def read_reports(folder: Path) -> dict[int, int | None]:
    """Return process ids of the ranks in a supervisor's folder, with the codes of exited ranks.

    Empty if the folder is absent: the supervisor must still end what it started.
    """
    found: dict[int, int | None] = {}
    for name in list_names(folder):
        if name.isdigit():
            text = (folder / name).read_text()
            found[int(name)] = int(text) if text else None
    return found


def common_code(codes: list[int | None]) -> int:
    """Return one code for all ranks: the gravest, or 1 if no code is in ``GRAVITY``."""
    return next((code for code in GRAVITY if code in codes), EXIT_CRASH)
