"""``cmtmae pretrain``: pre-train a student, or resume."""

import argparse
import sys
from collections.abc import Sequence

from cmtmae_scale.commands.rank import run_as_rank
from cmtmae_scale.config.hints import key_hint
from cmtmae_scale.config.load import load_config
from cmtmae_scale.errors import EXIT_DONE
from cmtmae_scale.runtime.arguments import RECIPE_HELP, Parser, add_launcher_options
from cmtmae_scale.runtime.launch import find_world
from cmtmae_scale.runtime.log import escape_controls, set_up_logging


def pretrain(arguments: Sequence[str] | None = None) -> int:
    """Pre-train as one rank, or resume.

    Args:
        arguments: command line without the program's name; ``None``: that of the process.

    Returns:
        Exit code: 0 done, 75 stopped on request (0 under torchrun, which treats 75 as a crash;
        see ``RUN_DIR/exit.json``), 78 will never work as configured, 70 three consecutive
        launches without progress, 1 crash.
    """
    return run_as_rank(lambda: launch_pretraining(parse_options(arguments)))


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse ``--config FILE [--dry-run] [key=value ...]``; a usage error exits with 78."""
    parser = Parser(description="Pre-train a CMT-MAE student.", allow_abbrev=False, hint=key_hint)
    parser.add_argument("--config", required=True, help=RECIPE_HELP)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print sizes, FLOPs and memory, and run the checks of a launch without training",
    )
    add_launcher_options(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the recipe")
    return parser.parse_intermixed_args(arguments)


def launch_pretraining(options: argparse.Namespace) -> int:
    """Check the recipe, then train; returns the exit code of this launch."""
    world = find_world()
    set_up_logging(world.rank, world.world_size)
    config = load_config(options.config, options.overrides)
    # Imported here so that --help and errors of the recipe do not import torch.
    if options.dry_run:
        from cmtmae_scale.commands.dry_run import dry_run

        if world.rank != 0:
            return EXIT_DONE
        text, code = dry_run(config, world)
        sys.stdout.write(escape_controls(text) + "\n")
        return code
    from cmtmae_scale.api.pretrain import train_rank

    return train_rank(config, world, options.config, options.overrides)
