"""``launchers/evaluate.py METHOD``: accuracy of frozen features or of fine-tuned weights."""

import argparse
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

import timm
import torch

from cmtmae_scale import __version__
from cmtmae_scale.commands.finetune import finetune
from cmtmae_scale.config.finetune import load_finetune
from cmtmae_scale.engine.ending import as_rank
from cmtmae_scale.errors import EXIT_DONE, ConfigError
from cmtmae_scale.evaluation.across import sum_over_ranks
from cmtmae_scale.evaluation.encoders import Encoder, of_pixels
from cmtmae_scale.evaluation.features import Column, Reading, Table, extract
from cmtmae_scale.evaluation.images import Sets, check_share, open_pair, open_split
from cmtmae_scale.evaluation.knn import NEIGHBOURS, TEMPERATURE, knn_scores
from cmtmae_scale.evaluation.linear import linear_probe
from cmtmae_scale.evaluation.logistic import logistic_score
from cmtmae_scale.evaluation.result import Row, as_json, table, verdict
from cmtmae_scale.evaluation.subject import WEIGHTS, Subject, from_place, from_timm
from cmtmae_scale.finetuning.start import named, start_of
from cmtmae_scale.runtime.arguments import Parser, at_least_one
from cmtmae_scale.runtime.launch import World, find_world, pick_device, process_group
from cmtmae_scale.runtime.log import set_up_logging
from cmtmae_scale.runtime.storage import write_atomic
from dataloading.one_pass import CENTRE
from dataloading.stream import DecoderName

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate as one rank; returns the exit code."""
    return as_rank(lambda: launch(arguments))


def launch(arguments: Sequence[str] | None) -> int:
    """Read the command line, evaluate and print; returns the exit code of this start."""
    options = parse(arguments)
    world = find_world()
    set_up_logging(world.rank, world.world_size)
    device = pick_device(world)
    with process_group(world, device):
        text, code = options.run(options, world, device)
    if world.rank == 0:
        sys.stdout.write(text + "\n")
    return code


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; a usage error exits with 78."""
    parser = Parser(description="What are weights worth?", allow_abbrev=False)
    methods = parser.add_subparsers(dest="method", required=True)
    knn = methods.add_parser("knn", help="k nearest neighbours", allow_abbrev=False)
    linear = methods.add_parser("linear", help="linear classifiers", allow_abbrev=False)
    tuned = methods.add_parser("finetune", help="train all weights", allow_abbrev=False)
    for one in (knn, linear, tuned):
        add_weights(one)
    for one in (knn, linear):
        add_images(one)
        one.set_defaults(run=probe_features)
    knn.add_argument("--k", type=at_least_one, nargs="+", default=list(NEIGHBOURS))
    knn.add_argument(
        "--temperature",
        type=not_negative,
        default=TEMPERATURE,
        help="T of the votes' weights exp(cosine / T), 0.07; 0: equal votes",
    )
    linear.add_argument(
        "--epochs", type=at_least_one, default=100, help="passes over the features; 100"
    )
    linear.add_argument(
        "--held-out",
        type=float,
        default=0.1,
        help="share of the training images on which the learning rate is chosen; 0.1",
    )
    tuned.add_argument("--config", required=True, help="such as configs/finetune_base.yaml")
    tuned.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the recipe")
    tuned.set_defaults(run=tune_all_weights)
    return parser.parse_args(arguments)


def not_negative(text: str) -> float:
    """Read a number of at least 0."""
    number = float(text)
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} must be at least 0")
    return number


def add_weights(parser: argparse.ArgumentParser) -> None:
    """Add what is evaluated."""
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--checkpoint", type=Path, help="a run, a checkpoint, or a .safetensors file of export.py"
    )
    which.add_argument("--timm", metavar="MODEL", help="a ViT of timm: MODEL.TAG, or with --file")
    parser.add_argument(
        "--weights",
        choices=WEIGHTS,
        help="of a checkpoint; default: momentum where the run has it, else student",
    )
    parser.add_argument("--arch", help="timm's name, for a .safetensors file without config.json")
    parser.add_argument("--file", help="weights for --timm")
    parser.add_argument("--size", type=at_least_one, help="side of pictures for --timm, pixels")
    # DeepSpeed's launcher adds it; ranks come from the environment.
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)


