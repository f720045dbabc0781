"""Command lines: parse and run."""

import argparse
import logging
import socket
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from cmtmae_scale.commands.dry_run import describe
from cmtmae_scale.config.load import load_config, save_config
from cmtmae_scale.config.schema import Config
from cmtmae_scale.engine.attempts import count_attempt
from cmtmae_scale.engine.ending import Ending, as_rank
from cmtmae_scale.engine.launches import note_start
from cmtmae_scale.engine.loop import train
from cmtmae_scale.engine.watchdog import LONG, watched
from cmtmae_scale.errors import EXIT_CRASH, EXIT_DONE
from cmtmae_scale.evaluation.periodic import open_evaluation
from cmtmae_scale.pretraining.build import build_parts
from cmtmae_scale.runtime.arguments import Parser
from cmtmae_scale.runtime.launch import World, find_world, pick_device, process_group
from cmtmae_scale.runtime.lock import hold_run
from cmtmae_scale.runtime.log import set_up_logging
from cmtmae_scale.tools.figures.during import open_pictures

logger = logging.getLogger(__name__)


def pretrain(arguments: Sequence[str] | None = None) -> int:
    """Pre-train, or continue to, as one rank.

    Args:
        arguments: command line without the program's name; ``None``: the process's own.

    Returns:
        Exit code: 0 done, 75 stopped on request (0 under torchrun, which would call it a crash;
        see ``RUN_DIR/exit.json``), 78 will never work as configured, 70 three starts without
        progress, 1 crash.
    """
    return as_rank(lambda: launch(arguments))


def launch(arguments: Sequence[str] | None) -> int:
    """Read command line and recipe, and run; returns the exit code of this start."""
    options = parse_pretrain(arguments)
    world = find_world()
    set_up_logging(world.rank, world.world_size)
    config = load_config(options.config, options.overrides)
    if options.dry_run:
        if world.rank == 0:
            sys.stdout.write(describe(config, world.world_size) + "\n")
        return EXIT_DONE
    return run(config, world, options.config, options.overrides)


def parse_pretrain(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse ``--config FILE [--dry-run] [key=value ...]``; a usage error exits with 78."""
    parser = Parser(description="Pre-train a CMT-MAE student.", allow_abbrev=False)
    parser.add_argument("--config", required=True, help="a recipe, such as configs/demo.yaml")
    parser.add_argument(
        "--dry-run", action="store_true", help="resolve, count and estimate; train nothing"
    )
    # DeepSpeed's launcher adds it; ranks come from the environment.
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the recipe")
    return parser.parse_intermixed_args(arguments)


def run(config: Config, world: World, recipe: str, overrides: Sequence[str]) -> int:
    """Train under an open process group; returns the exit code and leaves it in ``exit.json``."""
    device = pick_device(world)
    logger.info(
        "%d ranks by %s; rank 0 on %s, %s",
        world.world_size,
        world.launcher,
        socket.gethostname(),
        device,
    )
    run_dir, hang_s = Path(config.run.output_dir), config.guard.hang_seconds
    with ExitStack() as stack:
        stack.enter_context(process_group(world, device, collective_limit_s(hang_s)))
        stack.enter_context(hold_run(run_dir, world.rank))
        ending = stack.enter_context(Ending(run_dir, world.rank))
        count_attempt(run_dir, world.rank)
        parts = build_parts(config, world, device, stack)
        parts.evaluate = open_evaluation(config, world, device)
        parts.draw = open_pictures(parts, world)
        stack.callback(parts.models.backend.close)
        ending.progress = parts.progress
        if world.rank == 0:
            save_config(config, run_dir / "config.yaml")
            note_start(run_dir, ending.step, recipe, overrides, world.world_size, device)

        def last_words(why: str) -> None:
            parts.incident("ended", why)
            ending.write(EXIT_CRASH, why)

        with watched(run_dir, world.rank, parts.place, hang_s, last_words):
            ending.stopped = train(parts)
    return ending.code


def collective_limit_s(hang_s: float | None) -> float:
    """Time limit of collectives: half an hour, or longer than the watchdog takes to name a rank."""
    return max(1800.0, (LONG + 1) * (hang_s or 0.0))
