"""``cmtmae benchmark MEASUREMENT``: measure speed and memory, and their parts."""

import argparse
import logging
import os
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cmtmae_scale.commands.alone import run_alone
from cmtmae_scale.commands.precompute import interrupt_at_sigterm
from cmtmae_scale.config.hints import key_hint
from cmtmae_scale.config.load import load_config
from cmtmae_scale.errors import EXIT_CRASH, EXIT_DONE, EXIT_STOPPED, ConfigError
from cmtmae_scale.runtime.arguments import Parser, above_zero, at_least_one, not_negative
from cmtmae_scale.runtime.launch import World, find_world
from cmtmae_scale.runtime.log import set_up_logging
from cmtmae_scale.runtime.storage import write_atomic
from cmtmae_scale.tools.benchmark.results import save_tables, with_ending

if TYPE_CHECKING:
    from cmtmae_scale.tools.benchmark import training
    from cmtmae_scale.tools.benchmark.jobs import Job

logger = logging.getLogger(__name__)


def run_benchmark(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    options = parse_options(arguments)

    def measure() -> int:
        world = find_world()
        set_up_logging(world.rank, world.world_size)
        code = options.run(options, world)
        return EXIT_DONE if code is None else code

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
        help="also measure these values; the key sdpa chooses the attention kernel",
    )
    step.add_argument("--against", choices=("hf_mae",), help="the same work in another library")
    step.add_argument("overrides", nargs="*", metavar="key=value")
    decode = commands.add_parser("data", help="decoders against PIL", allow_abbrev=False)
    decode.add_argument("path", help="folder of images or of tars")
    decode.add_argument("--size", type=at_least_one, default=224, help="side of the views, pixels")
    decode.add_argument("--images", type=at_least_one, default=256, help="images per round")
    decode.add_argument(
        "--rounds", type=at_least_one, default=5, help="number of rounds; the median is reported"
    )
    decode.add_argument("--threads", type=at_least_one, default=1, help="decoder threads")
    store = commands.add_parser(
        "cache", help="a teacher's cache against the teacher online", allow_abbrev=False
    )
    store.add_argument("--config", default="demo", help="a recipe; the demo's")
    store.add_argument("--rows", type=at_least_one, default=128, help="views per round")
    store.add_argument(
        "--rounds", type=at_least_one, default=5, help="number of rounds; the median is reported"
    )
    store.add_argument("overrides", nargs="*", metavar="key=value")
    for one in (step, store):
        one.add_argument(
            "--warm-up", type=int, help="steps before the measurement; 20 on a GPU, 1 on a CPU"
        )
        one.add_argument(
            "--windows",
            type=at_least_one,
            default=5,
            help="number of measurement windows; the median is reported",
        )
        one.add_argument(
            "--steps", type=at_least_one, help="steps per window; 50 on a GPU, 1 on a CPU"
        )
    startup = commands.add_parser(
        "startup", help="CPU time and memory until a command answers", allow_abbrev=False
    )
    startup.add_argument("--config", default="mae_base", help="recipe of the --dry-run")
    startup.add_argument(
        "--rounds", type=at_least_one, default=3, help="number of rounds; the median is reported"
    )
    model = commands.add_parser(
        "model", help="the step's time, modelled from counted operations", allow_abbrev=False
    )
    model.add_argument("--config", required=True, help="a recipe")
    model.add_argument(
        "--tflops", type=above_zero, default=790.0, help="rate of matrix products, TFLOP/s"
    )
    model.add_argument("--tbytes", type=above_zero, default=4.3, help="memory's bandwidth, TB/s")
    model.add_argument("--launch-us", type=not_negative, default=4.0, help="host time per launch")
    model.add_argument(
        "--stall-ms",
        type=not_negative,
        default=0.0,
        help="host time per step in which the device has nothing to do",
    )
    model.add_argument(
        "--eager", action="append", default=[], metavar="PART", help="a part that is not compiled"
    )
    model.add_argument("overrides", nargs="*", metavar="key=value")
    smoke = commands.add_parser(
        "smoke", help="every path of a run once, with tiny networks", allow_abbrev=False
    )
    smoke.add_argument("path", help="folder of labelled images or of tars")
    suite = commands.add_parser(
        "suite", help="all open rows of docs/performance.md", allow_abbrev=False
    )
    suite.add_argument("--data", required=True, help="folder of labelled images or of tars")
    suite.add_argument("--minutes", type=not_negative, default=12.0, help="time for all rows; 12")
    suite.add_argument("--only", nargs="+", metavar="ROW", help="these rows, measured or not")
    suite.add_argument("--small", action="store_true", help="rehearse with tiny sizes, on any CPU")
    suite.add_argument("--output", type=Path, help="the results, without an ending; runs/suite")
    traffic = commands.add_parser(
        "collectives", help="collectives of a step and their bytes, counted", allow_abbrev=False
    )
    traffic.add_argument("--config", required=True, help="a recipe")
    traffic.add_argument("--ranks", type=at_least_one, nargs="+", default=[8, 64, 512, 2048])
    traffic.add_argument("--output", type=Path, help="also write FILE.json and FILE.md")
    traffic.add_argument("overrides", nargs="*", metavar="key=value")
    traffic.set_defaults(run=count_traffic)
    step.set_defaults(run=measure_training)
    model.set_defaults(run=model_training)
    smoke.set_defaults(run=measure_paths)
    suite.set_defaults(run=measure_everything)
    decode.set_defaults(run=measure_decoders)
    store.set_defaults(run=measure_cache)
    startup.set_defaults(run=measure_startup)
    for one in (step, model, decode, store, smoke):
        one.add_argument("--output", type=Path, help="also write FILE.json and FILE.md")
    options = parser.parse_args(arguments)
    is_compared = getattr(options, "against", None) is not None
    if is_compared and (options.sweep or options.data == "real" or options.accumulation > 1):
        step.error(
            "--against times one micro-step on synthetic images; leave --sweep, --data and "
            "--accumulation out"
        )
    return options


