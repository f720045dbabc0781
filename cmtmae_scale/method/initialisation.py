"""Initialisation of every weight and fixed positional embeddings: MAE's, from one seed.

Source: docs/method.md, section "Initialisation"; MAE (arXiv 2111.06377).
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# timm and parts of torch are only partly typed.
import math
from collections.abc import Iterable, Iterator
from typing import cast

import torch
from timm.layers.layer_scale import LayerScale
from timm.models.eva import Eva, EvaAttention, EvaBlock
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from cmtmae_scale.method.rotary import MixedRotary

TOKENS = ("cls_token", "reg_token", "mask_token")
PIECE = 1 << 20
"""Values that are drawn at a time."""

Values = list[tuple[str, Iterable[Tensor]]]
"""Names of parameters and their values: successive flat pieces on the CPU. All are read once, in
order, and a piece may be overwritten by the next."""


def sincos_positions(width: int, grid: tuple[int, int], side: int | None = None) -> Tensor:
    """Return the fixed two-dimensional sine-cosine positional embedding.

    Args:
        width: channels, a multiple of 4.
        grid: rows and columns of patches.
        side: rows and columns of the grid that is stretched over ``grid``, so that patches keep
            their places in the image; ``None``: ``grid`` itself.

    Returns:
        float32 ``[N, width]``, row-major: the first half of the channels encodes the column x, the
        second half the row y, each as [sin, cos] with frequencies ``10000 ** (-i / (width / 4))``.

    Raises:
        ValueError: if the width is not a multiple of 4.

    Source: docs/method.md, section "Initialisation"; MAE.
    """
    if width % 4:
        raise ValueError(f"width={width} must be a multiple of 4")
    quarter = width // 4
    frequency = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    rows, columns = (
        (torch.arange(length, dtype=torch.float64) + 0.5) * ((side or length) / length) - 0.5
        for length in grid
    )
    y, x = (axis.flatten() for axis in torch.meshgrid(rows, columns, indexing="ij"))
    angles = [axis[:, None] * frequency for axis in (x, y)]
    return torch.cat([part for a in angles for part in (a.sin(), a.cos())], dim=1).float()


def fix_positions(model: VisionTransformer | Eva) -> None:
    """Write the sine-cosine embedding into ``pos_embed``, if there is one, and freeze it."""
    if model.pos_embed is not None:
        positions = model.pos_embed.requires_grad_(False)
        with torch.no_grad():
            positions.copy_(positional_embedding(model))


def positional_embedding(model: VisionTransformer | Eva) -> Tensor:
    """Return the sine-cosine embedding of a model, ``[1, P + N, D]``, zeros for the prefix."""
    shape = cast(nn.Parameter, model.pos_embed).shape
    rows, columns = model.patch_embed.grid_size
    code = sincos_positions(shape[-1], (rows, columns))
    return torch.cat([code.new_zeros(shape[1] - len(code), shape[-1]), code])[None]


def initialise(module: nn.Module, seed: int) -> None:
    """Write ``initial_values`` into a module that is not sharded; arguments and errors as there."""
    write_values(module, initial_values(module, seed))


@torch.no_grad()
def write_values(module: nn.Module, values: Values) -> None:
    """Write values into a module that is not sharded."""
    own = dict(module.named_parameters())
    for name, pieces in values:
        write_range(pieces, 0, own[name].view(-1))


def initial_values(module: nn.Module, seed: int) -> Values:
    """Return the initial values of every parameter of a student, decoder or both, as MAE's.

    Linear and patch embedding: Xavier uniform, zero bias; class, register and mask tokens: normal
    with standard deviation 0.02; norms: one and zero; layer scale: its configured value;
    positional embeddings: fixed; rotary frequencies: see ``MixedRotary``. Matrices and tokens are
    drawn while they are read, all from one stream of random numbers, so that every rank draws the
    whole model, 5 ns per weight, and keeps its ranges.

    Args:
        module: any combination of this project's models; only shapes are read, and only now, so
            that it may be on the meta device, and sharded afterwards.
        seed: the same seed gives the same weights in any sharding; the global random generator is
            neither read nor advanced.

    Raises:
        TypeError: if no rule initialises a parameter.

    Source: docs/method.md, section "Initialisation"; MAE's public code.
    """
    generator = torch.Generator().manual_seed(seed)
    values: Values = []
    for name, part in module.named_modules():
        own = dict(part.named_parameters(recurse=False))
        found: dict[str, Iterable[Tensor]] = {}
        if isinstance(part, nn.Linear | nn.Conv2d):
            rows, columns = part.weight.flatten(1).shape
            bound = math.sqrt(3.0) * math.sqrt(2.0 / (rows + columns))
            found["weight"] = draw_uniform(rows * columns, bound, generator)
            if part.bias is not None:
                found["bias"] = [torch.zeros(rows)]
        elif isinstance(part, LayerScale):
            found["gamma"] = [torch.full((part.gamma.numel(),), part.init_values)]
        elif isinstance(part, EvaBlock):
            for key, value in own.items():  # gamma_1, gamma_2
                found[key] = [torch.full((value.numel(),), cast(float, part.init_values))]
        elif isinstance(part, EvaAttention):
            for key, value in own.items():  # q_bias, v_bias
                found[key] = [torch.zeros(value.numel())]
        elif isinstance(part, MixedRotary):
            found["freqs"] = [part.draw(generator).flatten()]
        elif "norm" in type(part).__name__.lower():
            for key, value in own.items():
                found[key] = [torch.full((value.numel(),), float(key == "weight"))]
        else:
            for key in TOKENS:
                if key in own:
                    found[key] = draw_normal(own[key].numel(), 0.02, generator)
            if isinstance(part, VisionTransformer | Eva) and part.pos_embed is not None:
                found["pos_embed"] = [positional_embedding(part).flatten()]
        if own.keys() - found:
            unknown = ", ".join(key for key in own if key not in found)
            raise TypeError(f"no rule to initialise {unknown} of {name or 'the model'}")
        values += [(f"{name}.{key}" if name else key, pieces) for key, pieces in found.items()]
    return values


def draw_uniform(count: int, bound: float, generator: torch.Generator) -> Iterator[Tensor]:
    """Draw numbers from [-bound, bound), ``PIECE`` at a time in the same memory."""
    memory = torch.empty(min(count, PIECE))
    for begin in range(0, count, PIECE):
        yield memory[: count - begin].uniform_(-bound, bound, generator=generator)


def draw_normal(count: int, std: float, generator: torch.Generator) -> Iterator[Tensor]:
    """Draw normal numbers in one piece: torch's numbers depend on how many are drawn at a time."""
    yield torch.empty(count).normal_(std=std, generator=generator)


@torch.no_grad()
def write_range(pieces: Iterable[Tensor], offset: int, local: Tensor) -> None:
    """Write a range of a flat tensor that comes in pieces; other values are not read.

    Args:
        pieces: the whole tensor, as in ``Values``.
        offset: first value of the range.
        local: 1-D memory of the range, of any dtype, on any device.
    """
    begin, last = 0, offset + local.numel()
    for piece in pieces:
        end = begin + piece.numel()
        low, high = max(begin, offset), min(end, last)
        if low < high:
            local[low - offset : high - offset].copy_(piece[low - begin : high - begin])
        begin = end
