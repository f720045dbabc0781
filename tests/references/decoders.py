"""Plain, slow decoders: loops over images, heads and queries, written from docs/method.md.

Source: docs/method.md, section "Decoders".

Each follows the order of its paper's public code: the whole image is laid out row by row, and
tokens stay at their places. ``weights`` are named as in a state dict; autograd gives gradients.
"""

import math

import torch
from torch import Tensor

Weights = dict[str, Tensor]


def sincos(width: int, row: int, column: int) -> list[float]:
    """First half of the channels: the column; second half: the row; each [sin, cos]."""
    quarter = width // 4
    frequencies = [10000.0 ** (-i / quarter) for i in range(quarter)]
    values = []
    for place in (column, row):
        values += [math.sin(place * f) for f in frequencies]
        values += [math.cos(place * f) for f in frequencies]
    return values


def sincos_table(width: int, grid: tuple[int, int]) -> Tensor:
    rows = [sincos(width, r, c) for r in range(grid[0]) for c in range(grid[1])]
    return torch.tensor(rows, dtype=torch.float64)


def linear(x: Tensor, weights: Weights, name: str) -> Tensor:
    return (weights[f"{name}.weight"] * x[..., None, :]).sum(-1) + weights[f"{name}.bias"]


def layer_norm(x: Tensor, weights: Weights, name: str) -> Tensor:
    mean = x.sum(-1, keepdim=True) / x.shape[-1]
    var = ((x - mean) ** 2).sum(-1, keepdim=True) / x.shape[-1]
    return (x - mean) / (var + 1e-6) ** 0.5 * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def mlp(x: Tensor, weights: Weights, name: str) -> Tensor:
    x = linear(x, weights, f"{name}.fc1")
    return linear(x * 0.5 * (1 + torch.erf(x / math.sqrt(2))), weights, f"{name}.fc2")


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """[M, E] over [T, E]; head by head and query by query."""
    size = query.shape[-1] // heads
    outputs = []
    for q in query:
        parts = []
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            scores = [torch.dot(q[part], k[part]) / math.sqrt(size) for k in key]
            top = max(float(s.detach()) for s in scores)
            powers = [(s - top).exp() for s in scores]
            shares = [p / sum(powers) for p in powers]
            parts.append(sum(s * v[part] for s, v in zip(shares, value, strict=True)))
        outputs.append(torch.cat(parts))
    return torch.stack(outputs)


def milan(
    weights: Weights,
    tokens: Tensor,
    ids_keep: list[int],
    grid: tuple[int, int],
    heads: int,
    depth: int,
    norm_context: bool = False,
) -> Tensor:
    """One image: encoder tokens [1 + K, D], class token first -> [1 + N, E] in image order."""
    embedded = linear(tokens, weights, "embed")
    width, length = embedded.shape[1], grid[0] * grid[1]
    image = [weights["mask_token"][0, 0]] * length
    for place, token in zip(ids_keep, embedded[1:], strict=True):
        image[place] = token
    table = sincos_table(width, grid)
    image = [token + code for token, code in zip(image, table, strict=True)]
    hidden_ids = [i for i in range(length) if i not in ids_keep]
    context = torch.stack([embedded[0]] + [image[i] for i in ids_keep])
    hidden = torch.stack([image[i] for i in hidden_ids])
    for number in range(depth):
        name = f"blocks.{number}"
        own = {}
        for kind in ("weight", "bias"):
            joined = weights[f"{name}.attn.qkv.{kind}"]
            for j, letter in enumerate("qkv"):
                own[f"{letter}.{kind}"] = joined[j * width : (j + 1) * width]
        y = layer_norm(hidden, weights, f"{name}.norm1")
        seen = layer_norm(context, weights, f"{name}.norm1") if norm_context else context
        everything = torch.cat([seen, y])
        attended = attend(
            linear(y, own, "q"), linear(everything, own, "k"), linear(everything, own, "v"), heads
        )
        hidden = hidden + linear(attended, weights, f"{name}.attn.proj")
        hidden = hidden + mlp(layer_norm(hidden, weights, f"{name}.norm2"), weights, f"{name}.mlp")
    for place, token in zip(hidden_ids, hidden, strict=True):
        image[place] = token
    return layer_norm(torch.stack([embedded[0], *image]), weights, "norm")


def crossmae(
    weights: Weights,
    tokens: Tensor,
    ids_hidden: list[int],
    grid: tuple[int, int],
    heads: int,
    depth: int,
) -> Tensor:
    """One image: encoder tokens [1 + K, D] -> [M, E], each hidden token computed alone."""
    width = weights["mask_token"].shape[-1]
    table = sincos_table(width, grid)
    outputs = []
    for place in ids_hidden:
        x = (weights["mask_token"][0, 0] + table[place])[None]
        for number in range(depth):
            name = f"blocks.{number}"
            query = linear(layer_norm(x, weights, f"{name}.norm1"), weights, f"{name}.attn.q")
            both = linear(tokens, weights, f"{name}.attn.kv")
            attended = attend(query, both[:, :width], both[:, width:], heads)
            x = x + linear(attended, weights, f"{name}.attn.proj")
            x = x + mlp(layer_norm(x, weights, f"{name}.norm2"), weights, f"{name}.mlp")
        outputs.append(layer_norm(x, weights, "norm")[0])
    return torch.stack(outputs)
