"""Segmentation, propagation and label-free measures: what ``cmtmae evaluate`` computes."""

import argparse
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from cmtmae_scale.engine.agreement import require_equal_weights
from cmtmae_scale.errors import ConfigError
from cmtmae_scale.evaluation.across import sum_over_ranks
from cmtmae_scale.evaluation.encoders import Encoder, pixel_encoder
from cmtmae_scale.evaluation.features import ReadOptions
from cmtmae_scale.evaluation.foreground import ShownMaps, maps_of_subject, measure_attention
from cmtmae_scale.evaluation.frozen import write_on_first
from cmtmae_scale.evaluation.images import open_shared_index
from cmtmae_scale.evaluation.masks import BROKEN, MaskedSet, is_voc, open_masked, split_masked
from cmtmae_scale.evaluation.measured import (
    Measured,
    format_measured,
    judge_measured,
    measured_record,
)
from cmtmae_scale.evaluation.propagation import ShownClip, open_clips, propagate_clips
from cmtmae_scale.evaluation.representation import measure_lidar, represent
from cmtmae_scale.evaluation.segmentation import Shown, segment
from cmtmae_scale.evaluation.subject import Subject, open_subject
from cmtmae_scale.runtime.collectives import on_all_ranks
from cmtmae_scale.runtime.launch import World
from cmtmae_scale.runtime.versions import library_versions

SETTINGS = ("split", "batch", "decode")
"""Options that the result file records."""
INTERVALS = "intervals: percentiles of 1,000 bootstrap resamples of the {units}"
PARTS = (("train", "test"), ("train", "val"))

Panels = Shown | ShownMaps | ShownClip | None
"""Content of a figure."""


class Outcome(NamedTuple):
    """Result of one method."""

    rows: list[Measured]
    panels: Panels
    images: dict[str, Any]
    """The images, for the result file."""
    lines: list[str]
    """The images and what was excluded, for people."""
    units: str
    """Units that the bootstrap draws."""


class Evaluated(NamedTuple):
    """A whole evaluation."""

    text: str
    """The report for people."""
    panels: Panels
    file: Path | None
    """The result file."""


