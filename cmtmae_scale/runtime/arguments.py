"""Command-line parsing whose errors exit with the code of an invalid config."""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from cmtmae_scale.errors import EXIT_CONFIG
from dataloading.addresses import hide_secrets

PROGRAM = "cmtmae"
SCRIPTS = (PROGRAM, "__main__.py")
"""Files that take the command's name as their first argument."""
RECIPE_HELP = "a YAML file, or the name of a shipped recipe (cmtmae copy lists them)"
ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
"""Beginning of an address as a ``Path``, which merges two slashes into one."""
UNKNOWN = "unrecognized arguments: "
"""Beginning of argparse's message about unknown options."""


class Parser(argparse.ArgumentParser):
    """A parser that exits with 78 where argparse exits with 2.

    Args:
        hint: returns what to write in place of an option of another program, given its name;
            ``None``: unknown options get no hint.
        options: of ``argparse.ArgumentParser``.
    """

    def __init__(self, *, hint: Callable[[str], str | None] | None = None, **options: Any) -> None:
        options.setdefault("prog", command_name())
        super().__init__(**options)
        self.hint = hint

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(EXIT_CONFIG, f"{self.prog}: {hide_secrets(self.with_hint(message))}\n")

    def parse_known_args(self, *arguments: Any, **options: Any) -> Any:
        """Parse, and refuse an address as the path of a file or folder."""
        found, rest = super().parse_known_args(*arguments, **options)
        for name, value in vars(found).items():
            for one in value if isinstance(value, list) else [value]:
                if isinstance(one, Path) and ADDRESS.match(str(one)):
                    self.error(
                        f"{name.replace('_', '-')} is an address; only tars of images are read "
                        "from stores: give a path of a file system"
                    )
        return found, rest

    def with_hint(self, message: str) -> str:
        """Return a message; for an unknown option, with the setting that was probably meant."""
        if self.hint is None or not message.startswith(f"{UNKNOWN}--"):
            return message
        first, _, value = message.removeprefix(UNKNOWN).split()[0].partition("=")
        name = first.removeprefix("--").replace("-", "_")
        plain = f"drop the dashes: {name}={value or 'VALUE'}" if "." in name else None
        remedy = self.hint(name) or plain
        return f"{first}: settings are key=value; {remedy}" if remedy else message


def command_name() -> str:
    """Return how this command was called: ``cmtmae pretrain``, or a launcher's file name."""
    name, rest = Path(sys.argv[0]).name, without_local_rank(sys.argv[1:])
    return f"{PROGRAM} {rest[0]}" if name in SCRIPTS and rest else name


def without_local_rank(arguments: Sequence[str]) -> list[str]:
    """Return arguments without a first ``--local_rank=N``, which DeepSpeed's launcher adds."""
    first = arguments[:1]
    is_added = bool(first) and re.match("--local[_-]rank=", first[0]) is not None
    return list(arguments[1:] if is_added else arguments)


def at_least_one(text: str) -> int:
    """Return a whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return number


def seed_number(text: str) -> int:
    """Return a whole number that every generator takes as a seed."""
    number = int(text)
    if not 0 <= number < 2**63:
        raise argparse.ArgumentTypeError(f"{text} must lie in [0, 2**63)")
    return number


def above_zero(text: str) -> float:
    """Return a finite number above 0."""
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} must be above 0")
    return number


def not_negative(text: str) -> float:
    """Return a finite number of at least 0."""
    number = float(text)
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} must be at least 0")
    return number


def share(text: str) -> float:
    """Return a number in [0, 1]."""
    number = float(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text} must lie in [0, 1]")
    return number


def add_launcher_options(parser: argparse.ArgumentParser) -> None:
    """Accept the option that DeepSpeed's launcher adds; ranks are read from the environment."""
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