def add_images(parser: argparse.ArgumentParser) -> None:
    """Add what is looked at, beside what, and where the result goes."""
    parser.add_argument(
        "--no-baselines", action="store_true", help="without raw pixels and random weights"
    )
    parser.add_argument(
        "--train", help="labelled images, folder or tars; default: the run's eval.train_path"
    )
    parser.add_argument("--test", help="labelled images; default: the run's eval.test_path")
    parser.add_argument(
        "--split",
        type=float,
        metavar="SHARE",
        help="without --test: learn from this share of each class of --train, test on the rest",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the split and of the probe; 0")
    parser.add_argument("--batch", type=at_least_one, default=64, help="images a rank at a time")
    parser.add_argument("--threads", type=at_least_one, default=4, help="readers a rank")
    parser.add_argument(
        "--decode", choices=get_args(DecoderName), default="auto", help="as data.decode"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="JSON; default: RUN_DIR/evaluation/..."
    )


@dataclass
class Probing:
    """Everything that a probe of frozen features needs."""

    options: argparse.Namespace
    columns: list[Column]
    train: Table
    test: Table
    num_classes: int


def probe_features(
    options: argparse.Namespace, world: World, device: torch.device
) -> tuple[str, int]:
    """Evaluate frozen features; returns what is to be said, and the exit code. A collective."""
    check(options)
    check_sets(options)
    subject = open_subject(options, world, device)
    sets = open_sets(options, subject)
    encoders = [subject.encoder]
    if not options.no_baselines:
        encoders += [one for one in (subject.random, of_pixels(subject.encoder.size)) if one]
    reading = Reading(options.batch, options.threads, options.decode)
    train = extract(sets.train, encoders, reading, world, device)
    test = extract(sets.test, encoders, reading, world, device)
    counts = [
        int(sum_over_ranks(torch.tensor(len(one.positions), device=device)))
        for one in (train, test)
    ]
    probing = Probing(options, list(train.columns), train, test, len(sets.classes))
    rows = list(METHODS[options.method](probing))
    said = verdict(rows, subject.encoder.name)
    file = result_file(options, subject)
    if world.rank == 0 and file is not None:
        write_result(file, record(options, subject, encoders, sets, counts, rows, said))
    lines = "\n".join(
        [
            f"{subject.encoder.name}: {subject.facts['arch']} at {subject.encoder.size} pixels",
            *describe_sets(sets, counts, options, subject),
            "",
            table(rows, len(sets.classes)),
            "",
            said,
            "intervals take the test images as independent of each other",
            f"written to {file}" if file else "not written to a file; name one with --out",
        ]
    )
    return lines, EXIT_DONE


def tune_all_weights(
    options: argparse.Namespace, world: World, device: torch.device
) -> tuple[str, int]:
    """Fine-tune, or continue to; returns what is to be said, and the exit code. A collective."""
    check(options)
    config = load_finetune(options.config, options.overrides)
    options.seed = config.run.seed
    words = named(options)
    return finetune(
        *(config, words, lambda: start_of(open_subject(options, world, device), words)),
        *(world, device),
    )


def check(options: argparse.Namespace) -> None:
    """Refuse options that would have no effect.

    Raises:
        ConfigError: naming the option and what it belongs to.
    """
    given = vars(options)
    for owner, names in {"checkpoint": ("weights", "arch"), "timm": ("file", "size")}.items():
        for name in names:
            if given[name] is not None and given[owner] is None:
                raise ConfigError(f"--{name} belongs to --{owner}")


def check_sets(options: argparse.Namespace) -> None:
    """Refuse options about the images that would have no effect.

    Raises:
        ConfigError: naming the option.
    """
    if options.split is not None:
        check_share("--split", options.split)
        if options.test is not None:
            raise ConfigError("--split makes the test set out of --train; drop it, or --test")
    if "held_out" in vars(options):
        check_share("--held-out", options.held_out)


def open_subject(options: argparse.Namespace, world: World, device: torch.device) -> Subject:
    """Open the weights that the options name."""
    if options.timm is not None:
        return from_timm(options.timm, options.file, options.size, options.seed, world, device)
    return from_place(options.checkpoint, options.weights, options.arch, world, device)


def open_sets(options: argparse.Namespace, subject: Subject) -> Sets:
    """Open the images that the options name, or the run's own.

    Raises:
        ConfigError: if they are not named.
    """
    of_run = subject.config.eval if subject.config is not None else None
    train = options.train or (of_run and of_run.train_path)
    if not train:
        raise ConfigError("--train PATH must be given: the run names no eval.train_path")
    options.train = train
    if options.split is not None:
        return open_split(train, options.split, options.seed)
    options.test = options.test or (of_run and of_run.test_path)
    if not options.test:
        raise ConfigError(
            "--test PATH must be given: the run names no eval.test_path; or --split 0.8 makes two "
            "sets of one"
        )
    return open_pair(train, options.test)


def knn_rows(probing: Probing) -> Iterator[Row]:
    """k-NN with every column."""
    options = probing.options
    for column in probing.columns:
        found = knn_scores(probing.train, probing.test, column, options.k, options.temperature)
        for k, score in found:
            yield Row(*column, f"k-NN k={k}", score)


def linear_rows(probing: Probing) -> Iterator[Row]:
    """The linear probe and logistic regression with every column."""
    options, train, test = probing.options, probing.train, probing.test
    for column in probing.columns:
        found = linear_probe(
            *(train, test, column, probing.num_classes),
            *(options.epochs, options.held_out, options.seed),
        )
        setting = found.setting
        method = f"linear, lr {setting.base_lr:g}, decay {setting.weight_decay:g}"
        yield Row(*column, method, found.score, found.hits)
        yield Row(*column, "logistic", logistic_score(train, test, column, probing.num_classes))


METHODS = {"knn": knn_rows, "linear": linear_rows}


def describe_sets(
    sets: Sets, counts: Sequence[int], options: argparse.Namespace, subject: Subject
) -> list[str]:
    """Say what was learnt from and what was asked; ``counts`` images could be decoded."""
    size = subject.encoder.size
    lines = [
        f"train: {counts[0]} images of {len(sets.classes)} classes ({options.train})",
        f"test:  {counts[1]} images ({options.test or options.train})",
        f"view:  {CENTRE:.3g} of the shorter side from the centre, resized to {size} pixels",
    ]
    lost = len(sets.train) + len(sets.test) - sum(counts)
    if lost:
        lines.append(f"left out: {lost} images that cannot be decoded")
    return [*lines, sets.split] if sets.split else lines


def result_file(options: argparse.Namespace, subject: Subject) -> Path | None:
    """Where the result goes."""
    if options.out is not None or subject.run_dir is None:
        return options.out
    name = f"{options.method}-{subject.facts['weights']}-step-{subject.facts['step']:08d}.json"
    return subject.run_dir / "evaluation" / name


def record(
    options: argparse.Namespace,
    subject: Subject,
    encoders: Sequence[Encoder],
    sets: Sets,
    counts: Sequence[int],
    rows: Sequence[Row],
    said: str,
) -> dict[str, Any]:
    """Everything about an evaluation, as JSON values."""
    settings = {
        name: options_value
        for name, options_value in vars(options).items()
        if name in ("k", "temperature", "epochs", "held_out", "split", "batch", "decode")
    }
    images = {
        name: {"path": path, "images": len(one), "used": used, "digest": one.index.digest}
        for name, path, one, used in (
            ("train", options.train, sets.train, counts[0]),
            ("test", options.test or options.train, sets.test, counts[1]),
        )
    }
    return {
        "method": options.method,
        "subject": subject.facts,
        "size": subject.encoder.size,
        "weights_sha256": {one.name: one.digest for one in encoders},
        "results": [as_json(row, len(sets.classes)) for row in rows],
        "verdict": said,
        "images": images,
        "classes": len(sets.classes),
        "split": sets.split or None,
        "settings": settings,
        "seed": options.seed,
        "versions": {
            "cmtmae_scale": __version__,
            "torch": torch.__version__,
            "timm": timm.__version__,
        },
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def write_result(file: Path, found: dict[str, Any]) -> None:
    """Write the result whole or not at all.

    Raises:
        ConfigError: if it cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, json.dumps(found, indent=1) + "\n")
    except OSError as error:
        raise ConfigError(
            f"{file}: cannot be written ({error.strerror}); name another file with --out"
        ) from error
