"""How many were right, how sure that is, and what may be said of it."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

TOP = 5


class Score(NamedTuple):
    """Counts over a test set."""

    correct: int
    correct_top5: int
    """Images whose class is among the five with the most votes."""
    total: int

    def plus(self, other: "Score") -> "Score":
        """Counts of both together."""
        return Score(*(a + b for a, b in zip(self, other, strict=True)))


class Row(NamedTuple):
    """One line of the result."""

    weights: str
    features: str
    method: str
    score: Score
    hits: Tensor | None = None
    """Which test images were right, bool in the order of the test set, where it is kept."""


def score(values: Tensor, truth: Tensor) -> Score:
    """Count hits; of classes with equal values the first counts as larger.

    Args:
        values: votes or logits ``[Q, C]``; a class of value ``-inf`` never counts.
        truth: classes, int64 ``[Q]``.
    """
    place = places_of_truth(values, truth)
    return Score(int((place < 1).sum()), int((place < TOP).sum()), len(truth))


def places_of_truth(values: Tensor, truth: Tensor) -> Tensor:
    """How many classes come before the true one, int64 ``[Q]``; values ``[..., Q, C]``."""
    own = values.gather(-1, truth.expand(values.shape[:-1])[..., None])
    classes = torch.arange(values.shape[-1], device=values.device)
    before = (values > own) | ((values == own) & (classes < truth[:, None]))
    return before.sum(-1).masked_fill(own[..., 0] == -torch.inf, values.shape[-1])


def wilson(correct: int, count: int) -> tuple[float, float]:
    """95 % interval of a share, for independent draws.

    Source: E. B. Wilson, Probable inference, the law of succession, and statistical inference,
    JASA 22 (1927).
    """
    z = 1.959963984540054
    share, spread = correct / count, z * z / count
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / count + spread / count / 4) / (1 + spread)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def table(rows: Sequence[Row], num_classes: int) -> str:
    """Rows as text."""
    with_five = num_classes > TOP
    width = max(len(row.weights) for row in rows)
    wide = max(len(row.method) for row in rows)
    head = f"{'weights':{width}}  features  {'method':{wide}}  top-1 %  95 % interval   correct"
    lines = [head + ("     top-5 %" if with_five else "")]
    for row in rows:
        low, high = (100 * one for one in wilson(row.score.correct, row.score.total))
        text = (
            f"{row.weights:{width}}  {row.features:8}  {row.method:{wide}}  "
            f"{100 * row.score.correct / row.score.total:7.2f}  {low:6.2f} to {high:6.2f}  "
            f"{row.score.correct:>5}/{row.score.total}"
        )
        if with_five:
            text += f"  {100 * row.score.correct_top5 / row.score.total:7.2f}"
        lines.append(text)
    return "\n".join(lines)


def verdict(rows: Sequence[Row], subject: str) -> str:
    """Whether weights are clearly better than each baseline: intervals that do not overlap.

    Compared is one measure, fixed beforehand: the first row of the mean-patch features (of the
    pixels), against the same method of the baselines.
    """
    own = next(row for row in rows if row.weights == subject and row.features == "patches")
    others = {
        row.weights: row
        for row in reversed(rows)
        if row.weights != subject and row.features != "cls" and family(row) == family(own)
    }
    low, _ = wilson(own.score.correct, own.score.total)
    unbeaten = [
        name for name, row in others.items() if wilson(row.score.correct, row.score.total)[1] >= low
    ]
    measure = f"{family(own)}, mean of patches"
    if not others:
        return f"no baseline was asked for ({measure})"
    if unbeaten:
        return (
            f"SMOKE TEST: it ran, but {subject} is not clearly better than "
            f"{' and '.join(sorted(unbeaten))} ({measure}; intervals overlap)"
        )
    return f"{subject} is clearly better than {' and '.join(sorted(others))} ({measure})"


def family(row: Row) -> str:
    """A row's method without what was chosen for it."""
    return row.method.split(",")[0]


def as_json(row: Row, num_classes: int) -> dict[str, Any]:
    """A row for the result file; shares in [0, 1]."""
    found: dict[str, Any] = {
        "weights": row.weights,
        "features": row.features,
        "method": row.method,
        "accuracy": row.score.correct / row.score.total,
        "interval_95": wilson(row.score.correct, row.score.total),
        "correct": row.score.correct,
        "count": row.score.total,
    }
    if num_classes > TOP:
        found["accuracy_top5"] = row.score.correct_top5 / row.score.total
    if row.hits is not None:
        found["hits"] = pack_hits(row.hits)
    return found


def pack_hits(hits: Tensor) -> str:
    """Hits ``[n]`` as hexadecimal digits: a bit an image, the first one highest."""
    return np.packbits(hits.numpy()).tobytes().hex()


def unpack_hits(text: str, count: int) -> NDArray[np.bool_]:
    """What ``pack_hits`` wrote, bool ``[count]``."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8), count=count).astype(bool)
