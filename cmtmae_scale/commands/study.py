"""``cmtmae study STUDY.yaml`` and ``cmtmae study preflight RECIPE``: run a table of runs."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cmtmae_scale.commands.alone import run_alone
from cmtmae_scale.config.hints import key_hint
from cmtmae_scale.config.shipped import STUDIES, shipped_names
from cmtmae_scale.errors import EXIT_DONE, ConfigError, may_pass
from cmtmae_scale.runtime.arguments import Parser, above_zero, at_least_one
from cmtmae_scale.runtime.log import set_up_logging
from cmtmae_scale.runtime.storage import write_atomic
from cmtmae_scale.tools.study.file import Study, load_study

if TYPE_CHECKING:
    from cmtmae_scale.tools.study.work import Record, Run


def run_study(arguments: Sequence[str] | None = None) -> int:
    """Run a study or a pre-flight in the working folder, as far as the time limit allows.

    Returns:
        Exit code: 0 complete; 75 jobs are missing, or the store is full, and the same command
        continues; 1 a run failed; 78 will never work as configured.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    is_preflight = words[:1] == ["preflight"]
    options = parse_preflight(words[1:]) if is_preflight else parse_options(words)
    set_up_logging(0, 1)
    execute = execute_preflight if is_preflight else execute_study
    return run_alone(lambda: execute(options))


def execute_study(options: argparse.Namespace) -> int:
    """Run the missing jobs, or list them; returns the exit code."""
    study = load_study(options.study)
    study.dir = str(options.dir or study.dir)
    from cmtmae_scale.runtime.lock import hold_run
    from cmtmae_scale.tools.study.execute import Executor, study_exit_code
    from cmtmae_scale.tools.study.record import adopt_records, read_record
    from cmtmae_scale.tools.study.work import plan_runs

    record = Path(study.dir) / f"{Path(options.study).stem}.json"
    records = read_record(record)
    if options.collect is not None:  # a run may have results only there
        there = read_record(options.collect.with_name(options.collect.stem + ".json"))
        records += [one for one in there if one not in records]
    runs, unmatched = adopt_records(study, plan_runs(study), records)
    selected = select_runs(study, runs, options.rows)
    if options.dry_run:
        sys.stdout.write(list_missing(selected))
        return EXIT_DONE
    if options.collect is not None:
        sys.stdout.write(write_results(study, runs, unmatched, options.study, options.collect))
        return EXIT_DONE
    if any(run.missing() for run in selected):
        require_images(study)
    with hold_run(Path(study.dir), 0):
        outcomes = Executor(options.jobs, options.minutes).run(selected)
        sys.stdout.write(write_results(study, runs, unmatched, options.study, record))
    return study_exit_code(outcomes)


def execute_preflight(options: argparse.Namespace) -> int:
    """Run the candidates of a recipe, or list them; returns the exit code."""
    folder = str(options.dir or f"runs/preflight/{Path(options.recipe).stem}")
    from cmtmae_scale.runtime.lock import hold_run
    from cmtmae_scale.tools.study.execute import Executor, study_exit_code
    from cmtmae_scale.tools.study.preflight import preflight_study, preflight_table
    from cmtmae_scale.tools.study.work import plan_runs

    candidates = options.candidate or ()
    study = preflight_study(options.recipe, folder, options.steps, options.settings, candidates)
    runs = plan_runs(study, with_teacher=False)
    if options.dry_run:
        sys.stdout.write(list_missing(runs))
        return EXIT_DONE
    if any(run.missing() for run in runs):
        require_images(study)
    with hold_run(Path(folder), 0):
        outcomes = Executor(options.jobs, options.minutes).run(runs)
    sys.stdout.write(preflight_table(study, runs))
    return study_exit_code(outcomes)


