"""Student and momentum encoder: timm's VisionTransformer or Eva with added methods.

The state dicts are timm's, so an exported encoder loads with ``timm.create_model``.

Legend: B views in a micro-batch, R rows (masks_per_view masks of each view), N patches, K visible,
P prefix tokens (class token, registers), D width, H heads, p patch side in pixels.

Source: docs/method.md, sections "Attention maps", "Student" and "Momentum encoder".
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# timm and parts of torch are only partly typed.
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention, AttentionRope
from timm.layers.patch_embed import PatchEmbed
from timm.models.eva import EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cmtmae_scale.config.needs import needs
from cmtmae_scale.config.schema import Config
from cmtmae_scale.errors import ConfigError
from cmtmae_scale.method.attend import attend
from cmtmae_scale.method.attention import mean_query_row, patch_map
from cmtmae_scale.method.rotary import rotate_patches

ATTENTIONS = (Attention, EvaAttention, AttentionRope)
M = TypeVar("M", bound=nn.Module)


@cache
def join_classes(added: type, own: type) -> type:
    """Return a subclass of both, whose methods are those of ``added`` where it has them."""
    return type(added.__name__, (added, own), {})


def become(module: nn.Module, added: type[M]) -> M:
    """Add the methods of ``added`` to a module; in place, state and names stay."""
    module.__class__ = join_classes(added, type(module))
    return cast(M, module)


def run_block(block: nn.Module, *inputs: Tensor | None, recompute: bool) -> Tensor:
    """Call a block; with ``recompute`` only its inputs are kept for the backward."""
    if recompute and torch.is_grad_enabled():
        return cast(
            Tensor, checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
        )
    return block(*inputs)


class Student(nn.Module):
    """Methods added to timm's VisionTransformer or Eva: computation on visible patches only."""

    blocks: nn.Sequential
    norm: nn.Module
    norm_pre: nn.Module
    fc_norm: nn.Module
    head: nn.Module
    patch_embed: PatchEmbed
    pos_embed: nn.Parameter | None
    cls_token: nn.Parameter | None
    reg_token: nn.Parameter | None
    no_embed_class: bool
    embed_dim: int
    num_features: int
    num_prefix_tokens: int
    grad_checkpointing: bool
    set_grad_checkpointing: Callable[[bool], None]
    forward_head: Callable[[Tensor], Tensor]
    reset_classifier: Callable[[int, str], None]

    @property
    def num_prefix(self) -> int:
        """P: number of class token and registers."""
        return self.num_prefix_tokens

    @property
    def has_class_token(self) -> bool:
        return self.cls_token is not None

    @property
    def num_reg_tokens(self) -> int:
        """Number of registers."""
        return 0 if self.reg_token is None else self.reg_token.shape[1]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        rows, columns = cast(tuple[int, int], self.patch_embed.grid_size)
        return rows, columns

    @property
    def patch_side(self) -> int:
        """Side of a patch in pixels."""
        return cast(int, self.patch_embed.patch_size[0])

    def transformer_blocks(self) -> list[nn.Module]:
        return list(self.blocks)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] - masks, not attn_mask
        self, images: Tensor, ids_keep: Tensor | None = None
    ) -> Tensor:
        """Encode the visible patches.

        Args:
            images: normalised, ``[B, 3, S, S]``.
            ids_keep: visible patches, int64 ``[R, K]`` with R a multiple of B; row ``b * k + j``
                belongs to view b. ``None``: all patches in row-major order.

        Returns:
            Tokens after the final norm, ``[R, P + K, D]``: prefix, then patches in the order of
            ``ids_keep``.

        Raises:
            ValueError: if the shapes do not fit.
        """
        x = self.embed(images, ids_keep)
        for block, rotary in zip(self.blocks, self.rotary_tables(ids_keep), strict=True):
            x = run_block(block, x, *rotary, recompute=self.grad_checkpointing)
        return self.norm(x)

    def rotary_tables(self, ids_keep: Tensor | None = None) -> Sequence[tuple[Tensor, ...]]:
        """Return the rotary positions of each block, if it has any; arguments as in ``forward``."""
        if getattr(self, "rope", None) is None:
            return [()] * len(self.blocks)
        return [(table,) for table in cast(Any, self).rope(ids_keep)]

    def embed(self, images: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """Return the input of the first block, ``[R, P + K, D]``; arguments as in ``forward``."""
        patches = self.unfold_patches(images)  # [B, N, 3 p p]
        if ids_keep is not None:
            patches = gather_rows(patches, ids_keep)  # [R, K, 3 p p]
        projection = self.patch_embed.proj
        x = F.linear(patches, projection.weight.flatten(1), projection.bias)
        x = self.patch_embed.norm(x)

        tokens: list[Tensor] = [t for t in (self.cls_token, self.reg_token) if t is not None]
        prefix = torch.cat(tokens, dim=1) if tokens else None  # [1, P, D]
        if self.pos_embed is not None:
            positions = self.pos_embed[0].to(x.dtype)  # FSDP2 leaves them in float32
            num_coded = 0 if self.no_embed_class else self.num_prefix
            code = positions[num_coded:]
            x = x + (code if ids_keep is None else F.embedding(ids_keep, code))
            if prefix is not None and num_coded:
                prefix = prefix + positions[:num_coded]
        if prefix is not None:
            x = torch.cat([prefix.expand(x.shape[0], -1, -1).to(x.dtype), x], dim=1)
        return self.norm_pre(x)

    def unfold_patches(self, images: Tensor) -> Tensor:
        """Return patches ``[B, N, 3 p p]``, each in the order of a convolution's weight."""
        batch, channels, height, width = images.shape
        (rows, columns), side = self.grid, self.patch_side
        if (height, width) != (rows * side, columns * side):
            raise ValueError(
                f"images of {height} x {width} pixels do not fit {rows} x {columns} patches of "
                f"{side} pixels"
            )
        x = images.reshape(batch, channels, rows, side, columns, side)
        return x.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, -1)


