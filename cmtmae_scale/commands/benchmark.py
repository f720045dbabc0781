"""``cmtmae benchmark train | data | cache | startup``: speed and memory."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cmtmae_scale.commands.alone import run_alone
from cmtmae_scale.config.hints import key_hint
from cmtmae_scale.config.load import load_config
from cmtmae_scale.errors import EXIT_DONE
from cmtmae_scale.runtime.arguments import Parser, at_least_one
from cmtmae_scale.runtime.launch import World, find_world
from cmtmae_scale.runtime.log import set_up_logging

if TYPE_CHECKING:
    from cmtmae_scale.tools.benchmark import training

logger = logging.getLogger(__name__)


def run_benchmark(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    options = parse_options(arguments)

    def measure() -> int:
        world = find_world()
        set_up_logging(world.rank, world.world_size)
        options.run(options, world)
        return EXIT_DONE

    return run_alone(measure)


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; a usage error exits with 78."""
    parser = Parser(description="Measure speed and memory.", allow_abbrev=False, hint=key_hint)
    commands = parser.add_subparsers(required=True)
    step = commands.add_parser("train", help="the training step, by stage", allow_abbrev=False)
    step.add_argument("--config", required=True, help="a recipe")
    step.add_argument("--data", choices=("synthetic", "real"), default="synthetic")
    step.add_argument("--accumulation", type=at_least_one, default=1, help="micro-steps per step")
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
    decode.add_argument("--size", type=at_least_one, default=224, help="side of the views, pixels")
    decode.add_argument("--images", type=at_least_one, default=256, help="images per round")
    decode.add_argument(
        "--rounds", type=at_least_one, default=5, help="rounds, of which the median counts"
    )
    decode.add_argument("--threads", type=at_least_one, default=1, help="decoder threads")
    store = commands.add_parser(
        "cache", help="a teacher's cache against the teacher online", allow_abbrev=False
    )
    store.add_argument("--config", default="configs/demo.yaml", help="a recipe; the demo's")
    store.add_argument("--rows", type=at_least_one, default=128, help="views per round")
    store.add_argument(
        "--rounds", type=at_least_one, default=5, help="rounds, of which the median counts"
    )
    store.add_argument("overrides", nargs="*", metavar="key=value")
    for one in (step, store):
        one.add_argument("--warm-up", type=int, help="steps before; 20 on a GPU, 1 on a CPU")
        one.add_argument(
            "--windows", type=at_least_one, default=5, help="of which the median counts"
        )
        one.add_argument(
            "--steps", type=at_least_one, help="steps a window; 50 on a GPU, 1 on a CPU"
        )
    startup = commands.add_parser(
        "startup", help="CPU time and memory until a command answers", allow_abbrev=False
    )
    startup.add_argument("--config", default="configs/mae_base.yaml", help="for --dry-run")
    startup.add_argument(
        "--rounds", type=at_least_one, default=3, help="rounds, of which the median counts"
    )
    step.set_defaults(run=measure_training)
    decode.set_defaults(run=measure_decoders)
    store.set_defaults(run=measure_cache)
    startup.set_defaults(run=measure_startup)
    for one in (step, decode, store):
        one.add_argument("--output", type=Path, help="also write FILE.json and FILE.md")
    return parser.parse_args(arguments)


def measure_training(options: argparse.Namespace, world: World) -> None:
    """Time the training step, or compare it with another library's."""
    load_config(options.config, options.overrides)  # errors of the recipe cost no torch
    from cmtmae_scale.engine.agreement import REMEDY, code_facts, require_equal
    from cmtmae_scale.runtime.collectives import pick_device, process_group
    from cmtmae_scale.tools.benchmark import against, table, training

    device = pick_device(world)
    on_gpu = device.type == "cuda"
    protocol = protocol_of(options, on_gpu)
    variants = training.make_variants(
        options.config, options.overrides, options.sweep, options.accumulation, world.world_size
    )
    with process_group(world, device):
        given = {name: value for name, value in vars(options).items() if not callable(value)}
        require_equal(given | code_facts(device), REMEDY)
        if options.against is not None:
            outcome = against.compare_with_transformers(variants[0].config, protocol, device)
            text, results = against.render_mae_comparison(outcome, on_gpu), outcome
        else:
            real = options.data == "real"
            results = training.measure_variants(variants, protocol, real, world, device)
            text = table.training_tables(results, on_gpu)
    if world.rank == 0:
        facts = table.provenance(device, world.world_size)
        facts |= {"windows": protocol.windows, "steps per window": protocol.steps}
        show(options.output, facts, results, text)


def protocol_of(options: argparse.Namespace, on_gpu: bool) -> "training.Protocol":
    """Return how many steps are measured."""
    from cmtmae_scale.tools.benchmark import training

    return training.Protocol(
        options.warm_up if options.warm_up is not None else (20 if on_gpu else 1),
        options.windows,
        options.steps or (50 if on_gpu else 1),
    )


def measure_cache(options: argparse.Namespace, world: World) -> None:
    """Compare a teacher's cache with the teacher online."""
    load_config(options.config, options.overrides)  # errors of the recipe cost no torch
    from cmtmae_scale.runtime.collectives import pick_device, process_group
    from cmtmae_scale.tools.benchmark import cached, table

    device = pick_device(world)
    protocol = protocol_of(options, device.type == "cuda")
    with process_group(world, device):
        found = cached.compare_cache(
            options.config, options.overrides, options.rows, options.rounds, protocol, world, device
        )
    facts = table.provenance(device, 1)
    facts |= {"rounds": options.rounds, "views per round": options.rows}
    facts |= {"windows": protocol.windows, "steps per window": protocol.steps}
    text = cached.render_cache_report(found, device.type == "cuda")
    show(options.output, facts, found, text)


def measure_decoders(options: argparse.Namespace, world: World) -> None:
    """Compare decoders."""
    from cmtmae_scale.runtime.collectives import pick_device
    from cmtmae_scale.tools.benchmark import decoding, table

    device = pick_device(world)
    found = decoding.compare_decoders(
        options.path, options.size, options.images, options.rounds, options.threads, device
    )
    facts = table.provenance(device, 1)
    facts |= {"rounds": options.rounds, "images per round": options.images}
    show(options.output, facts, found, decoding.decoders_table(found))


def measure_startup(options: argparse.Namespace, world: World) -> None:
    """Measure commands that end before they train."""
    from cmtmae_scale.tools.benchmark.startup import measure_commands, startup_table

    sys.stdout.write(startup_table(measure_commands(options.config, options.rounds)) + "\n")


def show(output: Path | None, facts: dict[str, object], results: object, text: str) -> None:
    """Print the provenance and the tables, and write them to ``output`` if given."""
    lines = [f"{name}: {value}" for name, value in facts.items()]
    sys.stdout.write("\n".join(lines) + "\n\n" + text + "\n")
    if output is not None:
        from cmtmae_scale.tools.benchmark import table

        table.save_tables(output, facts, results, text)
