"""``cmtmae finetune``: train an encoder and a classifier on labelled images, or resume."""

import argparse
import sys
from collections.abc import Sequence

from cmtmae_scale.commands.evaluate import add_weight_options, check_weight_options
from cmtmae_scale.commands.rank import run_as_rank
from cmtmae_scale.config.finetune import load_finetune
from cmtmae_scale.config.hints import key_hint
from cmtmae_scale.runtime.arguments import RECIPE_HELP, Parser
from cmtmae_scale.runtime.launch import find_world
from cmtmae_scale.runtime.log import escape_controls, set_up_logging


def finetune(arguments: Sequence[str] | None = None) -> int:
    """Fine-tune as one rank, or resume; returns the exit code, as ``pretrain`` does."""
    return run_as_rank(lambda: launch_finetuning(parse_options(arguments)))


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse ``--config FILE --checkpoint RUN_DIR [key=value ...]``; a usage error exits with 78."""
    parser = Parser(
        description="Fine-tune an encoder on labelled images.", allow_abbrev=False, hint=key_hint
    )
    parser.add_argument("--config", required=True, help=RECIPE_HELP)
    add_weight_options(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the recipe")
    return parser.parse_intermixed_args(arguments)


def launch_finetuning(options: argparse.Namespace) -> int:
    """Check the recipe, then train; prints the result and returns the exit code of this launch."""
    world = find_world()
    set_up_logging(world.rank, world.world_size)
    check_weight_options(options)
    config = load_finetune(options.config, options.overrides)
    options.seed = config.run.seed
    # Imported here so that --help and errors of the recipe do not import torch.
    from cmtmae_scale.engine.run import run_task
    from cmtmae_scale.evaluation.subject import open_subject
    from cmtmae_scale.finetuning.encoder import take_encoder, weight_options
    from cmtmae_scale.finetuning.task import Finetuning
    from cmtmae_scale.runtime.collectives import pick_device

    device, given = pick_device(world), weight_options(options)
    task = Finetuning(
        config,
        given,
        lambda: take_encoder(open_subject(options, world, device), given),
        world,
        device,
    )
    code = run_task(task, config, world, device, options.config, options.overrides)
    if world.rank == 0 and task.summary:
        sys.stdout.write(escape_controls("\n".join(task.summary)) + "\n")
    return code
