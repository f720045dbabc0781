"""Command lines whose mistakes leave with the exit code of what can never work."""

import argparse
import sys
from typing import NoReturn

from cmtmae_scale.errors import EXIT_CONFIG


class Parser(argparse.ArgumentParser):
    """A parser that exits with 78 where argparse would with 2."""

    def error(self, message: str) -> NoReturn:
        """Print usage and message, and leave."""
        self.print_usage(sys.stderr)
        self.exit(EXIT_CONFIG, f"{self.prog}: {message}\n")


def at_least_one(text: str) -> int:
    """Read a whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return number


def above_zero(text: str) -> float:
    """Read a finite number above 0."""
    found = float(text)
    if not 0 < found < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} must be above 0")
    return found


def share(text: str) -> float:
    """Read a number in [0, 1]."""
    found = float(text)
    if not 0 <= found <= 1:
        raise argparse.ArgumentTypeError(f"{text} must lie in [0, 1]")
    return found


def add_launcher_options(parser: argparse.ArgumentParser) -> None:
    """Accept what DeepSpeed's launcher adds; ranks come from the environment."""
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
