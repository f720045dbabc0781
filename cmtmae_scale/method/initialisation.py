"""Initialisation of every weight and fixed positional embeddings: MAE's, from one seed.

Source: docs/method.md, section "Initialisation"; MAE (arXiv 2111.06377).
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# timm and parts of torch are only partly typed.
from typing import cast

import torch
from timm.layers.layer_scale import LayerScale
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

TOKENS = ("cls_token", "reg_token", "mask_token")


def sincos_positions(width: int, grid: tuple[int, int]) -> Tensor:
    """Return the fixed two-dimensional sine-cosine positional embedding.

    Args:
        width: channels, a multiple of 4.
        grid: rows and columns of patches.

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
    rows, columns = (torch.arange(side, dtype=torch.float64) for side in grid)
    y, x = (axis.flatten() for axis in torch.meshgrid(rows, columns, indexing="ij"))
    angles = [axis[:, None] * frequency for axis in (x, y)]
    return torch.cat([part for a in angles for part in (a.sin(), a.cos())], dim=1).float()


def fix_positions(model: VisionTransformer) -> None:
    """Write the sine-cosine embedding into ``pos_embed`` (zeros for the prefix) and freeze it."""
    positions = cast(nn.Parameter, model.pos_embed).requires_grad_(False)
    rows, columns = model.patch_embed.grid_size
    code = sincos_positions(positions.shape[-1], (rows, columns))
    with torch.no_grad():
        positions.zero_()
        positions[0, positions.shape[1] - code.shape[0] :] = code


@torch.no_grad()
def initialise(module: nn.Module, seed: int) -> None:
    """Initialise every weight of a student, decoder or both as MAE does.

    Linear and patch embedding: Xavier uniform, zero bias; class, register and mask tokens: normal
    with standard deviation 0.02; norms: one and zero; layer scale: its configured value;
    positional embeddings: fixed.

    Args:
        module: on the CPU, any combination of this project's models.
        seed: the same seed gives the same weights on every rank; the global random generator is
            neither read nor advanced.

    Raises:
        TypeError: if no rule initialises a parameter.

    Source: docs/method.md, section "Initialisation"; MAE's public code.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, part in module.named_modules():
        own = dict(part.named_parameters(recurse=False))
        if isinstance(part, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(part.weight.flatten(1), generator=generator)
            if part.bias is not None:
                part.bias.zero_()
        elif isinstance(part, LayerScale):
            part.gamma.fill_(part.init_values)
        elif "norm" in type(part).__name__.lower():
            for key, value in own.items():
                value.fill_(1.0 if key == "weight" else 0.0)
        else:
            for key in TOKENS:
                if key in own:
                    own.pop(key).normal_(std=0.02, generator=generator)
            if isinstance(part, VisionTransformer):
                fix_positions(part)
                own.pop("pos_embed", None)
            if own:
                raise TypeError(f"no rule to initialise {', '.join(own)} of {name or 'the model'}")