def measure_training(options: argparse.Namespace, world: World) -> None:
    """Time the training step, or compare it with another library's."""
    load_config(options.config, options.overrides)  # fails before torch is imported
    from cmtmae_scale.engine.agreement import REMEDY, code_facts, require_equal
    from cmtmae_scale.runtime.collectives import on_all_ranks, pick_device, process_group
    from cmtmae_scale.tools.benchmark import against, table, training

    device = pick_device(world)
    on_gpu = device.type == "cuda"
    protocol = protocol_of(options, on_gpu)
    variants = training.make_variants(
        options.config, options.overrides, options.sweep, options.accumulation, world.world_size
    )
    facts = table.provenance(device, world.world_size)
    facts |= {"windows": protocol.windows, "steps per window": protocol.steps}

    def keep(results: Sequence[training.StepResult]) -> None:
        """Save the variants measured so far; the command may be ended before the others."""

        def save() -> None:
            if world.rank == 0 and options.output is not None:
                text = table.training_tables(results, on_gpu)
                headline = table.training_headline(results)
                save_tables(options.output, facts | {"headline": headline}, results, text)

        on_all_ranks(save)

    with process_group(world, device):
        given = {name: value for name, value in vars(options).items() if not callable(value)}
        require_equal(given | code_facts(device), REMEDY)
        if options.against is not None:
            outcome = against.compare_with_transformers(variants[0].config, protocol, device)
            text, results = against.render_mae_comparison(outcome, on_gpu), outcome
            headline = f"ours / transformers {outcome.ratio}"
        else:
            real = options.data == "real"
            results = training.measure_variants(variants, protocol, real, world, device, keep)
            text = table.training_tables(results, on_gpu)
            headline = table.training_headline(results)
    if world.rank == 0:
        show(options.output, facts | {"headline": headline}, results, text)


def protocol_of(options: argparse.Namespace, on_gpu: bool) -> "training.Protocol":
    """Return the numbers of warm-up steps, windows and steps per window."""
    from cmtmae_scale.tools.benchmark import training

    return training.Protocol(
        options.warm_up if options.warm_up is not None else (20 if on_gpu else 1),
        options.windows,
        options.steps or (50 if on_gpu else 1),
    )


def measure_cache(options: argparse.Namespace, world: World) -> None:
    """Compare a teacher's cache with the teacher online."""
    load_config(options.config, options.overrides)  # fails before torch is imported
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
    ratios = "; ".join(f"{name} {ratio}" for name, ratio in found.of_synthetic.items())
    headline = f"steps/s relative to a synthetic teacher: {ratios}"
    show(options.output, facts | {"headline": headline}, found, text)


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
    rates = "; ".join(f"{one.name} {one.per_s.median:.4g}" for one in found)
    headline = f"images/s: {rates}"
    text = decoding.decoders_table(found)
    show(options.output, facts | {"headline": headline}, found, text)


def count_traffic(options: argparse.Namespace, world: World) -> None:
    """Count the collectives of a step at several numbers of ranks."""
    load_config(options.config, options.overrides)  # fails before torch is imported
    import torch

    from cmtmae_scale.tools.benchmark import collectives, table

    found = collectives.count_settings(options.config, options.overrides, options.ranks)
    facts = table.provenance(torch.device("cpu"), 1)
    show(options.output, facts, found, collectives.collectives_table(found))


