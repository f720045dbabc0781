"""``launchers/benchmark.py train | data``."""

import argparse
import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from cmtmae_scale.benchmark import against, decoding, table, training
from cmtmae_scale.errors import EXIT_DONE, CmtMaeError
from cmtmae_scale.runtime.launch import World, find_world, pick_device, process_group
from cmtmae_scale.runtime.log import set_up_logging
from dataloading.errors import DataError

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    options = parse(arguments)
    try:
        world = find_world()
        set_up_logging(world.rank, world.world_size)
        run = {"train": train, "data": data}[options.what]
        run(options, world)
    except (CmtMaeError, DataError) as error:
        logger.error("%s", error)
        return error.exit_code
    return EXIT_DONE


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Measure speed and memory.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="what", required=True)
    step = commands.add_parser("train", help="the training step, by part", allow_abbrev=False)
    step.add_argument("--config", required=True, help="a recipe")
    step.add_argument("--data", choices=("synthetic", "real"), default="synthetic")
    step.add_argument("--warm-up", type=int, help="steps before; 20 on a GPU, 1 on a CPU")
    step.add_argument("--windows", type=int, default=5, help="windows, of which the median counts")
    step.add_argument("--steps", type=int, help="steps a window; 50 on a GPU, 1 on a CPU")
    step.add_argument("--accumulation", type=int, default=1, help="micro-steps a step")
    step.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="KEY=A,B",
        help="also measure these values; the key sdpa chooses attention's kernel",
    )
    step.add_argument("--against", choices=("hf_mae",), help="the same work in another library")
    step.add_argument("overrides", nargs="*", metavar="key=value")
    decode = commands.add_parser("data", help="decoders against PIL", allow_abbrev=False)
    decode.add_argument("path", help="folder of images or of tars")
    decode.add_argument("--size", type=int, default=224, help="side of the views, pixels")
    decode.add_argument("--images", type=int, default=256, help="images a round")
    decode.add_argument("--rounds", type=int, default=5, help="rounds, of which the median counts")
    decode.add_argument("--threads", type=int, default=1, help="decoder threads")
    for one in (step, decode):
        one.add_argument("--output", type=Path, help="also write FILE.json and FILE.md")
    return parser.parse_args(arguments)


def train(options: argparse.Namespace, world: World) -> None:
    """Time the training step, or compare it with another library's."""
    device = pick_device(world)
    on_gpu = device.type == "cuda"
    protocol = training.Protocol(
        options.warm_up if options.warm_up is not None else (20 if on_gpu else 1),
        options.windows,
        options.steps or (50 if on_gpu else 1),
    )
    variants = training.make_variants(
        options.config, options.overrides, options.sweep, options.accumulation, world.world_size
    )
    with process_group(world, device):
        if options.against is not None:
            outcome = against.compare(variants[0].config, protocol, device)
            text, results = against.describe(outcome, on_gpu), outcome.to_dict()
        else:
            found = training.measure(variants, protocol, options.data == "real", world, device)
            text = table.training_tables(found, on_gpu)
            results = [one.to_dict() for one in found]
    if world.rank == 0:
        facts = table.circumstances(command_line(), device, world.world_size)
        facts |= {"windows": protocol.windows, "steps a window": protocol.steps}
        show(options.output, facts, results, text)


def data(options: argparse.Namespace, world: World) -> None:
    """Compare decoders."""
    device = pick_device(world)
    found = decoding.measure(
        options.path, options.size, options.images, options.rounds, options.threads, device
    )
    facts = table.circumstances(command_line(), device, 1)
    facts |= {"rounds": options.rounds, "images a round": options.images}
    show(options.output, facts, [one.to_dict() for one in found], decoding.describe(found))


def command_line() -> str:
    """The command as it was given."""
    return shlex.join(["python", *sys.argv])


def show(output: Path | None, facts: dict[str, object], results: object, text: str) -> None:
    """Print the circumstances and the tables, and write them where asked."""
    lines = [f"{name}: {value}" for name, value in facts.items()]
    sys.stdout.write("\n".join(lines) + "\n\n" + text + "\n")
    if output is not None:
        table.save(output, facts, results, text)
