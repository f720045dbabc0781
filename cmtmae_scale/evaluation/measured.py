"""Measured values with bootstrap intervals: the rows of a dense or label-free evaluation."""

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
RESAMPLES = 1000
BOOTSTRAP_SEED = 0
DRAWS = 1 << 24
"""Numbers of draws that are in memory at once, 128 MiB; of many images a block of resamples."""


class Measured(NamedTuple):
    """One line of the result."""

    weights: str
    features: str
    method: str
    measure: str
    value: float
    interval: tuple[float, float] | None
    """95 %, from a bootstrap over images or objects; ``None``: one value of all images."""
    total: int
    """Images or objects."""
    parts: dict[str, float] | None = None
    """Values by class, clip or object."""


def bootstrap_interval(
    statistic: Callable[[Array], Array], count: int
) -> tuple[float, float] | None:
    """Return the 95 % percentile interval over 1,000 resamples of images, drawn with a fixed seed.

    Args:
        statistic: from the number of times that each image is drawn, ``[R, n]``, to values ``[R]``
            for any R; NaN where a resample has no value.
        count: n; below 2 there is no interval.

    Source: B. Efron, Bootstrap methods: another look at the jackknife, Annals of Statistics 7
    (1979).
    """
    if count < 2:
        return None
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    even, block = np.full(count, 1 / count), max(DRAWS // count, 1)
    sizes = [min(block, RESAMPLES - start) for start in range(0, RESAMPLES, block)]
    draws = (rng.multinomial(count, even, size=size) for size in sizes)
    values = np.concatenate([statistic(one.astype(np.float64)) for one in draws])
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def mean_with_interval(values: Array) -> tuple[float, tuple[float, float] | None]:
    """Return the mean over images ``[n]`` and its interval."""
    interval = bootstrap_interval(lambda draws: draws @ values / draws.sum(1), len(values))
    return float(values.mean()), interval


def format_measured(rows: Sequence[Measured]) -> str:
    """Format rows as a text table."""
    head = ("weights", "features", "method", "measure")
    cells = [tuple(map(str, row[:4])) for row in rows]
    wide = [max(len(line[i]) for line in [head, *cells]) for i in range(4)]
    lines = ["  ".join(text.ljust(w) for text, w in zip(head, wide, strict=True))]
    lines[0] += "     value  95 % interval     count"
    for row, texts in zip(rows, cells, strict=True):
        line = "  ".join(text.ljust(w) for text, w in zip(texts, wide, strict=True))
        interval = "-" if row.interval is None else "{:.4g} to {:.4g}".format(*row.interval)
        lines.append(f"{line}  {row.value:8.4g}  {interval:16}  {row.total:5d}")
    return "\n".join(lines)


def judge_measured(rows: Sequence[Measured], subject: str) -> str:
    """State whether the subject is clearly better than each baseline: disjoint intervals.

    The compared measure is that of the subject's first row, whatever settings each row chose; more
    is better.
    """
    own = next(row for row in rows if row.weights == subject)
    compared = method_family(own.method), own.measure
    measure = ", ".join(compared)
    others = {
        row.weights: row
        for row in reversed(rows)
        if row.weights != subject and (method_family(row.method), row.measure) == compared
    }
    if own.interval is None and others:
        return f"no interval, so no comparison ({measure})"
    unbeaten = [
        name
        for name, row in others.items()
        if row.interval is None or own.interval is None or row.interval[1] >= own.interval[0]
    ]
    return state_verdict(subject, others, unbeaten, measure)


def method_family(method: str) -> str:
    """Return a row's method without its chosen settings."""
    return method.split(",")[0]


def state_verdict(
    subject: str, baselines: Collection[str], unbeaten: Collection[str], measure: str
) -> str:
    """State which baselines the subject is clearly better than."""
    if not baselines:
        return f"no baseline was requested ({measure})"
    if unbeaten:
        names = " and ".join(sorted(unbeaten))
        return f"{subject} is NOT clearly better than {names} ({measure}; intervals overlap)"
    return f"{subject} is clearly better than {' and '.join(sorted(baselines))} ({measure})"


def measured_record(row: Measured) -> dict[str, Any]:
    """Return a row for the result file."""
    record: dict[str, Any] = {
        "weights": row.weights,
        "features": row.features,
        "method": row.method,
        "measure": row.measure,
        "value": row.value,
        "interval_95": row.interval,
        "count": row.total,
    }
    return record if row.parts is None else record | {"parts": row.parts}
