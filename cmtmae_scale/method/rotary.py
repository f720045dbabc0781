"""Rotary positions of timm's ``Eva``: tables of the visible patches, and rotated queries and keys.

Angles, sines, cosines and rotations are float32 whatever the model's dtype; rotated tensors keep
their dtype.

Legend: R rows (masks), N patches, K visible, P prefix tokens, T tokens = P + K, L blocks, H heads,
d head width.

Source: docs/method.md, section "Student"; RoFormer (arXiv 2104.09864), RoPE-ViT (2403.13298).
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# timm and parts of torch are only partly typed.
import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from timm.layers.pos_embed_sincos import RotaryEmbeddingMixed, apply_rot_embed_cat, get_mixed_grid
from timm.models.eva import Eva
from torch import Tensor, nn

FIXED_TABLES = ("RotaryEmbeddingCat", "RotaryEmbeddingDinoV3", "RotaryEmbeddingMRope")
"""timm's classes with one table for all blocks; the last is of later versions."""


class Constant(nn.Module):
    """A fixed float32 tensor on the module's device: no cast of the model changes its values.

    Args:
        values: on the CPU.
    """

    values: Tensor

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.source = values
        own = torch.zeros(values.shape)  # on the default device, which may be the meta device
        self.register_buffer("values", own.copy_(values), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.values = self.source.to(self.values.device)
        return self


class FixedRotary(nn.Module):
    """One table for all blocks and heads: EVA-02's, PE's, DINOv3's.

    Args:
        table: sines, then cosines, of each patch, ``[N, 2 d]``, on the CPU.
        depth: L.
    """

    def __init__(self, table: Tensor, depth: int) -> None:
        super().__init__()
        self.table = Constant(table)
        self.depth = depth

    def forward(self, ids: Tensor | None = None) -> list[Tensor]:
        """Return a table for each block: ``[N, 2 d]``, or ``[R, 1, K, 2 d]`` for ``ids [R, K]``."""
        table = self.table.values
        return [table if ids is None else F.embedding(ids, table)[:, None]] * self.depth

    def get_embed(self, shape: Sequence[int] | None = None) -> Tensor:
        """Return the table, ``[N, 2 d]``, for timm's own forward."""
        return self.table.values


class MixedRotary(nn.Module):
    """Trained frequencies of every block and head, of both axes: RoPE-ViT's.

    Args:
        freqs: timm's parameter, ``[2, L, H, d / 2]``.
        grid: both coordinates of each patch, ``[2, N]``, on the CPU.
        temperature: of the initial frequencies.
    """

    def __init__(self, freqs: nn.Parameter, grid: Tensor, temperature: float) -> None:
        super().__init__()
        self.freqs = freqs
        self.grid = Constant(grid)
        self.temperature = temperature

    def forward(self, ids: Tensor | None = None) -> list[Tensor]:
        """Return a table for each block: ``[H, N, 2 d]``, or ``[R, H, K, 2 d]``."""
        tables = self.get_embed().unbind()
        if ids is None:
            return list(tables)
        return [table[:, ids].transpose(0, 1) for table in tables]

    def get_embed(self, shape: Sequence[int] | None = None) -> Tensor:
        """Return all tables, ``[L, H, N, 2 d]``, also for timm's own forward."""
        first, second = self.grid.values[:, :, None]  # [N, 1]
        x, y = self.freqs.float()[:, :, :, None]  # [L, H, 1, d / 2]
        angles = first * x + second * y  # [L, H, N, d / 2]
        return torch.cat([angles.sin(), angles.cos()], dim=-1).repeat_interleave(2, -1)

    def draw(self, generator: torch.Generator) -> Tensor:
        """Draw initial frequencies: a random rotation of both axes per block and head.

        Source: RoPE-ViT's public code, ``init_random_2d_freqs``.
        """
        _, depth, heads, half = self.freqs.shape
        size = self.temperature ** (-torch.arange(0, 2 * half, 4, device="cpu") / (2 * half))
        first = torch.empty(depth, heads, 1, 1, device="cpu")
        first.uniform_(0, 2 * math.pi, generator=generator)
        angles = first + torch.tensor([[0.0], [math.pi / 2]], device="cpu")  # [L, H, 2, 1]
        return (torch.stack([angles.cos(), angles.sin()]) * size).flatten(-2)


def supports_rotary(model: Eva) -> bool:
    """Return whether ``use_rotary`` replaces a model's rotary positions, if it has any."""
    kinds = (*FIXED_TABLES, "RotaryEmbeddingMixed")
    return model.rope is None or type(model.rope).__name__ in kinds


def use_rotary(model: Eva) -> None:
    """Replace a model's rotary positions by ``FixedRotary`` or ``MixedRotary``; in place.

    Their parameters keep timm's names. No random augmentation of coordinates is applied.
    """
    rope: Any = model.rope
    grid = list(cast(tuple[int, int], model.patch_embed.grid_size))
    if isinstance(rope, RotaryEmbeddingMixed):
        axes = get_mixed_grid(grid, grid_indexing=rope.grid_indexing, device=torch.device("cpu"))
        replaced = MixedRotary(rope.freqs, torch.stack(axes), float(rope.temperature))
    elif rope is not None:
        with torch.device("cpu"):
            filled: Any = copy.deepcopy(rope).to_empty(device="cpu").eval()
            filled.init_non_persistent_buffers()
            table = filled.get_embed(shape=grid).float()
        replaced = FixedRotary(table, len(model.blocks))
    else:
        return
    cast(Any, model).rope = replaced


def rotate_patches(x: Tensor, rotary: Tensor, num_prefix: int, half: bool) -> Tensor:
    """Rotate the patches among queries or keys.

    Args:
        x: ``[R, H, T, d]``.
        rotary: sines, then cosines: ``[R, 1, K, 2 d]`` or ``[R, H, K, 2 d]``, without R or R and H
            where all rows or heads have the same.
        num_prefix: P.
        half: pair channel i with i + d / 2, not with its neighbour.

    Returns:
        ``[R, H, T, d]`` in the dtype of ``x``.
    """
    rotated = apply_rot_embed_cat(x[:, :, num_prefix:], rotary, half=half)
    return torch.cat([x[:, :, :num_prefix], rotated.to(x.dtype)], dim=2)
