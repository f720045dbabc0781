"""Plain, slow diagnostics in float64, written from docs/method.md."""

import math

import numpy as np


def effective_rank(tokens: list[list[float]]) -> float:
    """From the eigenvalues of the Gram matrix; the singular values are their roots."""
    x = np.array(tokens, dtype=np.float64)
    values = [math.sqrt(max(v, 0.0)) for v in np.linalg.eigvalsh(x @ x.T)]
    shares = [v / sum(values) for v in values]
    return math.exp(-sum(p * math.log(p) for p in shares if p > 0.0))


def pairwise_cosine(tokens: list[list[float]]) -> float:
    """Every pair of distinct tokens, one after the other."""

    def dot(a: list[float], b: list[float]) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True))

    total, pairs = 0.0, 0
    for i, a in enumerate(tokens):
        for b in tokens[:i]:
            total += dot(a, b) / math.sqrt(dot(a, a) * dot(b, b))
            pairs += 1
    return total / pairs