def measure_startup(options: argparse.Namespace, world: World) -> None:
    """Measure commands that end before they train."""
    from cmtmae_scale.tools.benchmark.startup import measure_commands, startup_table

    sys.stdout.write(startup_table(measure_commands(options.config, options.rounds)) + "\n")


def model_training(options: argparse.Namespace, world: World) -> None:
    """Print the modelled time of a recipe's step, by part."""
    load_config(options.config, options.overrides)  # fails before torch is imported
    from cmtmae_scale.tools.benchmark import step_model

    rates = step_model.Rates(
        options.tflops * 1e12,
        options.tbytes * 1e12,
        options.launch_us / 1e6,
        options.stall_ms / 1e3,
    )
    config = load_config(options.config, options.overrides)
    found = step_model.model_step(config, rates, options.eager)
    facts = {"command": shlex.join(["python", *sys.argv]), "headline": found.headline()}
    show(options.output, facts, found, step_model.model_table(found))


def measure_paths(options: argparse.Namespace, world: World) -> int:
    """Try every path that a run can take; returns 1 if one fails."""
    from cmtmae_scale.tools.benchmark import smoke

    output = options.output
    images = str(Path(options.path).resolve())
    facts = {"command": shlex.join(["python", *sys.argv])}

    def keep(found: list[smoke.Checked]) -> None:
        """Save the paths tried so far; the command may be ended before the others."""
        if output is not None:
            headline = smoke.smoke_headline(found)
            results = [one._asdict() for one in found]
            save_tables(output, facts | {"headline": headline}, results, smoke.smoke_table(found))

    # The temporary folder is beside the results: deleting them also deletes what a kill leaves.
    parent = None if output is None else output.parent
    if parent is not None:
        parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="smoke-", dir=parent) as folder:
        found = smoke.run_checks(images, Path(folder), keep)
    sys.stdout.write(f"{smoke.smoke_table(found)}\n\n{smoke.smoke_headline(found)}\n")
    return EXIT_CRASH if any(one.state == smoke.FAILED for one in found) else EXIT_DONE


def measure_everything(options: argparse.Namespace, world: World) -> int:
    """Run the jobs of the suite that have no result; returns 75 if some remain."""
    from cmtmae_scale.tools.benchmark import jobs, page, suite

    output = options.output or Path("runs/suite-small" if options.small else "runs/suite")
    output, images = output.resolve(), str(Path(options.data).resolve())
    os.chdir(find_clone())
    chosen = select_jobs(jobs.JOBS, options.only)
    if options.minutes and not options.small:
        refuse_without_gpu()
    again = options.only is not None
    try:
        with interrupt_at_sigterm():
            rows = suite.run_suite(chosen, images, options.minutes, output, options.small, again)
    except KeyboardInterrupt:
        logger.error("interrupted; the same command continues after the last finished row")
        return EXIT_STOPPED
    text = suite.suite_table(jobs.JOBS, rows)
    write_atomic(with_ending(output, ".md"), text + "\n")
    sys.stdout.write(text + "\n")
    if not options.small:
        page.write_page(Path("docs/performance.md"), jobs.JOBS, rows)
    return suite.suite_exit_code(chosen, rows)


def find_clone() -> Path:
    """Return the clone that holds this package; the suite runs its tests and writes its docs.

    Raises:
        ConfigError: the package is not in a clone.
    """
    folder = Path(__file__).resolve().parents[2]
    if not (folder / "docs" / "performance.md").is_file():
        raise ConfigError("the suite runs the project's tests and writes its docs; use a clone")
    return folder


def refuse_without_gpu() -> None:
    """Refuse a machine on which every row would take hours.

    Raises:
        ConfigError: names the option of the rehearsal.
    """
    import torch

    if not torch.cuda.is_available():
        raise ConfigError("suite: the rows are measured on a GPU, and there is none; add --small")


def select_jobs(jobs: "Sequence[Job]", names: Sequence[str] | None) -> "list[Job]":
    """Return the jobs of the given names, in order of priority.

    Raises:
        ConfigError: for an unknown name.
    """
    known = [job.name for job in jobs]
    for name in names or ():
        if name not in known:
            raise ConfigError(f"--only {name}: the rows are {', '.join(known)}")
    return [job for job in jobs if names is None or job.name in names]


def show(output: Path | None, facts: Mapping[str, object], results: object, text: str) -> None:
    """Print the provenance and the tables, and write them to ``output`` if given."""
    lines = [f"{name}: {value}" for name, value in facts.items()]
    sys.stdout.write("\n".join(lines) + "\n\n" + text + "\n")
    if output is not None:
        save_tables(output, facts, results, text)
