"""Scores, confidence intervals, the verdict against baselines, and the result file."""

import itertools
import json
import math
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cmtmae_scale.errors import ConfigError, StorageError, may_pass
from cmtmae_scale.evaluation.images import ImageSet
from cmtmae_scale.evaluation.measured import method_family, state_verdict
from cmtmae_scale.runtime.storage import read_inside, read_json, write_atomic
from cmtmae_scale.runtime.versions import library_versions

TOP = 5
IDENTITY = ("method", "size", "weights_sha256", "images", "split", "settings", "seed")
"""Keys of a result file that distinguish evaluations."""


class Score(NamedTuple):
    """Counts over a test set."""

    correct: int
    correct_top5: int
    """Images whose class is among the five with the most votes."""
    total: int

    def plus(self, other: "Score") -> "Score":
        """Add the counts of another part of the test set."""
        return Score(*(a + b for a, b in zip(self, other, strict=True)))


class Row(NamedTuple):
    """One line of the result."""

    weights: str
    features: str
    method: str
    score: Score
    hits: Tensor | None = None
    """Whether each test image is classified correctly, bool in the order of the test set."""


def score_predictions(values: Tensor, truth: Tensor) -> Score:
    """Count correct predictions; of classes with equal values the first counts as larger.

    Args:
        values: votes or logits ``[Q, C]``; a class of value ``-inf`` never counts, and a row that
            holds NaN or infinity is no hit.
        truth: classes, int64 ``[Q]``.
    """
    rank = rank_of_truth(values, truth)
    return Score(int((rank < 1).sum()), int((rank < TOP).sum()), len(truth))


def rank_of_truth(values: Tensor, truth: Tensor) -> Tensor:
    """Return the number of classes before the true class, int64 ``[Q]``; values ``[..., Q, C]``.

    Where the true class is not finite, or any class is NaN or infinity, it is at least ``TOP``:
    every comparison with NaN is false, so that a count alone would be 0, a hit.
    """
    own = values.gather(-1, truth.expand(values.shape[:-1])[..., None])
    classes = torch.arange(values.shape[-1], device=values.device)
    before = (values > own) | ((values == own) & (classes < truth[:, None]))
    missed = ~own[..., 0].isfinite() | (values.isnan() | values.isposinf()).any(-1)
    return before.sum(-1).masked_fill(missed, max(values.shape[-1], TOP))


