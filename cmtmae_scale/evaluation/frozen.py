"""k-NN and linear probes of frozen features: what ``cmtmae evaluate`` computes and writes."""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from cmtmae_scale.engine.agreement import require_equal_weights
from cmtmae_scale.errors import ConfigError
from cmtmae_scale.evaluation.across import sum_over_ranks
from cmtmae_scale.evaluation.encoders import pixel_encoder
from cmtmae_scale.evaluation.features import FeatureTable, ReadOptions, extract_features
from cmtmae_scale.evaluation.images import Sets, open_pair, open_split
from cmtmae_scale.evaluation.knn import count_images, knn_scores, warn_of_few_images
from cmtmae_scale.evaluation.linear import linear_probe
from cmtmae_scale.evaluation.logistic import logistic_score
from cmtmae_scale.evaluation.result import (
    Row,
    format_rows,
    free_file,
    image_set_record,
    judge_rows,
    result_record,
    write_result,
)
from cmtmae_scale.evaluation.subject import Subject, open_subject
from cmtmae_scale.runtime.collectives import on_all_ranks
from cmtmae_scale.runtime.launch import World
from dataloading.errors import DataError
from dataloading.one_pass import CENTRE

SETTINGS = ("k", "temperature", "epochs", "held_out", "split", "batch", "decode")
"""Options that the result file records."""


def evaluate_frozen(options: argparse.Namespace, world: World, device: torch.device) -> str:
    """Extract features, probe them and write the result file. A collective.

    The options are as ``commands/evaluate.py`` parses and checks them.

    Returns:
        The report for people.
    """
    subject = open_subject(options, world, device)
    named = (subject.encoder, subject.random)
    require_equal_weights(lambda: {f"digest of {one.name}": one.digest for one in named if one})
    sets = open_sets(options, subject)
    encoders = [subject.encoder]
    if not options.no_baselines:
        baselines = (subject.random, pixel_encoder(subject.encoder.size, subject.encoder.grid))
        encoders += [encoder for encoder in baselines if encoder]
    reading = ReadOptions(options.batch, options.threads, options.decode)
    train = extract_features(sets.train, encoders, reading, world, device)
    test = extract_features(sets.test, encoders, reading, world, device)
    lengths = torch.tensor([len(train.positions), len(test.positions)], device=device)
    counts = sum_over_ranks(lengths).tolist()
    try:
        rows = list(PROBES[options.method](options, train, test, len(sets.classes)))
    except DataError as error:
        raise DataError(f"{name_weights(subject)}: {error}") from error
    verdict = judge_rows(rows, subject.encoder.name)
    test_path = options.test or options.train
    record = result_record(
        rows,
        len(sets.classes),
        method=options.method,
        subject=subject.facts,
        size=subject.encoder.size,
        weights_sha256={encoder.name: encoder.digest for encoder in encoders},
        verdict=verdict,
        images={
            "train": image_set_record(options.train, sets.train, counts[0]),
            "test": image_set_record(test_path, sets.test, counts[1]),
        },
        split=sets.split or None,
        settings={key: value for key, value in vars(options).items() if key in SETTINGS},
        seed=options.seed,
    )
    file = write_on_first(record, options, subject, world)
    excluded = len(sets.train) + len(sets.test) - sum(counts)
    size = subject.encoder.size
    lines = [
        f"{subject.encoder.name}: {subject.facts['arch']} at {size} pixels",
        f"train: {counts[0]} images of {len(sets.classes)} classes ({options.train})",
        f"test:  {counts[1]} images ({test_path})",
        f"view:  {CENTRE:.3g} of the shorter side from the centre, resized to {size} pixels",
        *([f"excluded: {excluded} images that cannot be decoded"] if excluded else []),
        *([sets.split] if sets.split else []),
        "",
        format_rows(rows, len(sets.classes)),
        "",
        f"chance: {100 / len(sets.classes):.2f} %, one of {len(sets.classes)} classes",
        verdict,
        "intervals take the test images as independent of each other",
        f"written to {file}" if file else "not written to a file; name one with --out",
    ]
    return "\n".join(lines)


def name_weights(subject: Subject) -> str:
    """Return the checkpoint, the file or the model that the evaluated weights are read from."""
    facts = subject.facts
    place = facts.get("checkpoint") or facts.get("file") or f"--timm={facts.get('timm')}"
    return str(place)


def open_sets(options: argparse.Namespace, subject: Subject) -> Sets:
    """Open the images that the options name, or the run's own; fills ``train`` and ``test`` in.

    Raises:
        ConfigError: if neither the options nor the run name them.
    """
    run_paths = subject.config.eval if subject.config is not None else None
    upright = subject.config.data.exif_orientation if subject.config is not None else True
    options.train = options.train or (run_paths and run_paths.train_path)
    if not options.train:
        raise ConfigError("--train PATH must be given: the run names no eval.train_path")
    if options.split is not None:
        return open_split(options.train, options.split, options.seed, upright)
    options.test = options.test or (run_paths and run_paths.test_path)
    if not options.test:
        raise ConfigError(
            "--test PATH must be given: the run names no eval.test_path; or --split 0.8 makes two "
            "sets of one"
        )
    return open_pair(options.train, options.test, exif_orientation=upright)


def knn_rows(
    options: argparse.Namespace, train: FeatureTable, test: FeatureTable, num_classes: int
) -> Iterator[Row]:
    """Yield k-NN results of every column, under the k that is used."""
    found = count_images(train)
    warn_of_few_images(found, options.k)
    neighbours = list(dict.fromkeys(min(k, found) for k in options.k))
    for column in train.columns:
        for k, score in knn_scores(train, test, column, neighbours, options.temperature):
            yield Row(*column, f"k-NN k={k}", score)


def linear_rows(
    options: argparse.Namespace, train: FeatureTable, test: FeatureTable, num_classes: int
) -> Iterator[Row]:
    """Yield results of the linear probe and of logistic regression for every column."""
    for column in train.columns:
        probe = linear_probe(
            train, test, column, num_classes, options.epochs, options.held_out, options.seed
        )
        setting = probe.setting
        method = f"linear, lr {setting.base_lr:g}, decay {setting.weight_decay:g}"
        yield Row(*column, method, probe.score, probe.hits)
        yield Row(*column, "logistic", logistic_score(train, test, column, num_classes))


Probe = Callable[[argparse.Namespace, FeatureTable, FeatureTable, int], Iterator[Row]]
PROBES: dict[str, Probe] = {"knn": knn_rows, "linear": linear_rows}


def write_on_first(
    record: dict[str, Any], options: argparse.Namespace, subject: Subject, world: World
) -> Path | None:
    """Write the result file on rank 0: ``--out``, else a file of its own in the run's folder.

    Returns:
        The file; ``None``: none was written. A collective.

    Raises:
        ConfigError, StorageError: on every rank; see ``write_result``.
    """

    def write() -> Path | None:
        file = options.out or result_file(options, subject)
        if world.rank == 0 and file is not None:
            file = file if options.out is not None else free_file(file, record)
            write_result(file, record)
        return file

    return on_all_ranks(write)


def result_file(options: argparse.Namespace, subject: Subject) -> Path | None:
    """Return the first choice of a result file in the run's folder; ``None``: there is no run."""
    if subject.run_dir is None:
        return None
    weights = subject.facts["weights"].replace(":", "-")  # not allowed in file names everywhere
    name = f"{options.method}-{weights}-step-{subject.facts['step']:08d}.json"
    return subject.run_dir / "evaluation" / name