def gather_rows(patches: Tensor, ids: Tensor) -> Tensor:
    """Gather ``ids`` ``[R, K]`` from ``patches`` ``[B, N, C]``; each view has R / B rows."""
    (views, _, width), (rows, count) = patches.shape, ids.shape
    if rows % views:
        raise ValueError(f"{rows} masks are not a multiple of {views} views")
    index = ids.reshape(views, -1, 1).expand(-1, -1, width)
    return patches.gather(1, index).reshape(rows, count, width)


class BlockAttention(nn.Module):
    """Methods added to timm's attention: no dropout, and ``attend`` where no mask is given."""

    num_heads: int
    scale: float
    num_prefix_tokens: int
    qkv: nn.Module | None
    q_norm: nn.Module
    k_norm: nn.Module
    norm: nn.Module
    proj: nn.Module
    proj_drop: nn.Module

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, **options: Any
    ) -> Tensor:
        """From ``[B, T, D]`` to ``[B, T, D]``; ``rope`` as in ``rotate_patches``."""
        if attn_mask is not None or any(options.values()):  # is_causal of a later timm
            rotary = {} if rope is None else {"rope": rope}
            return super().forward(x, attn_mask=attn_mask, **rotary, **options)  # pyright: ignore[reportAttributeAccessIssue]
        return self.combine(*self.project(x, rope))

    def project(self, x: Tensor, rope: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values ``[B, H, T, d]`` of ``[B, T, D]``."""
        own = cast(Any, self)
        batch, length, _ = x.shape
        if self.qkv is None:
            q, k, v = own.q_proj(x), own.k_proj(x), own.v_proj(x)
            depth = q.shape[-1] // self.num_heads
            q, k, v = (one.unflatten(-1, (-1, depth)).transpose(1, 2) for one in (q, k, v))
        else:
            qkv = self.qkv(x)
            if getattr(self, "q_bias", None) is not None:
                qkv = qkv + torch.cat([own.q_bias, torch.zeros_like(own.q_bias), own.v_bias])
            qkv = qkv.reshape(batch, length, 3, self.num_heads, -1)
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            half = getattr(self, "rotate_half", False)
            q, k = (rotate_patches(one, rope, self.num_prefix_tokens, half) for one in (q, k))
        if k.shape[1] < self.num_heads:  # several heads share a key and a value
            groups = self.num_heads // k.shape[1]
            k, v = (one.repeat_interleave(groups, dim=1) for one in (k, v))
        return q, k, v

    def combine(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return the output ``[B, T, D]`` of queries, keys and values ``[B, H, T, d]``."""
        x = self.norm(attend(query, key, value).transpose(1, 2).flatten(2))
        return self.proj_drop(self.proj(x))


def use_attend(module: nn.Module) -> None:
    """Let every attention of timm within a module compute by ``attend``; in place."""
    for one in module.modules():
        if type(one) in ATTENTIONS:
            become(one, BlockAttention)


class RowAttention(BlockAttention):
    """``BlockAttention`` that also returns the attention row over all tokens."""

    queries: slice
    """Tokens whose attention is averaged: the class token, else all patches."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] - whole images, no mask
        self, x: Tensor, rope: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Attend.

        Args:
            x: ``[B, P + N, D]``.
            rope: as in ``rotate_patches``.

        Returns:
            timm's output, and the row, float32 ``[B, P + N]``, mean over heads, no gradient.

        Source: docs/method.md, section "Attention maps".
        """
        q, k, v = self.project(x, rope)
        row = mean_query_row(q[:, :, self.queries], k, self.scale)
        return self.combine(q, k, v), row


class RowBlock(Block):
    """timm's block around ``RowAttention``, which also returns the attention row."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] - whole images, no mask
        self, x: Tensor
    ) -> tuple[Tensor, Tensor]:
        """From ``[B, P + N, D]`` to timm's output and the row ``[B, P + N]``."""
        attended, row = self.attn(self.norm1(x))
        x = x + self.drop_path1(self.ls1(attended))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x)))), row


