"""Decoders that predict targets from the encoder's tokens, and the linear heads.

All decoders return ``[R, Q, E]`` in the order of a ``TokenLayout``: [class token][visible][masked].

Legend: R rows (masks), K visible, M masked, P prefix tokens, Q predicted tokens, D student width,
E decoder width, F teacher width, p patch side in pixels.

Source: docs/method.md, section "Decoders"; MAE (arXiv 2111.06377), MILAN (2208.06049), CrossMAE
(2401.14391).
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# timm and parts of torch are only partly typed.
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.mlp import Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from cmtmae_scale.config.schema import Decoder as DecoderSettings
from cmtmae_scale.method.attend import attend
from cmtmae_scale.method.initialisation import sincos_positions
from cmtmae_scale.method.masking import PatchChoice
from cmtmae_scale.method.student import run_block, use_attend
from cmtmae_scale.method.targets import Predictions, TokenLayout

EPS = 1e-6
MLP_RATIO = 4


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Reshape ``[R, T, E]`` to ``[R, H, T, E / H]``."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attend_heads(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Multi-head attention of ``[R, M, E]`` over ``[R, T, E]``; returns ``[R, M, E]``."""
    q, k, v = (split_heads(x, heads) for x in (query, key, value))
    return attend(q, k, v).transpose(1, 2).flatten(2)


class PromptAttention(nn.Module):
    """MILAN's attention: mask tokens attend to the context and to each other.

    Args:
        width: E.
        heads: attention heads.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """From mask tokens ``[R, M, E]`` and context ``[R, P + K, E]`` to ``[R, M, E]``."""
        width = x.shape[-1]
        # One matrix as in MAE's blocks, but the context needs no queries.
        (w_q, w_kv), (b_q, b_kv) = (p.split((width, 2 * width)) for p in self.qkv.parameters())
        key, value = F.linear(torch.cat([context, x], dim=1), w_kv, b_kv).chunk(2, dim=-1)
        return self.proj(attend_heads(F.linear(x, w_q, b_q), key, value, self.heads))


class CrossAttention(nn.Module):
    """CrossMAE's attention: mask tokens attend to the context only.

    Args:
        width: E.
        context_width: D.
        heads: attention heads.
    """

    def __init__(self, width: int, context_width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(context_width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """From mask tokens ``[R, M, E]`` and context ``[R, P + K, D]`` to ``[R, M, E]``."""
        key, value = self.kv(context).chunk(2, dim=-1)
        return self.proj(attend_heads(self.q(x), key, value, self.heads))


class QueryBlock(nn.Module):
    """A pre-norm block that updates mask tokens and leaves the context unchanged.

    Args:
        attn: ``PromptAttention`` or ``CrossAttention``.
        width: E.
        norm_context: apply the first norm to the context too.
    """

    def __init__(
        self, attn: PromptAttention | CrossAttention, width: int, norm_context: bool = False
    ) -> None:
        super().__init__()
        self.norm_context = norm_context
        self.norm1 = nn.LayerNorm(width, eps=EPS)
        self.attn = attn
        self.norm2 = nn.LayerNorm(width, eps=EPS)
        self.mlp = Mlp(width, MLP_RATIO * width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Update mask tokens ``[R, M, E]`` from the context."""
        x = x + self.attn(self.norm1(x), self.norm1(context) if self.norm_context else context)
        return x + self.mlp(self.norm2(x))


