"""Plain, slow measures of dense features in float64, written from the papers' definitions."""

import math

import numpy as np

VOID = 255


def entropy_rank(values: list[float]) -> float:
    shares = [v / sum(values) for v in values]
    return math.exp(-sum(p * math.log(p) for p in shares if p > 0.0))


def rankme(rows: np.ndarray) -> float:
    """exp of the entropy of the singular values, from the decomposition itself."""
    return entropy_rank(np.linalg.svd(rows.astype(np.float64), compute_uv=False).tolist())


def lidar(views: np.ndarray, delta: float = 1e-4) -> float:
    """Of features ``[n, q, D]``, one sum after the other; W^-1/2 by scaling of eigenvectors."""
    n, q, width = views.shape
    means = [sum(views[i]) / q for i in range(n)]
    middle = sum(means) / n
    between, within = np.zeros((width, width)), np.zeros((width, width))
    for i in range(n):
        between += np.outer(means[i] - middle, means[i] - middle) / n
        for j in range(q):
            within += np.outer(views[i, j] - means[i], views[i, j] - means[i]) / (n * q)
    values, axes = np.linalg.eigh(within + delta * np.eye(width))
    root = axes @ np.diag(values**-0.5) @ axes.T
    found = np.linalg.eigvalsh(root @ between @ root)
    return entropy_rank([max(v, 0.0) for v in found])


def similarity(tokens: np.ndarray, t: float = 2.0) -> tuple[float, float]:
    """Mean cosine, and log of the mean Gaussian potential, pair after pair."""
    unit = [x / math.sqrt(sum(v * v for v in x)) for x in tokens.astype(np.float64)]
    cosines, potentials = [], []
    for i, a in enumerate(unit):
        for b in unit[:i]:
            cosines.append(sum(x * y for x, y in zip(a, b, strict=True)))
            potentials.append(math.exp(-t * sum((x - y) ** 2 for x, y in zip(a, b, strict=True))))
    return sum(cosines) / len(cosines), math.log(sum(potentials) / len(potentials))


def mean_iou(predicted: np.ndarray, truth: np.ndarray) -> float:
    """Pixel after pixel, over the classes that occur in either, without void."""
    hits: dict[int, int] = {}
    union: dict[int, int] = {}
    for p, t in zip(predicted.ravel().tolist(), truth.ravel().tolist(), strict=True):
        if t == VOID:
            continue
        for value in {p, t}:
            union[value] = union.get(value, 0) + 1
            hits[value] = hits.get(value, 0) + (p == t)
    return sum(hits[v] / union[v] for v in union) / len(union)


def knn_pixels(
    train: np.ndarray, pixels: np.ndarray, queries: np.ndarray, k: int
) -> list[list[int]]:
    """The most frequent class of each pixel among the k nearest patches by cosine."""
    mean, std = train.mean(0), np.sqrt(train.var(0) + 1e-6)
    train, queries = (train - mean) / std, (queries - mean) / std
    found = []
    for query in queries:
        cosines = [
            float(query @ row) / math.sqrt(float(query @ query) * float(row @ row)) for row in train
        ]
        nearest = sorted(range(len(train)), key=lambda i: -cosines[i])[:k]
        votes = []
        for place in range(pixels.shape[1]):
            labels = [int(pixels[i, place]) for i in nearest if pixels[i, place] != VOID]
            votes.append(max(sorted(set(labels)), key=labels.count, default=0))
        found.append(votes)
    return found


def agreement(attention: np.ndarray, mask: np.ndarray, patch: int) -> tuple[float, float, float]:
    """AUC, IoU at equal area and mass inside of one map ``[h, w]`` and a mask in pixels."""
    pairs = []
    for row in range(attention.shape[0]):
        for column in range(attention.shape[1]):
            part = mask[row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
            known = [v for v in part.ravel().tolist() if v != VOID]
            if 2 * len(known) >= patch * patch:
                share = sum(v != 0 for v in known) / len(known)
                pairs.append((float(attention[row, column]), share))
    front = [a for a, f in pairs if f >= 0.5]
    back = [a for a, f in pairs if f < 0.5]
    auc = sum((a > b) + 0.5 * (a == b) for a in front for b in back) / (len(front) * len(back))
    order = sorted(range(len(pairs)), key=lambda i: -pairs[i][0])[: len(front)]
    truth = {i for i, (_, f) in enumerate(pairs) if f >= 0.5}
    iou = len(truth & set(order)) / len(truth | set(order))
    return auc, iou, sum(a * f for a, f in pairs) / sum(a for a, _ in pairs)


def propagate(
    features: np.ndarray,
    sources: list[tuple[np.ndarray, np.ndarray]],
    grid: tuple[int, int],
    window: tuple[int, int],
    k: int = 5,
    temperature: float = 0.1,
) -> np.ndarray:
    """Labels of each patch from its nearest patches of all sources within a window."""
    found = []
    for here, query in enumerate(features):
        near = []
        for theirs, labels in sources:
            for there, row in enumerate(theirs):
                down = abs(here // grid[1] - there // grid[1])
                right = abs(here % grid[1] - there % grid[1])
                if down <= window[0] and right <= window[1]:
                    near.append((float(query @ row), labels[there]))
        near = sorted(near, key=lambda one: -one[0])[:k]
        weights = [math.exp(cosine / temperature) for cosine, _ in near]
        found.append(
            sum(w * labels for w, (_, labels) in zip(weights, near, strict=True)) / sum(weights)
        )
    return np.array(found)


def contour_f(predicted: np.ndarray, truth: np.ndarray, tolerance: float = 0.008) -> float:
    """Contour F measure: the distance of every contour pixel to every other."""

    def contour(region: np.ndarray) -> list[tuple[int, int]]:
        height, width = region.shape
        found = []
        for y in range(height):
            for x in range(width):
                below, right = min(y + 1, height - 1), min(x + 1, width - 1)
                others = (region[y, right], region[below, x], region[below, right])
                if any(one != region[y, x] for one in others):
                    found.append((y, x))
        return found

    a, b = contour(predicted), contour(truth)
    if not a or not b:
        return float(not a and not b)
    reach = math.ceil(tolerance * math.hypot(*truth.shape))

    def matched(some: list[tuple[int, int]], others: list[tuple[int, int]]) -> float:
        near = [any(math.dist(p, o) <= reach for o in others) for p in some]
        return sum(near) / len(some)

    precision, recall = matched(a, b), matched(b, a)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0