class RowEvaBlock(EvaBlock):
    """``RowBlock`` of timm's Eva."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] - whole images, no mask
        self, x: Tensor, rope: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """From ``[B, P + N, D]`` to timm's output and the row ``[B, P + N]``."""
        attended, row = self.attn(self.norm1(x), rope)
        x = x + self.drop_path1(attended if self.gamma_1 is None else self.gamma_1 * attended)
        changed = self.mlp(self.norm2(x))
        return x + self.drop_path2(changed if self.gamma_2 is None else self.gamma_2 * changed), row


class RowEvaBlockPostNorm(EvaBlockPostNorm):
    """``RowBlock`` of an Eva whose branches are normed at their end."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] - whole images, no mask
        self, x: Tensor, rope: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """From ``[B, P + N, D]`` to timm's output and the row ``[B, P + N]``."""
        attended, row = self.attn(x, rope)
        x = x + self.drop_path1(self.norm1(attended))
        return x + self.drop_path2(self.norm2(self.mlp(x))), row


ROW_BLOCKS: dict[type, type] = {
    Block: RowBlock,
    EvaBlock: RowEvaBlock,
    EvaBlockPostNorm: RowEvaBlockPostNorm,
}
"""Blocks of timm, and those that also return the attention row."""


class MomentumEncoder(Student):
    """EMA copy of the student: features and attention map of whole images.

    ``build_student`` builds it and calls ``configure``; only what the config uses is computed.
    """

    attention_layers: tuple[int, ...]
    """Blocks whose attention maps are averaged; empty: no attention map."""
    feature_layers: tuple[int, ...]
    """Blocks whose outputs are averaged; empty: no features, or those of the final norm."""
    normed_features: bool
    """Features are taken after the final norm."""

    def configure(self, config: Config) -> None:
        """Choose the blocks that return attention maps and features.

        Raises:
            ConfigError: if a block is missing or is not timm's plain one.
        """
        need, target, depth = needs(config), config.target.student, len(self.blocks)
        self.attention_layers = self.feature_layers = ()
        self.normed_features = need.student_features and target.feature == "norm"
        if need.student_attention:
            layers = config.attention.layers
            self.attention_layers = resolve_student_layers(layers, depth, "attention.layers")
        if need.student_features and target.feature == "block":
            self.feature_layers = resolve_student_layers(
                target.layers, depth, "target.student.layers"
            )
        for i in self.attention_layers:
            block = self.blocks[i]
            if type(block) not in ROW_BLOCKS or not isinstance(block.attn, BlockAttention):
                raise ConfigError(
                    f"student.arch={config.student.arch}: no attention map can be taken from block "
                    f"{i} ({type(block).__name__}); use a plain timm VisionTransformer such as "
                    "vit_base_patch16_224"
                )
            block.__class__ = ROW_BLOCKS[type(block)]
            first = 0 if self.has_class_token else self.num_prefix
            queries = slice(first, 1 if self.has_class_token else None)
            become(block.attn, RowAttention).queries = queries

    @torch.no_grad()
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] - another kind of output
        self, images: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """Encode whole images, in eval mode.

        Args:
            images: normalised, ``[B, 3, S, S]``.

        Returns:
            Features ``[B, 1 + N, D]`` (``[B, N, D]`` without class token; registers are dropped)
            and the attention map ``[B, N]``, float32, rows sum to 1; ``None`` for an output that
            the config does not use.
        """
        depth = self.num_needed_blocks
        if not depth:
            return None, None
        maps: list[Tensor] = []
        outputs: list[Tensor] = []
        x, rotary = self.embed(images), self.rotary_tables()
        for i, block in enumerate(self.blocks[:depth]):
            if i in self.attention_layers:
                x, row = block(x, *rotary[i])
                maps.append(patch_map(row, self.num_prefix))
            else:
                x = block(x, *rotary[i])
            if i in self.feature_layers:
                outputs.append(x)
        if self.normed_features:
            outputs.append(self.norm(x))
        features = self.drop_registers(average_layers(outputs)) if outputs else None
        return features, average_layers(maps) if maps else None

    @property
    def num_needed_blocks(self) -> int:
        """Number of blocks up to the last one whose output is used."""
        if self.normed_features:
            return len(self.blocks)
        return max((*self.attention_layers, *self.feature_layers), default=-1) + 1

    def drop_registers(self, x: Tensor) -> Tensor:
        """Return class token, if any, and patches."""
        if not self.num_reg_tokens:
            return x
        patches = x[:, self.num_prefix :]
        return torch.cat([x[:, :1], patches], dim=1) if self.has_class_token else patches


def average_layers(tensors: list[Tensor]) -> Tensor:
    """Return the mean of equally shaped tensors, in float32 if there are several."""
    if len(tensors) == 1:
        return tensors[0]
    return torch.stack([tensor.float() for tensor in tensors]).mean(dim=0)


def resolve_student_layers(layers: list[int], depth: int, key: str) -> tuple[int, ...]:
    """Return block numbers counted from 0.

    Raises:
        ConfigError: if a block does not exist or is named twice.
    """
    if not all(-depth <= layer < depth for layer in layers):
        raise ConfigError(
            f"{key}={layers}: the student has blocks 0 to {depth - 1}, or -{depth} to -1"
        )
    counted = tuple(sorted(layer % depth for layer in layers))
    if len(set(counted)) != len(counted):
        raise ConfigError(f"{key}={layers} names a block twice; name each block once")
    return counted
