"""Run the jobs of ``jobs.py`` by priority, as many as the time allows; the next call continues.

This process imports no torch: the device belongs to the jobs.
"""

import datetime
import json
import logging
import shlex
import tempfile
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cmtmae_scale.errors import EXIT_CRASH, EXIT_DONE, EXIT_STOPPED, ConfigError
from cmtmae_scale.runtime.storage import write_atomic
from cmtmae_scale.tools.benchmark.jobs import TARS, Job
from cmtmae_scale.tools.benchmark.limited import run_limited
from cmtmae_scale.tools.benchmark.results import ENDINGS, with_ending

logger = logging.getLogger(__name__)

DONE, FAILED, OUT_OF_TIME, SKIPPED, OPEN = "done", "failed", "out of time", "skipped", "open"
BENCHMARK = "launchers/benchmark.py"
CPU_FACTOR = 8
"""How much longer a job of the rehearsal may take: a CPU may be shared."""
NO_TESTS = 5
"""pytest's exit code if it selected no test."""

Row = dict[str, Any]
"""A job's result: state, command, date, seconds; for a benchmark also its saved results."""


def run_suite(
    jobs: Sequence[Job], images: str, minutes: float, output: Path, small: bool, again: bool
) -> dict[str, Row]:
    """Run the jobs that have no result yet, and return the rows by name.

    The rows are kept in ``output`` with ``.json``, which is written after every job. A job does not
    start with less than half of its time limit left.

    Args:
        jobs: in order of priority.
        images: folder of images or of tars, for ``TARS`` in a command.
        minutes: time for all jobs.
        output: name of the files, without an ending.
        small: whether to rehearse with tiny sizes.
        again: whether to run jobs that have a result too.
    """
    end = time.monotonic() + 60 * minutes
    rows = read_rows(output)
    for job in plan_jobs(jobs, rows, small, again):
        left_s = end - time.monotonic()
        if left_s < job.limit_s / 2:
            continue
        missing = [package for package in job.needs if not is_installed(package)]
        if missing:
            state = {"state": SKIPPED, "headline": f"{', '.join(missing)} is not installed"}
            rows[job.name] = rows.get(job.name, {}) | state
        else:
            logger.info("%s: starting, %.0f s left", job.name, left_s)
            limit_s = job.limit_s * (CPU_FACTOR if small else 1)
            rows[job.name] = run_job(job, images, min(limit_s, left_s), small)
        row = rows[job.name]
        logger.info("%s: %s; %s", job.name, row["state"], row["headline"])
        if row["state"] in (FAILED, OUT_OF_TIME):
            logger.error("%s: the end of its output:\n%s", job.name, row["tail"])
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(with_ending(output, ".json"), json.dumps({"rows": rows}, indent=1) + "\n")
    return rows


def read_rows(output: Path) -> dict[str, Row]:
    """Return the rows of earlier calls.

    Raises:
        ConfigError: if the file holds something else.
    """
    file = with_ending(output, ".json")
    if not file.exists():
        return {}
    try:
        return json.loads(file.read_text())["rows"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file} is not a result of the suite; name another --output") from error


def plan_jobs(jobs: Sequence[Job], rows: dict[str, Row], small: bool, again: bool) -> list[Job]:
    """Return the jobs to run: those never tried first, then those that did not finish.

    A row of another command, apart from the path of the images, counts as never tried.
    """
    fresh: list[Job] = []
    tried: list[Job] = []
    for job in jobs:
        row = rows.get(job.name)
        same = row is not None and row.get("command") == shlex.join(command_of(job, TARS, small))
        if again or row is None or not same:
            fresh.append(job)
        elif row["state"] != DONE:
            tried.append(job)
    return fresh + tried


def command_of(job: Job, images: str, small: bool) -> list[str]:
    """Return the words of a job's command."""
    words = [word.replace(TARS, images) for word in shlex.split(job.command)]
    return [*words, *job.small] if small else words


def run_job(job: Job, images: str, limit_s: float, small: bool) -> Row:
    """Run one job, and return its row."""
    command = command_of(job, images, small)
    with tempfile.TemporaryDirectory(prefix="suite-") as folder:
        saved = Path(folder) / "result"
        extra = ["--output", str(saved)] if BENCHMARK in command else []
        ended = run_limited([*command, *extra], Path(folder) / "log", limit_s)
        files = [with_ending(saved, ending) for ending in ENDINGS]
        found = json.loads(files[0].read_text()) if files[0].exists() else {}
        text = files[1].read_text().partition("\n\n")[2] if files[1].exists() else ""
    state = OUT_OF_TIME if ended.code is None else FAILED
    if ended.code == EXIT_DONE or (small and ended.code == NO_TESTS):
        state = DONE
    lines = [line for line in ended.tail.splitlines() if line.strip()]
    headline = found.get("headline") or (lines[-1].strip("= ") if lines else "no output")
    return {
        "state": state,
        "headline": headline,
        "command": shlex.join(command_of(job, TARS, small)),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "seconds": round(ended.seconds, 1),
        "small": small,
        "device": found.get("device"),
        "versions": found.get("versions"),
        "text": text.strip(),
        "results": found.get("results"),
        "tail": "" if state == DONE else ended.tail,
    }


def is_installed(package: str) -> bool:
    """Return whether a package can be imported, without importing it."""
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # its parent package is missing
        return False


def suite_table(jobs: Sequence[Job], rows: dict[str, Row]) -> str:
    """Return the rows as a Markdown table."""
    lines = ["| row | state | seconds | result |", "|---|---|---|---|"]
    for job in jobs:
        row = rows.get(job.name, {"state": OPEN, "headline": "", "seconds": ""})
        cells = [job.name, row["state"], str(row.get("seconds", "")), row["headline"]]
        lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    return "\n".join(lines)


def suite_exit_code(jobs: Sequence[Job], rows: dict[str, Row]) -> int:
    """Return 1 if a job failed, 75 if one has no result, else 0."""
    states = [rows.get(job.name, {}).get("state", OPEN) for job in jobs]
    if FAILED in states:
        return EXIT_CRASH
    return EXIT_STOPPED if OPEN in states or OUT_OF_TIME in states else EXIT_DONE
