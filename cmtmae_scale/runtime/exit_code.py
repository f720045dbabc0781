"""How a start ended, told to those outside: a file in the run's folder, and the supervisor.

Launchers do not pass exit codes on. Rank 0 leaves ``RUN_DIR/exit.json``; and every rank that a
supervisor started leaves its process id, and at the end its code, in a folder of that start, so
that nothing of an earlier start can be mistaken for it.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cmtmae_scale.errors import EXIT_CONFIG, EXIT_CRASH, EXIT_DONE, EXIT_NO_PROGRESS, EXIT_STOPPED
from cmtmae_scale.runtime.storage import write_atomic

EXIT_FILE = "exit.json"
SUPERVISOR = "CMTMAE_SUPERVISOR"
"""Environment variable: the folder in which the ranks of a supervised start leave their codes."""
GRAVITY = (EXIT_CONFIG, EXIT_NO_PROGRESS, EXIT_STOPPED, EXIT_DONE)
"""Of codes that differ between ranks the first here counts, for ranks agree before they leave with
one of these; one that crashed on the way out changes nothing."""


def write_exit(run_dir: Path, code: int, step: int, reason: str) -> None:
    """Leave the outcome in ``RUN_DIR/exit.json``."""
    record: dict[str, Any] = {"code": code, "step": step, "reason": reason}
    write_atomic(run_dir / EXIT_FILE, json.dumps(record) + "\n")


def forget_exit(run_dir: Path) -> None:
    """Remove the outcome of the start before: while a run goes on there is none."""
    (run_dir / EXIT_FILE).unlink(missing_ok=True)


class Report:
    """What this process tells its supervisor; without one, nothing."""

    def __init__(self, folder: str | None) -> None:
        self.file = None if folder is None else Path(folder) / str(os.getpid())
        self.write("")

    def write(self, text: str) -> None:
        """Replace what was told before."""
        if self.file is not None:
            write_atomic(self.file, text, durable=False)

    def leave(self, code: int) -> None:
        """Tell the exit code."""
        self.write(str(code))


@contextmanager
def reported(environment: Mapping[str, str] = os.environ) -> Iterator[Report]:
    """Tell a supervisor, if there is one, that a rank is here; and the code of a ``SystemExit``."""
    report = Report(environment.get(SUPERVISOR))
    try:
        yield report
    except SystemExit as leaving:
        if isinstance(leaving.code, int):
            report.leave(leaving.code)
        raise


def told(folder: Path) -> dict[int, int | None]:
    """Process ids of the ranks in a supervisor's folder, with the codes of those that left."""
    found: dict[int, int | None] = {}
    for path in folder.iterdir():
        if path.name.isdigit():
            text = path.read_text()
            found[int(path.name)] = int(text) if text else None
    return found


def common_code(codes: list[int | None]) -> int:
    """One code for the ranks' codes: the gravest, or 1 if none left with a code of ``GRAVITY``."""
    return next((code for code in GRAVITY if code in codes), EXIT_CRASH)
