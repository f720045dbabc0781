"""Plain, slow targets and losses: Python floats and loops, written from the method page."""

import math


def length(v: list[float]) -> float:
    return math.sqrt(sum(x * x for x in v))


def l2(v: list[float]) -> list[float]:
    return [x / max(length(v), 1e-6) for x in v]


def layer_norm(v: list[float]) -> list[float]:
    mean = sum(v) / len(v)
    var = sum((x - mean) ** 2 for x in v) / len(v)
    return [(x - mean) / math.sqrt(var + 1e-6) for x in v]


def unbiased(v: list[float]) -> list[float]:
    mean = sum(v) / len(v)
    var = sum((x - mean) ** 2 for x in v) / (len(v) - 1)
    return [(x - mean) / math.sqrt(var + 1e-6) for x in v]


def token_loss(p: list[float], t: list[float], kind: str, beta: float = 2.0) -> float:
    if kind == "cosine":
        return 2.0 - 2.0 * sum(a * b for a, b in zip(l2(p), l2(t), strict=True))
    total = 0.0
    for a, b in zip(p, t, strict=True):
        d = abs(a - b)
        if kind == "mse":
            total += d * d
        else:
            total += 0.5 * d * d / beta if d < beta else d - 0.5 * beta
    return total / len(p)


def summed_loss(
    predictions: list[list[list[float]]],
    targets: list[list[list[float]]],
    valid: list[bool],
    weights: list[float],
    kind: str,
) -> float:
    """Sum over valid rows of the weighted mean over tokens."""
    total = 0.0
    for p_row, t_row, ok in zip(predictions, targets, valid, strict=True):
        if ok:
            pairs = zip(p_row, t_row, weights, strict=True)
            total += sum(w * token_loss(p, t, kind) for p, t, w in pairs) / sum(weights)
    return total


def patchify(image: list[list[list[float]]], patch: int) -> list[list[float]]:
    """image [3][S][S] -> [N][P * P * 3] in (row, column, channel) order."""
    side = len(image[0])
    patches = []
    for top in range(0, side, patch):
        for left in range(0, side, patch):
            values = []
            for y in range(top, top + patch):
                for x in range(left, left + patch):
                    for channel in range(3):
                        values.append(image[channel][y][x])
            patches.append(values)
    return patches


def instance_norm(view: list[list[float]]) -> list[list[float]]:
    """view [N][F]: each channel standardised over the patches of the view."""
    channels = [layer_norm(list(channel)) for channel in zip(*view, strict=True)]
    return [list(token) for token in zip(*channels, strict=True)]


def discounted_statistics(
    steps: list[list[list[float]]], decay: float
) -> tuple[float, list[float], list[float]]:
    """Count, and mean and biased variance per channel, of tokens with weight decay ** age.

    steps [S][tokens of the step][F]; the age counts the later steps that have a token.
    """
    weighted: list[tuple[float, list[float]]] = []
    for number, tokens in enumerate(steps):
        age = sum(1 for later in steps[number + 1 :] if later)
        weighted += [(decay**age, token) for token in tokens]
    total = sum(weight for weight, _ in weighted)
    width = len(weighted[0][1])
    mean = [sum(w * token[c] for w, token in weighted) / total for c in range(width)]
    var = [
        sum(w * (token[c] - mean[c]) ** 2 for w, token in weighted) / total for c in range(width)
    ]
    return total, mean, var
