"""``cmtmae study STUDY.yaml``: run what is missing of a table of runs, write the table."""

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cmtmae_scale.commands.clone import find_clone
from cmtmae_scale.errors import EXIT_DONE, CmtMaeError, ConfigError
from cmtmae_scale.runtime.arguments import Parser, above_zero, at_least_one
from cmtmae_scale.runtime.log import set_up_logging
from cmtmae_scale.runtime.storage import write_text
from cmtmae_scale.tools.study.file import Study, load_study
from dataloading.errors import DataError

if TYPE_CHECKING:
    from cmtmae_scale.tools.study.work import Run

logger = logging.getLogger(__name__)


def run_study(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing of a study, in the folder of the clone, as far as time allows.

    Args:
        arguments: command line without the program's name; ``None``: the process's own.

    Returns:
        Exit code: 0 all runs are done; 75 some are missing, the same command continues; 1 a run
        failed; 78 will never work as configured.
    """
    options = parse_options(arguments)
    set_up_logging(0, 1)
    try:
        file = options.study.resolve()
        root = find_clone()
        os.chdir(root)
        place = os.path.relpath(file) if file.is_relative_to(root) else str(file)
        study = load_study(place)
        from cmtmae_scale.runtime.lock import hold_run
        from cmtmae_scale.tools.study.execute import Executor, worst
        from cmtmae_scale.tools.study.work import plan_runs

        runs = plan_runs(study)
        asked = choose(study, runs, options.rows)
        if options.dry_run:
            sys.stdout.write(describe(asked))
            return EXIT_DONE
        with hold_run(Path(study.dir), 0):
            outcomes = Executor(options.jobs, options.minutes).run(asked)
            sys.stdout.write(write_results(study, runs, place))
    except (CmtMaeError, DataError) as error:
        logger.error("%s", error)
        return error.exit_code
    return worst(outcomes)


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse ``STUDY.yaml [--minutes M] [--jobs N] [--rows NAME ...] [--dry-run]``."""
    parser = Parser(description="Run what is missing of a study.", allow_abbrev=False)
    parser.add_argument("study", type=Path, help="such as configs/studies/smoke.yaml")
    parser.add_argument(
        "--minutes", type=above_zero, help="stop cleanly after about this time; run it again"
    )
    parser.add_argument("--jobs", type=at_least_one, default=1, help="runs at a time; 1")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="only these rows")
    parser.add_argument(
        "--dry-run", action="store_true", help="list what is missing, with its commands"
    )
    return parser.parse_args(arguments)


def choose(study: Study, runs: "Sequence[Run]", rows: Sequence[str] | None) -> "list[Run]":
    """Runs of the rows that were asked for.

    Raises:
        ConfigError: a name that is no row.
    """
    for name in rows or ():
        if name not in study.rows:
            raise ConfigError(f"--rows {name}: the study's rows are {', '.join(study.rows)}")
    return [run for run in runs if rows is None or run.row in rows]


def describe(runs: "Sequence[Run]") -> str:
    """What is missing, in the order in which it would run."""
    lines: list[str] = []
    left = 0
    for run in runs:
        pieces = run.missing()
        left += bool(pieces)
        state = ", ".join(piece.kind for piece in pieces) if pieces else "done"
        lines.append(f"# {run.row}, seed {run.seed}: {state}")
        lines += [piece.command for piece in pieces]
    return "\n".join([*lines, f"{left} of {len(runs)} runs are missing", ""])


def write_results(study: Study, runs: "Sequence[Run]", place: str) -> str:
    """Write table and figure of all that is there; returns what is to be said."""
    from cmtmae_scale.tools.study.figure import as_svg
    from cmtmae_scale.tools.study.results import collect
    from cmtmae_scale.tools.study.table import as_json, as_markdown

    results = collect(study, runs)
    folder = Path(study.dir)
    folder.mkdir(parents=True, exist_ok=True)
    table = as_markdown(study, results, place)
    write_text(folder / "table.md", table)
    write_text(folder / "results.json", json.dumps(as_json(study, results), indent=1) + "\n")
    said = [table, f"written to {folder / 'table.md'} and {folder / 'results.json'}"]
    if any(line.found for line in results.lines):
        write_text(folder / "figure.svg", as_svg(study, results))
        said.append(f"drawn in {folder / 'figure.svg'}")
    return "\n".join([*said, ""])
