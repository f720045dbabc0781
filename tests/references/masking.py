"""Plain, slow masking: Python integers, floats and loops, written from docs/method.md."""

import math

MODULUS = 1 << 64


def mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % MODULUS
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % MODULUS
    return z ^ (z >> 31)


def hash_uniform(seed: int, salt: int, identity: int, length: int) -> list[float]:
    start = identity * 0x9E3779B97F4A7C15 + seed * 0xD1B54A32D192ED03 + salt * 0x8CB92BA72F3D8DD7
    base = mix(start % MODULUS)
    values = []
    for j in range(length):
        z = mix((base + (j + 1) * 0x9E3779B97F4A7C15) % MODULUS)
        values.append(((z >> 41) + 0.5) * 2.0**-23)
    return values


def order_by(key: list[float]) -> list[int]:
    """Indices from the largest key to the smallest; ties by index."""
    return sorted(range(len(key)), key=lambda i: -key[i])


def salient_order(attention: list[float]) -> list[int]:
    """From the most salient; among equals the higher index first (ascending order reversed)."""
    return sorted(range(len(attention)), key=lambda i: attention[i])[::-1]


def select(
    attention: list[float],
    noise: list[float],
    sampler: str,
    num_keep: int,
    num_thrown: int = 0,
    salient_frac: float = 0.0,
    temperature: float = 1.0,
    floor: float = 1e-6,
) -> tuple[list[int], list[int], list[int]]:
    """Visible, hidden and thrown indices of one image with a clean map."""
    n = len(noise)
    num_hidden = n - num_keep - num_thrown
    if sampler == "random":
        key = list(noise)
    elif sampler == "hide_salient":
        key = [-a for a in attention]
    elif sampler == "reveal_salient_topk":
        key = list(attention)
    elif sampler == "hide_salient_mix":
        surely = salient_order(attention)[: round(salient_frac * num_hidden)]
        key = list(noise)
        for rank, i in enumerate(surely):
            key[i] = -(2.0 + len(surely) - rank)
    else:
        total = sum(attention)
        drawn = []
        for a, u in zip(attention, noise, strict=True):
            weight = (1.0 - floor * n) * a / total + floor
            drawn.append(math.log(weight) / temperature - math.log(-math.log(u)))
        key = drawn if sampler == "reveal_salient" else [-d for d in drawn]
    order = order_by(key)
    cut = num_keep + num_thrown
    return order[:num_keep], order[cut:], order[num_keep:cut]


def predicted(
    hidden: list[int], seed: int, position: int, number: int, count: int, sampler: str
) -> list[int]:
    """Masked patches of mask ``number`` that are predicted; ``hidden`` is in the order of keys."""
    if sampler == "random":
        return hidden[:count]
    noise = hash_uniform(seed, 3 * number + 2, position, 1 + max(hidden))
    return sorted(hidden, key=lambda i: -noise[i])[:count]


def inclusion(weights: list[float], draws: int) -> list[float]:
    """Exact inclusion probabilities of successive drawing without replacement."""
    total = [0.0] * len(weights)

    def visit(taken: list[int], probability: float) -> None:
        if len(taken) == draws:
            for i in taken:
                total[i] += probability
            return
        rest = [i for i in range(len(weights)) if i not in taken]
        mass = sum(weights[i] for i in rest)
        for i in rest:
            visit([*taken, i], probability * weights[i] / mass)

    visit([], 1.0)
    return total
