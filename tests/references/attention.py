"""Plain, slow attention maps: Python floats and loops, written from the method page."""

import math


def softmax(scores: list[float]) -> list[float]:
    top = max(scores)
    powers = [math.exp(s - top) for s in scores]
    return [p / sum(powers) for p in powers]


def row(query: list[list[float]], key: list[list[list[float]]], scale: float) -> list[float]:
    """query [H][d], key [H][T][d] -> [T], mean over heads of the softmax rows."""
    heads = []
    for q, keys in zip(query, key, strict=True):
        heads.append(softmax([scale * sum(a * b for a, b in zip(q, k, strict=True)) for k in keys]))
    return [sum(column) / len(heads) for column in zip(*heads, strict=True)]


def clean(values: list[float]) -> list[float]:
    return [max(v, 0.0) if math.isfinite(v) else 0.0 for v in values]


def prob(values: list[float]) -> list[float]:
    values = clean(values)
    total = sum(values)
    if total <= 1e-12:
        return [1.0 / len(values)] * len(values)
    return [v / total for v in values]


def minmax(values: list[float]) -> list[float]:
    values = clean(values)
    low, width = min(values), max(max(values) - min(values), 1e-12)
    return [(v - low) / width for v in values]


def rank(values: list[float]) -> list[float]:
    values = clean(values)
    out = [0.0] * len(values)
    for place, i in enumerate(sorted(range(len(values)), key=lambda j: values[j])):
        out[i] = (place + 0.5) / len(values)
    return out


def zscore(values: list[float]) -> list[float]:
    values = clean(values)
    mean = sum(values) / len(values)
    std = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))
    return [(v - mean) / max(std, 1e-12) for v in values]


NORMS = {"prob": prob, "minmax": minmax, "rank": rank, "zscore": zscore}


def temper(values: list[float], temperature: float) -> list[float]:
    return prob([v ** (1.0 / temperature) for v in clean(values)])


def blend(teacher: list[float], student: list[float], alpha: float, norm: str) -> list[float]:
    t, s = NORMS[norm](teacher), NORMS[norm](student)
    return [alpha * a + (1.0 - alpha) * b for a, b in zip(t, s, strict=True)]
