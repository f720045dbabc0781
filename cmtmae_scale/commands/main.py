"""``cmtmae COMMAND``: import the module of a command, and no other, and run it."""

import difflib
import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

from cmtmae_scale import __version__
from cmtmae_scale.errors import EXIT_CONFIG, EXIT_DONE
from cmtmae_scale.runtime.arguments import without_local_rank


class Command(NamedTuple):
    """A command: ``commands/MODULE.py`` exposes ``FUNCTION(arguments) -> exit code``."""

    module: str
    function: str
    summary: str


COMMANDS = {
    "pretrain": Command("pretrain", "pretrain", "pre-train a student, or resume"),
    "precompute": Command("precompute", "precompute_teacher", "compute a teacher cache"),
    "finetune": Command("finetune", "finetune", "fine-tune an encoder on labelled images"),
    "evaluate": Command(
        "evaluate", "evaluate", "k-NN, probes and dense measures of frozen features"
    ),
    "export": Command("export", "export_weights", "write weights for timm or transformers"),
    "features": Command("features", "write_features", "features of a folder of images, as a file"),
    "init": Command("init", "init_recipe", "write a recipe for a folder of images"),
    "check-data": Command("check_data", "check_data", "decode, report and pack a data set"),
    "plan": Command("plan", "plan_run", "memory, time, cost and traffic on N GPUs"),
    "report": Command("report", "write_report", "one page about one run or several"),
    "study": Command("study", "run_study", "run a table of runs, with statistics"),
    "benchmark": Command("benchmark", "run_benchmark", "measure speed and memory"),
    "supervise": Command("supervise", "supervise", "pass signals and exit codes of a launcher"),
    "demo": Command("demo", "run_demo", "pre-train a small student in minutes"),
    "config": Command(
        "config", "describe_config", "meaning, accepted values, default and use of a key"
    ),
    "copy": Command("copy", "copy_shipped", "copy recipes and templates here, to edit them"),
}


def run_command(arguments: Sequence[str] | None = None) -> int:
    """Run ``COMMAND ...`` of the arguments, or of the command line; returns its exit code."""
    given = without_local_rank(sys.argv[1:] if arguments is None else arguments)
    name, *rest = given or ["--help"]
    if name in ("--help", "-h"):
        sys.stdout.write(overview())
        return EXIT_DONE
    if name == "--version":
        sys.stdout.write(f"cmtmae {__version__}\n")
        return EXIT_DONE
    command = COMMANDS.get(name.replace("_", "-"))
    if command is None:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(COMMANDS)}"
        sys.stderr.write(f"cmtmae: {name} is not a command; {hint}\n")
        return EXIT_CONFIG
    module = importlib.import_module(f"cmtmae_scale.commands.{command.module}")
    return getattr(module, command.function)(rest)


def overview() -> str:
    """Return the text of ``cmtmae --help``."""
    lines = [f"  {name:<12}{command.summary}\n" for name, command in COMMANDS.items()]
    return f"""usage: cmtmae COMMAND ...

Distributed CMT-MAE pre-training.

{"".join(lines)}
cmtmae COMMAND --help describes a command; cmtmae --version prints the version.
"""