def parse_options(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse ``STUDY.yaml [--rows NAME ...] [--collect FILE.json]`` and the common options."""
    parser = Parser(
        description="Run the missing jobs of a study; study preflight --help: of a recipe.",
        allow_abbrev=False,
    )
    shipped = ", ".join(shipped_names(STUDIES))
    parser.add_argument("study", help=f"a YAML file, or a shipped study: {shipped}")
    add_common_options(parser, "the study file's `dir`")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="only these rows")
    parser.add_argument(
        "--collect",
        type=Path,
        metavar="FILE.json",
        help="run nothing; write the results so far there, with those of the file, and the figures "
        "beside it",
    )
    options = parser.parse_args(arguments)
    if options.collect is not None and options.collect.suffix != ".json":
        parser.error(f"--collect {options.collect}: give a name that ends in .json")
    return options


def parse_preflight(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse ``RECIPE [key=value ...] [--candidate TEXT ...] [--steps N]`` and common options."""
    parser = Parser(
        description="Train candidates for a few steps and report which settings collapse.",
        allow_abbrev=False,
        hint=key_hint,
    )
    parser.add_argument("recipe", help="a YAML file, or the name of a shipped recipe")
    parser.add_argument(
        "settings", nargs="*", metavar="key=value", help="settings of every candidate"
    )
    parser.add_argument(
        "--candidate",
        action="append",
        metavar="'key=value ...'",
        help="settings of one more run; default: other loss weights, and the teacher alone "
        "without a decoder",
    )
    parser.add_argument("--steps", type=at_least_one, default=500, help="steps of every run; 500")
    add_common_options(parser, "runs/preflight/NAME of the recipe")
    return parser.parse_intermixed_args(arguments)


def add_common_options(parser: Parser, folder: str) -> None:
    """Add the options of a study and of a pre-flight; ``folder`` is the default of ``--dir``."""
    parser.add_argument("--dir", type=Path, help=f"folder for runs and results; default: {folder}")
    parser.add_argument("--minutes", type=above_zero, help="time limit; the same command continues")
    parser.add_argument(
        "--jobs", type=at_least_one, default=1, help="number of runs at the same time; 1"
    )
    parser.add_argument("--dry-run", action="store_true", help="list the missing commands")


def require_images(study: Study) -> None:
    """Refuse a study whose images for the evaluation are absent, before it trains for hours.

    Raises:
        ConfigError: names the key.
        DataError: unusable images.
    """
    from cmtmae_scale.config.images import request_images
    from cmtmae_scale.config.schema import Data
    from dataloading.data_set import list_data

    for path in (study.evaluation.train, study.evaluation.test):
        list_data(request_images(Data(path=path)))
    masks = study.evaluation.segmentation
    if masks is not None and not Path(masks).exists():
        raise ConfigError(
            f"evaluation.segmentation={masks}: no such folder; the demo's masks are made by "
            "cmtmae demo"
        )


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
    incomplete, known = 0, dict[Path, bool]()
    for run in runs:
        jobs = run.missing(known)
        incomplete += bool(jobs)
        state = ", ".join(job.kind for job in jobs) if jobs else "done"
        lines.append(f"# {run.row}, seed {run.seed}: {state}")
        lines += [job.command for job in jobs]
    return "\n".join([*lines, f"{incomplete} of {len(runs)} runs are incomplete", ""])


def write_results(
    study: Study, runs: "Sequence[Run]", unmatched: "Sequence[Record]", place: str, record: Path
) -> str:
    """Write record, table and figures of all available results; returns the text to print.

    Files: ``NAME.json``, ``NAME.md``, ``NAME.svg`` and ``NAME-curves.svg`` for a record that is
    named ``NAME.json``; a figure without a result is not written.
    """
    from cmtmae_scale.tools.study.curves import draw_curves
    from cmtmae_scale.tools.study.figure import draw_results
    from cmtmae_scale.tools.study.record import results_record
    from cmtmae_scale.tools.study.results import collect_results
    from cmtmae_scale.tools.study.table import results_markdown

    results = collect_results(study, runs)
    table = results_markdown(study, results, place)
    files = {".json": results_record(study, results, unmatched, place), ".md": table}
    if any(row.found for row in results.rows):
        files[".svg"] = draw_results(study, results)
    if (curves := draw_curves(results)) is not None:
        files["-curves.svg"] = curves
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        for suffix, text in files.items():
            write_atomic(record.with_name(record.stem + suffix), text)
    except OSError as error:
        if may_pass(error):
            raise
        raise ConfigError(
            f"{record}: cannot be written ({error.strerror}); name another file with --collect"
        ) from error
    written = ", ".join(record.stem + suffix for suffix in files)
    return f"{table}\nwritten to {record.parent}: {written}\n"
