"""``cmtmae report RUN_DIR``: write a report of runs as one HTML page."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cmtmae_scale.commands.alone import run_alone
from cmtmae_scale.errors import EXIT_DONE, ConfigError, remedy_for
from cmtmae_scale.runtime.arguments import Parser
from cmtmae_scale.runtime.log import escape_controls
from cmtmae_scale.runtime.storage import write_atomic

if TYPE_CHECKING:
    from cmtmae_scale.tools.report.run import Run


def write_report(arguments: Sequence[str] | None = None) -> int:
    """Write a report; returns the exit code."""
    options = parse_options(arguments)

    def write() -> int:
        file = write_page(options.runs, options.out, options.reference)
        sys.stdout.write(f"{escape_controls(str(file))}\n")
        return EXIT_DONE

    return run_alone(write, lambda text: sys.stderr.write(f"{escape_controls(text)}\n"))


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse ``RUN_DIR [RUN_DIR ...] [--out FILE] [--reference FILE ROW]``."""
    parser = Parser(description="Write a report of runs as one HTML page.", allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="a run's folder")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="default: report.html in the run's folder, or comparison.html in the first run's",
    )
    parser.add_argument(
        "--reference",
        nargs=2,
        metavar=("FILE", "ROW"),
        help="draw the range of this row of a study's record, such as docs/study-cpu.json",
    )
    return parser.parse_args(arguments)


def write_page(
    folders: Sequence[Path], out: Path | None = None, reference: Sequence[str] | None = None
) -> Path:
    """Read runs and write their page, whole or not at all; returns the file.

    Without ``out`` it is ``report.html`` in the run's folder, or, for several runs,
    ``comparison.html`` in the first run's. ``reference`` is the file and the row of a study.

    Raises:
        ConfigError: if a folder is not a run's, the reference is not a study's record, or the file
            cannot be written.
    """
    from cmtmae_scale.tools.report.page import render_page
    from cmtmae_scale.tools.report.ranges import read_reference
    from cmtmae_scale.tools.report.run import read_run

    runs = [read_run(folder) for folder in dict.fromkeys(folders)]
    make_labels_unique(runs)
    expected = [] if reference is None else read_reference(Path(reference[0]), reference[1])
    file = out or runs[0].dir / ("report.html" if len(runs) == 1 else "comparison.html")
    text = render_page(runs, expected)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, text.encode(errors="backslashreplace"))
    except OSError as error:
        raise ConfigError(
            f"{file}: cannot be written ({error.strerror}); "
            f"{remedy_for(error, 'name another file with --out')}"
        ) from error
    return file


def make_labels_unique(runs: "Sequence[Run]") -> None:
    """Append the folder to the labels of runs with the same name."""
    for label in {run.label for run in runs}:
        alike = [run for run in runs if run.label == label]
        for run in alike if len(alike) > 1 else ():
            run.label = f"{label} ({run.dir})"