def wilson_interval(correct: int, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a proportion, for independent samples.

    Source: E. B. Wilson, Probable inference, the law of succession, and statistical inference,
    JASA 22 (1927).
    """
    z = 1.959963984540054
    share, spread = correct / count, z * z / count
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / count + spread / count / 4) / (1 + spread)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def format_rows(rows: Sequence[Row], num_classes: int) -> str:
    """Format rows as a text table."""
    with_five = num_classes > TOP
    width = max(len(row.weights) for row in rows)
    wide = max(len(row.method) for row in rows)
    head = f"{'weights':{width}}  features  {'method':{wide}}  top-1 %  95 % interval   correct"
    lines = [head + ("     top-5 %" if with_five else "")]
    for row in rows:
        low, high = (100 * end for end in wilson_interval(row.score.correct, row.score.total))
        text = (
            f"{row.weights:{width}}  {row.features:8}  {row.method:{wide}}  "
            f"{100 * row.score.correct / row.score.total:7.2f}  {low:6.2f} to {high:6.2f}  "
            f"{row.score.correct:>5}/{row.score.total}"
        )
        if with_five:
            text += f"  {100 * row.score.correct_top5 / row.score.total:7.2f}"
        lines.append(text)
    return "\n".join(lines)


def judge_rows(rows: Sequence[Row], subject: str) -> str:
    """State whether the subject is clearly better than each baseline: disjoint intervals.

    The compared measure is fixed beforehand: the first row of the mean-patch features (of the
    pixels), against the same method of the baselines.
    """
    own = next(row for row in rows if row.weights == subject and row.features == "patches")
    method = method_family(own.method)
    baselines = {
        row.weights: row
        for row in reversed(rows)
        if row.weights != subject and row.features != "cls" and method_family(row.method) == method
    }
    low, _ = wilson_interval(own.score.correct, own.score.total)
    unbeaten = [
        name
        for name, row in baselines.items()
        if wilson_interval(row.score.correct, row.score.total)[1] >= low
    ]
    return state_verdict(subject, baselines, unbeaten, f"{method}, mean of patches")


def result_record(rows: Sequence[Row], num_classes: int, **facts: Any) -> dict[str, Any]:
    """Return a result file's content: the rows, the given facts, versions and date."""
    return facts | {
        "results": [row_record(row, num_classes) for row in rows],
        "classes": num_classes,
        "versions": library_versions(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def row_record(row: Row, num_classes: int) -> dict[str, Any]:
    """Return a row for the result file; accuracies in [0, 1]."""
    record: dict[str, Any] = {
        "weights": row.weights,
        "features": row.features,
        "method": row.method,
        "accuracy": row.score.correct / row.score.total,
        "interval_95": wilson_interval(row.score.correct, row.score.total),
        "correct": row.score.correct,
        "count": row.score.total,
    }
    if num_classes > TOP:
        record["accuracy_top5"] = row.score.correct_top5 / row.score.total
    if row.hits is not None:
        record["hits"] = pack_hits(row.hits)
    return record


def image_set_record(path: str, images: ImageSet, used: int) -> dict[str, Any]:
    """Return an image set for the result file; ``used`` images can be decoded."""
    return {
        "path": path,
        "images": len(images),
        "used": used,
        "digest": images.index.digest,
        "labels_digest": images.index.labels_digest(),
    }


def write_result(
    file: Path, record: dict[str, Any], remedy: str = "name another file with --out"
) -> None:
    """Write a result file whole or not at all.

    Args:
        file: the result file.
        record: its content.
        remedy: what to do where the file can never be written.

    Raises:
        ConfigError: if it cannot be written.
        StorageError: if its store is full or fails.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, json.dumps(record, indent=1) + "\n")
    except OSError as error:
        if may_pass(error):
            text = f"{file}: cannot be written ({error.strerror}); make room there and try again"
            raise StorageError(text) from error
        raise ConfigError(f"{file}: cannot be written ({error.strerror}); {remedy}") from error


def free_file(file: Path, record: dict[str, Any]) -> Path:
    """Return the first of ``NAME.json``, ``NAME-2.json``, ... without another evaluation's result.

    Args:
        file: the first.
        record: content that is to be written; a result of the same evaluation is replaced.
    """
    wanted = json.loads(json.dumps(record))
    numbered = (file.with_stem(f"{file.stem}-{number}") for number in itertools.count(2))
    return next(one for one in itertools.chain([file], numbered) if not holds_other(one, wanted))


def holds_other(file: Path, record: dict[str, Any]) -> bool:
    """Return whether a file exists that is not a result of a record's evaluation.

    ``False`` where no file can exist: the write reports why.
    """
    try:
        found = read_json(read_inside(file.parent, file))
    except (OSError, ValueError):
        return os.path.lexists(file)
    return not isinstance(found, dict) or any(found.get(key) != record.get(key) for key in IDENTITY)


def pack_hits(hits: Tensor) -> str:
    """Encode hits ``[n]`` as hexadecimal digits, one bit per image, the first image highest."""
    return np.packbits(hits.numpy()).tobytes().hex()


def unpack_hits(text: str, count: int) -> NDArray[np.bool_]:
    """Decode the output of ``pack_hits``, bool ``[count]``.

    Raises:
        TypeError, ValueError: if it is not the output for ``count`` images.
    """
    packed = np.frombuffer(bytes.fromhex(text), np.uint8)
    if len(packed) != -(-count // 8):
        raise ValueError(f"{len(packed)} bytes of hits are not those of {count} images")
    return np.unpackbits(packed, count=count).astype(bool)