class Decoder(nn.Module):
    """Common part of all decoders: positional embeddings, mask token, blocks, final norm.

    Args:
        blocks: transformer blocks, in order.
        width: E.
        student_width: D.
        grid: rows and columns of patches.
        num_prefix: P.
        layout: tokens to return; Q of them.
        embed: whether a linear layer maps the encoder's tokens to the decoder's width.
        position_grid: see the config's key.
    """

    positions: Tensor

    def __init__(
        self,
        blocks: Iterable[nn.Module],
        width: int,
        student_width: int,
        grid: tuple[int, int],
        num_prefix: int,
        layout: TokenLayout,
        embed: bool = True,
        position_grid: int | None = None,
    ) -> None:
        super().__init__()
        self.num_prefix = num_prefix
        self.layout = layout
        self.grid = grid
        self.position_grid = position_grid
        self.grad_checkpointing = False
        self.embed = nn.Linear(student_width, width) if embed else None
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.width = width
        self.register_buffer("positions", self.compute_positions(), persistent=False)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width, eps=EPS)

    def compute_positions(self) -> Tensor:
        """Return the positional embedding of the patches, ``[N, E]``."""
        return sincos_positions(self.width, self.grid, self.position_grid)

    def transformer_blocks(self) -> list[nn.Module]:
        return list(self.blocks)

    def embed_context(self, tokens: Tensor, choice: PatchChoice) -> Tensor:
        """Map encoder tokens ``[R, P + K, D]`` to ``[R, P + K, E]`` and add positions."""
        if self.embed is None:
            raise RuntimeError("this decoder was built without embedding; please report this")
        x = self.embed(tokens)
        prefix, visible = x[:, : self.num_prefix], x[:, self.num_prefix :]
        return torch.cat([prefix, visible + self.gather_positions(choice.ids_keep, x.dtype)], dim=1)

    def mask_tokens(self, choice: PatchChoice, dtype: torch.dtype) -> Tensor:
        """Return mask tokens with the positions of the predicted masked patches, ``[R, M, E]``."""
        ids = choice.ids_hidden[:, : self.layout.num_hidden]
        return self.mask_token.to(dtype) + self.gather_positions(ids, dtype)

    def gather_positions(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the positional embeddings of patches, ``[R, ids, E]``."""
        return F.embedding(ids, self.positions).to(dtype)

    def norm_predicted(self, context: Tensor | None, hidden: Tensor) -> Tensor:
        """Apply the final norm to the predicted tokens, ``[R, Q, E]``."""
        if context is None:
            return self.norm(hidden)
        return self.norm(
            torch.cat([*predicted_context(context, self.num_prefix, self.layout), hidden], dim=1)
        )


def predicted_context(tokens: Tensor, num_prefix: int, layout: TokenLayout) -> list[Tensor]:
    """Return the predicted tokens among prefix and visible ones, ``[R, P + K, ...]``."""
    parts = [tokens[:, :1]] if layout.cls else []
    if layout.num_visible:
        parts.append(tokens[:, num_prefix:])
    return parts


class FullDecoder(Decoder):
    """MAE's decoder: self-attention over context and mask tokens.

    Tokens are not unshuffled: positions are already added. Where only masked patches are predicted,
    the last block is a ``QueryBlock`` of the same weights, which skips the unused update of the
    visible tokens.
    """

    def forward(self, tokens: Tensor, choice: PatchChoice) -> Tensor:
        """From encoder tokens ``[R, P + K, D]`` to ``[R, Q, E]``."""
        context = self.embed_context(tokens, choice)
        length = context.shape[1]
        x = torch.cat([context, self.mask_tokens(choice, context.dtype)], dim=1)
        for block in self.blocks:
            if isinstance(block, QueryBlock):
                context, hidden = x[:, :length], x[:, length:]
                x = run_block(block, hidden, context, recompute=self.grad_checkpointing)
                return self.norm_predicted(None, x)
            x = run_block(block, x, recompute=self.grad_checkpointing)
        return self.norm_predicted(x[:, :length], x[:, length:])


class PromptDecoder(Decoder):
    """MILAN's decoder: mask tokens are updated, prompted by a context that no block changes.

    The output for a visible patch or the class token is its normed context token, so these tokens
    distil the encoder directly.
    """

    def forward(self, tokens: Tensor, choice: PatchChoice) -> Tensor:
        """From encoder tokens ``[R, P + K, D]`` to ``[R, Q, E]``."""
        context = self.embed_context(tokens, choice)
        x = self.mask_tokens(choice, context.dtype)
        for block in self.blocks:
            x = run_block(block, x, context, recompute=self.grad_checkpointing)
        return self.norm_predicted(context, x)


class CrossDecoder(Decoder):
    """CrossMAE's decoder: independent mask tokens attend to the encoder's tokens of width D.

    Where visible tokens are predicted too, they are embedded and normed as in ``PromptDecoder``.
    """

    def forward(self, tokens: Tensor, choice: PatchChoice) -> Tensor:
        """From encoder tokens ``[R, P + K, D]`` to ``[R, Q, E]``."""
        x = self.mask_tokens(choice, tokens.dtype)
        for block in self.blocks:
            x = run_block(block, x, tokens, recompute=self.grad_checkpointing)
        return self.norm_predicted(
            None if self.embed is None else self.embed_context(tokens, choice), x
        )


class NoDecoder(nn.Module):
    """No decoder: heads on the encoder's tokens (MaskAlign, Unmasked Teacher); E = D.

    Args:
        num_prefix: P.
        layout: class token and visible patches only.
    """

    grad_checkpointing = False

    def __init__(self, num_prefix: int, layout: TokenLayout) -> None:
        super().__init__()
        self.num_prefix = num_prefix
        self.layout = layout

    def transformer_blocks(self) -> list[nn.Module]:
        return []

    def forward(self, tokens: Tensor, choice: PatchChoice) -> Tensor:
        return torch.cat(predicted_context(tokens, self.num_prefix, self.layout), dim=1)


def build_decoder(
    settings: DecoderSettings,
    student_width: int,
    grid: tuple[int, int],
    num_prefix: int,
    layout: TokenLayout,
) -> Decoder | NoDecoder:
    """Build ``decoder.type``.

    Args:
        settings: the config's group.
        student_width: D.
        grid: rows and columns of patches.
        num_prefix: P.
        layout: tokens to return.

    Returns:
        A module from (tokens ``[R, P + K, D]``, choice) to ``[R, Q, E]``, each of whose parameters
        gets a gradient. ``initialise`` sets its weights.

    Raises:
        ValueError: for an unknown type.
    """
    width, heads = settings.width, settings.heads
    shared: Any = {
        "width": width,
        "student_width": student_width,
        "grid": grid,
        "num_prefix": num_prefix,
        "layout": layout,
        "position_grid": settings.position_grid,
    }
    if settings.type == "none":
        return NoDecoder(num_prefix, layout)
    if settings.type == "full":
        norm: Any = partial(nn.LayerNorm, eps=EPS)
        make = partial(Block, width, heads, MLP_RATIO, qkv_bias=True, norm_layer=norm)
        full: list[nn.Module] = [make() for _ in range(settings.depth)]
        if not (layout.cls or layout.num_visible):
            full[-1] = QueryBlock(PromptAttention(width, heads), width, norm_context=True)
        decoder = FullDecoder(full, **shared)
        use_attend(decoder)
        return decoder
    if settings.type == "prompt":
        blocks = [
            QueryBlock(PromptAttention(width, heads), width, settings.prompt_norm_context)
            for _ in range(settings.depth)
        ]
        return PromptDecoder(blocks, **shared)
    if settings.type == "cross":
        blocks = [
            QueryBlock(CrossAttention(width, student_width, heads), width)
            for _ in range(settings.depth)
        ]
        return CrossDecoder(blocks, **shared, embed=layout.cls or layout.num_visible > 0)
    raise ValueError(f"decoder type {settings.type!r} is not one of prompt, full, cross, none")


class Heads(nn.ModuleDict):
    """One linear layer per target, by the term of the loss.

    Args:
        width: E.
        widths: channels of each target, by term.
        has_cls: whether the first token is the class token, which has no pixels.
    """

    def __init__(self, width: int, widths: Mapping[str, int], has_cls: bool) -> None:
        super().__init__({name: nn.Linear(width, own) for name, own in widths.items()})
        self.has_cls = has_cls

    def forward(self, x: Tensor) -> Predictions:
        """Predictions from decoder outputs ``[R, Q, E]``."""
        start = int(self.has_cls)
        return {name: head(x[:, start:] if name == "pixel" else x) for name, head in self.items()}