def evaluate_dense(options: argparse.Namespace, world: World, device: torch.device) -> Evaluated:
    """Run one of the methods and write the result file. A collective.

    The options are as ``commands/evaluate.py`` parses and checks them.
    """
    subject = open_subject(options, world, device)
    if options.no_baselines:
        subject.build_random = None
    named = (subject.encoder, subject.random)
    require_equal_weights(lambda: {f"digest of {one.name}": one.digest for one in named if one})
    encoders = [subject.encoder]
    if not options.no_baselines:
        pixels = pixel_encoder(subject.encoder.size, subject.encoder.grid)
        encoders += [one for one in (subject.random, pixels) if one]
    outcome = METHODS[options.method](options, subject, encoders, world, device)
    verdict = judge_measured(outcome.rows, subject.encoder.name)
    record = {
        "method": options.method,
        "subject": subject.facts,
        "size": subject.encoder.size,
        "weights_sha256": {encoder.name: encoder.digest for encoder in encoders},
        "verdict": verdict,
        "images": outcome.images,
        "settings": {key: value for key, value in vars(options).items() if key in SETTINGS},
        "seed": options.seed,
        "results": [measured_record(row) for row in outcome.rows],
        "intervals": INTERVALS.format(units=outcome.units),
        "versions": library_versions(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    file = write_on_first(record, options, subject, world)
    size = subject.encoder.size
    lines = [
        f"{subject.encoder.name}: {subject.facts['arch']} at {size} pixels, patches "
        f"{subject.encoder.grid[0]} x {subject.encoder.grid[1]}",
        *outcome.lines,
        "",
        format_measured(outcome.rows),
        "",
        verdict,
        f"{INTERVALS.format(units=outcome.units)}, taken as independent of each other",
        f"written to {file}" if file else "not written to a file; name one with --out",
    ]
    return Evaluated("\n".join(lines), outcome.panels, file)


def run_segmentation(
    options: argparse.Namespace,
    subject: Subject,
    encoders: list[Encoder],
    world: World,
    device: torch.device,
) -> Outcome:
    """Segment a test set from the patches of a training set. A collective."""
    own = subject.config.eval.segmentation_path if subject.config is not None else None
    options.train = options.train or own
    if not options.train:
        raise ConfigError("--train PATH must be given: the run names no eval.segmentation_path")
    train, test = open_masked_pair(options.train, options.test, options.split, options.seed)
    reading = ReadOptions(options.batch, options.threads, "torch")
    rows: list[Measured] = []
    panels: Shown | None = None
    for encoder in encoders:
        found, shown = segment(encoder, train, test, reading, options.seed, world, device)
        rows += found
        panels = panels or shown
    records: dict[str, Any] = {}
    lines: list[str] = []
    for name, images in (("train", train), ("test", test)):
        excluded = total_excluded(images)
        records[name] = masked_record(images, excluded)
        lines.append(f"{name + ':':6} {describe_masked(images, excluded)}")
    lines.append(f"view:  the whole image, squeezed to {subject.encoder.size} pixels, as its mask")
    return Outcome(rows, panels, records, lines, "test images")


def run_representation(
    options: argparse.Namespace,
    subject: Subject,
    encoders: list[Encoder],
    world: World,
    device: torch.device,
) -> Outcome:
    """Measure ranks and similarities, and attention maps where there are masks. A collective."""
    run = subject.config.eval if subject.config is not None else None
    path = options.images or (run and run.test_path)
    if not path:
        raise ConfigError("--images PATH must be given: the run names no eval.test_path")
    upright = subject.config.data.exif_orientation if subject.config is not None else True
    index = open_shared_index(path, None, upright)
    reading = ReadOptions(options.batch, options.threads, options.decode)
    ids = np.arange(len(index), dtype=np.int64)
    rows, decoded = represent(encoders, index, ids, reading, world, device)
    if len(decoded) > 1:
        rows += measure_lidar(encoders, index, decoded, reading, world, device)
    records: dict[str, Any] = {
        "images": {"path": path, "images": len(index), "digest": index.digest}
    }
    lines = [f"images: {rows[0].total} of {len(index)} ({path}), centre crops"]
    panels: ShownMaps | None = None
    if options.masks is not None:
        masked = open_masked(options.masks, "val")
        maps = on_all_ranks(lambda: maps_of_subject(subject, device))
        found, unclear, panels = measure_attention(maps, masked, reading, world, device)
        rows += found
        excluded = total_excluded(masked)
        if unclear:
            excluded["without patches of both kinds"] = unclear
        records["masks"] = masked_record(masked, excluded)
        lines.append(f"masks:  {describe_masked(masked, excluded)}")
    return Outcome(rows, panels, records, lines, "images")


def run_propagation(
    options: argparse.Namespace,
    subject: Subject,
    encoders: list[Encoder],
    world: World,
    device: torch.device,
) -> Outcome:
    """Propagate the masks of the clips' first frames. A collective."""
    clips = open_clips(options.clips)
    rows: list[Measured] = []
    panels: ShownClip | None = None
    for encoder in encoders:
        found, shown = propagate_clips(encoder, clips.clips, world, device)
        rows += found
        panels = panels or shown
    frames = sum(len(clip.frames) for clip in clips.clips)
    record = {
        "clips": {
            "path": options.clips,
            "clips": len(clips.clips),
            "frames": frames,
            "excluded": clips.excluded,
        }
    }
    reasons = [f"{count} {reason}" for reason, count in clips.excluded.items()]
    lines = [
        f"clips: {len(clips.clips)} of {frames} frames ({options.clips})",
        *([f"excluded: {', '.join(reasons)}"] if reasons else []),
    ]
    return Outcome(rows, panels, record, lines, "objects")


Method = Callable[[argparse.Namespace, Subject, list[Encoder], World, torch.device], Outcome]
METHODS: dict[str, Method] = {
    "segmentation": run_segmentation,
    "representation": run_representation,
    "propagation": run_propagation,
}


def open_masked_pair(
    train: str, test: str | None, split: float | None, seed: int
) -> tuple[MaskedSet, MaskedSet]:
    """Open training and test images with masks. A collective.

    Without ``test`` and ``split``, ``train`` is Pascal VOC's folder, of which ``train.txt`` and
    ``val.txt`` are taken, or a folder that holds ``train/`` and ``test/`` (or ``val/``).

    Raises:
        ConfigError: if there is nothing to test on.
        DataError: if there are no images with masks.
    """
    if test is not None:
        return open_masked(train, "train"), open_masked(test, "val")
    if split is not None:
        return split_masked(open_masked(train, "train"), split, seed)
    first, second = on_all_ranks(lambda: find_parts(train))
    return open_masked(first, "train"), open_masked(second, "val")


def find_parts(train: str) -> tuple[str, str]:
    """Return the training and the test images of one folder.

    Raises:
        ConfigError: if there is nothing to test on.
    """
    folder = Path(train)
    if is_voc(folder):
        return train, train
    for names in PARTS:
        if all((folder / name).is_dir() for name in names):
            return str(folder / names[0]), str(folder / names[1])
    raise ConfigError(
        f"{train}: nothing to test on; give --test PATH or --split 0.8, or name Pascal VOC's "
        "folder or one with train/ and test/, as eval.segmentation_path must"
    )


def total_excluded(images: MaskedSet) -> dict[str, int]:
    """Return the exclusions over all ranks, undecodable images among them. A collective."""
    broken = int(sum_over_ranks(torch.tensor([len(images.broken)])))
    excluded = dict(images.excluded)
    if broken:
        excluded[BROKEN] = excluded.get(BROKEN, 0) + broken
    return excluded


def masked_record(images: MaskedSet, excluded: dict[str, int]) -> dict[str, Any]:
    """Return a set for the result file."""
    return {
        "path": str(images.root),
        "images": len(images),
        "digest": images.digest,
        "excluded": excluded,
    }


def describe_masked(images: MaskedSet, excluded: dict[str, int]) -> str:
    """Return a set for people."""
    text = f"{len(images)} images with masks ({images.root})"
    reasons = [f"{count} {reason}" for reason, count in sorted(excluded.items())]
    return f"{text}; excluded: {', '.join(reasons)}" if reasons else text
