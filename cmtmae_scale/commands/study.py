"""``cmtmae study STUDY.yaml``: run the missing jobs of a study, write its table."""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cmtmae_scale.commands.alone import run_alone
from cmtmae_scale.errors import EXIT_DONE, ConfigError
from cmtmae_scale.runtime.arguments import Parser, above_zero, at_least_one
from cmtmae_scale.runtime.log import set_up_logging
from cmtmae_scale.runtime.storage import write_atomic
from cmtmae_scale.tools.study.file import Study, load_study

if TYPE_CHECKING:
    from cmtmae_scale.tools.study.work import Run

logger = logging.getLogger(__name__)


def run_study(arguments: Sequence[str] | None = None) -> int:
    """Run a study in the working folder, or as many of its jobs as the time limit allows.

    Returns:
        Exit code: 0 complete; 75 jobs are missing, or the store is full, and the same command
        continues; 1 a run failed; 78 will never work as configured.
    """
    options = parse_options(arguments)
    set_up_logging(0, 1)
    return run_alone(lambda: execute_study(options))


def execute_study(options: argparse.Namespace) -> int:
    """Run the missing jobs, or list them; returns the exit code."""
    study = load_study(options.study)
    from cmtmae_scale.runtime.lock import hold_run
    from cmtmae_scale.tools.study.execute import Executor, study_exit_code
    from cmtmae_scale.tools.study.work import plan_runs

    runs = plan_runs(study)
    selected = select_runs(study, runs, options.rows)
    if options.dry_run:
        sys.stdout.write(list_missing(selected))
        return EXIT_DONE
    with hold_run(Path(study.dir), 0):
        outcomes = Executor(options.jobs, options.minutes).run(selected)
        sys.stdout.write(write_results(study, runs, options.study))
    return study_exit_code(outcomes)


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse ``STUDY.yaml [--minutes M] [--jobs N] [--rows NAME ...] [--dry-run]``."""
    parser = Parser(description="Run the missing jobs of a study.", allow_abbrev=False)
    parser.add_argument("study", help="a YAML file, or a shipped study: smoke, pilot, first")
    parser.add_argument("--minutes", type=above_zero, help="time limit; the same command continues")
    parser.add_argument("--jobs", type=at_least_one, default=1, help="runs at a time; 1")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="only these rows")
    parser.add_argument("--dry-run", action="store_true", help="list the missing commands")
    return parser.parse_args(arguments)


def select_runs(study: Study, runs: "Sequence[Run]", rows: Sequence[str] | None) -> "list[Run]":
    """Return the runs of some rows; ``None``: of all.

    Raises:
        ConfigError: a name that is not a row.
    """
    for name in rows or ():
        if name not in study.rows:
            raise ConfigError(f"--rows {name}: the study's rows are {', '.join(study.rows)}")
    return [run for run in runs if rows is None or run.row in rows]


def list_missing(runs: "Sequence[Run]") -> str:
    """List the missing commands, in the order of execution."""
    lines: list[str] = []
    incomplete = 0
    for run in runs:
        jobs = run.missing()
        incomplete += bool(jobs)
        state = ", ".join(job.kind for job in jobs) if jobs else "done"
        lines.append(f"# {run.row}, seed {run.seed}: {state}")
        lines += [job.command for job in jobs]
    return "\n".join([*lines, f"{incomplete} of {len(runs)} runs are incomplete", ""])


def write_results(study: Study, runs: "Sequence[Run]", place: str) -> str:
    """Write table and figure of all available results; returns the text to print."""
    from cmtmae_scale.tools.study.figure import draw_results
    from cmtmae_scale.tools.study.results import collect_results
    from cmtmae_scale.tools.study.table import results_markdown, results_record

    results = collect_results(study, runs)
    folder = Path(study.dir)
    folder.mkdir(parents=True, exist_ok=True)
    table = results_markdown(study, results, place)
    write_atomic(folder / "table.md", table)
    record = json.dumps(results_record(study, results), indent=1)
    write_atomic(folder / "results.json", f"{record}\n")
    text = [table, f"written to {folder / 'table.md'} and {folder / 'results.json'}"]
    if any(row.found for row in results.rows):
        write_atomic(folder / "figure.svg", draw_results(study, results))
        text.append(f"drawn in {folder / 'figure.svg'}")
    return "\n".join([*text, ""])
