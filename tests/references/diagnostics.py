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


def cosine_gradient(x: np.ndarray, weight: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Gradient at one token x of 2 - 2 cos(W x, t)."""
    p = weight @ x
    p_norm, t_norm = np.linalg.norm(p), np.linalg.norm(target)
    cosine = p @ target / (p_norm * t_norm)
    return weight.T @ (-2.0 * (target / (p_norm * t_norm) - cosine * p / p_norm**2))


def square_gradient(x: np.ndarray, weight: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Gradient at one token x of mean((W x - t) ** 2)."""
    return weight.T @ (2.0 * (weight @ x - target) / len(target))
