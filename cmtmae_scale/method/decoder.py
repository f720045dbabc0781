"""The light networks that predict targets from the encoder's tokens, and the heads on top.

All return ``[R, Q, E]`` in the order of a ``TokenLayout``: [class token][visible][hidden].

Legend: R rows (masks), K visible, M hidden, P prefix tokens, Q predicted tokens, D student width,
E decoder width, F teacher width, p patch side in pixels.

Source: method.md 4.9; MAE (arXiv 2111.06377), MILAN (2208.06049), CrossMAE (2401.14391).
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# timm and parts of torch are only partly typed.
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.mlp import Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from cmtmae_scale.config.schema import Decoder as DecoderSettings
from cmtmae_scale.method.initialisation import sincos_positions
from cmtmae_scale.method.masking import PatchChoice
from cmtmae_scale.method.student import run_block
from cmtmae_scale.method.targets import Predictions, TokenLayout

EPS = 1e-6
MLP_RATIO = 4


def split_heads(x: Tensor, heads: int) -> Tensor:
    """From ``[R, T, E]`` to ``[R, H, T, E / H]``."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Multi-head attention of ``[R, M, E]`` over ``[R, T, E]``; returns ``[R, M, E]``."""
    q, k, v = (split_heads(x, heads) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class PromptAttention(nn.Module):
    """MILAN's attention: hidden tokens attend to the context and to themselves.

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
        """From hidden tokens ``[R, M, E]`` and context ``[R, P + K, E]`` to ``[R, M, E]``."""
        width = x.shape[-1]
        # One matrix as in MAE's blocks, but the context needs no queries.
        (w_q, w_kv), (b_q, b_kv) = (p.split((width, 2 * width)) for p in self.qkv.parameters())
        key, value = F.linear(torch.cat([context, x], dim=1), w_kv, b_kv).chunk(2, dim=-1)
        return self.proj(attend(F.linear(x, w_q, b_q), key, value, self.heads))


class CrossAttention(nn.Module):
    """CrossMAE's attention: hidden tokens attend to the context only.

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
        """From hidden tokens ``[R, M, E]`` and context ``[R, P + K, D]`` to ``[R, M, E]``."""
        key, value = self.kv(context).chunk(2, dim=-1)
        return self.proj(attend(self.q(x), key, value, self.heads))


class QueryBlock(nn.Module):
    """A pre-norm block that updates hidden tokens and only reads the context.

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
        """Update hidden tokens ``[R, M, E]`` from the context."""
        x = x + self.attn(self.norm1(x), self.norm1(context) if self.norm_context else context)
        return x + self.mlp(self.norm2(x))


class Decoder(nn.Module):
    """What all decoders share: positions, mask token, blocks, final norm.

    Args:
        blocks: transformer blocks, in order.
        width: E.
        student_width: D.
        grid: rows and columns of patches.
        num_prefix: P.
        layout: tokens to return; Q of them.
        embed: whether the encoder's tokens are brought to the decoder's width.
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
    ) -> None:
        super().__init__()
        self.num_prefix = num_prefix
        self.layout = layout
        self.grad_checkpointing = False
        self.embed = nn.Linear(student_width, width) if embed else None
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("positions", sincos_positions(width, grid), persistent=False)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width, eps=EPS)

    def transformer_blocks(self) -> list[nn.Module]:
        """Blocks in the order of the forward, for wrapping and compiling."""
        return list(self.blocks)

    def context(self, tokens: Tensor, choice: PatchChoice) -> Tensor:
        """Encoder tokens ``[R, P + K, D]`` in the decoder's width, with positions."""
        if self.embed is None:
            raise RuntimeError("this decoder was built without embedding; please report this")
        x = self.embed(tokens)
        prefix, visible = x[:, : self.num_prefix], x[:, self.num_prefix :]
        return torch.cat([prefix, visible + self.positions_of(choice.ids_keep, x.dtype)], dim=1)

    def hidden(self, choice: PatchChoice, dtype: torch.dtype) -> Tensor:
        """Mask tokens with the positions of the predicted hidden patches, ``[R, M, E]``."""
        ids = choice.ids_hidden[:, : self.layout.num_hidden]
        return self.mask_token.to(dtype) + self.positions_of(ids, dtype)

    def positions_of(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Position codes, ``[R, ids, E]``."""
        return F.embedding(ids, self.positions).to(dtype)

    def outputs(self, context: Tensor | None, hidden: Tensor) -> Tensor:
        """Final norm of the tokens that are predicted, ``[R, Q, E]``."""
        if context is None:
            return self.norm(hidden)
        return self.norm(torch.cat([*seen(context, self.num_prefix, self.layout), hidden], dim=1))


def seen(tokens: Tensor, num_prefix: int, layout: TokenLayout) -> list[Tensor]:
    """The predicted ones among prefix and visible tokens, ``[R, P + K, ...]``."""
    parts = [tokens[:, :1]] if layout.cls else []
    if layout.num_visible:
        parts.append(tokens[:, num_prefix:])
    return parts


class FullDecoder(Decoder):
    """MAE's: self-attention over context and mask tokens; positions make unshuffling needless.

    Where only hidden tokens are predicted, the last block is a ``QueryBlock`` of the same weights,
    which leaves out what nothing reads: the last update of the visible ones.
    """

    def forward(self, tokens: Tensor, choice: PatchChoice) -> Tensor:
        """From encoder tokens ``[R, P + K, D]`` to ``[R, Q, E]``."""
        context = self.context(tokens, choice)
        length = context.shape[1]
        x = torch.cat([context, self.hidden(choice, context.dtype)], dim=1)
        for block in self.blocks:
            if isinstance(block, QueryBlock):
                context, hidden = x[:, :length], x[:, length:]
                x = run_block(block, hidden, context, recompute=self.grad_checkpointing)
                return self.outputs(None, x)
            x = run_block(block, x, recompute=self.grad_checkpointing)
        return self.outputs(x[:, :length], x[:, length:])


class PromptDecoder(Decoder):
    """MILAN's: mask tokens are prompted by a context that no block changes.

    The prediction for a visible patch or the class token is its context token, normed: the encoder
    is distilled directly.
    """

    def forward(self, tokens: Tensor, choice: PatchChoice) -> Tensor:
        """From encoder tokens ``[R, P + K, D]`` to ``[R, Q, E]``."""
        context = self.context(tokens, choice)
        x = self.hidden(choice, context.dtype)
        for block in self.blocks:
            x = run_block(block, x, context, recompute=self.grad_checkpointing)
        return self.outputs(context, x)


class CrossDecoder(Decoder):
    """CrossMAE's: independent mask tokens read the encoder's tokens in their own width.

    Where visible tokens are predicted too, they are embedded and normed as in ``PromptDecoder``.
    """

    def forward(self, tokens: Tensor, choice: PatchChoice) -> Tensor:
        """From encoder tokens ``[R, P + K, D]`` to ``[R, Q, E]``."""
        x = self.hidden(choice, tokens.dtype)
        for block in self.blocks:
            x = run_block(block, x, tokens, recompute=self.grad_checkpointing)
        return self.outputs(None if self.embed is None else self.context(tokens, choice), x)


class NoDecoder(nn.Module):
    """Heads read the encoder's tokens themselves (MaskAlign, Unmasked Teacher); E = D.

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
        """None."""
        return []

    def forward(self, tokens: Tensor, choice: PatchChoice) -> Tensor:
        """From encoder tokens ``[R, P + K, D]`` to ``[R, Q, D]``; ``choice`` is not read."""
        return torch.cat(seen(tokens, self.num_prefix, self.layout), dim=1)


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
        A module from (tokens ``[R, P + K, D]``, choice) to ``[R, Q, E]``; no parameter of it stays
        without gradient. Weights are meant to be set by ``student.initialise``.

    Raises:
        ValueError: for an unknown type.
    """
    width, heads = settings.width, settings.heads
    shared = (width, student_width, grid, num_prefix, layout)
    if settings.type == "none":
        return NoDecoder(num_prefix, layout)
    if settings.type == "full":
        norm: Any = partial(nn.LayerNorm, eps=EPS)
        make = partial(Block, width, heads, MLP_RATIO, qkv_bias=True, norm_layer=norm)
        full: list[nn.Module] = [make() for _ in range(settings.depth)]
        if not (layout.cls or layout.num_visible):
            full[-1] = QueryBlock(PromptAttention(width, heads), width, norm_context=True)
        return FullDecoder(full, *shared)
    if settings.type == "prompt":
        blocks = [
            QueryBlock(PromptAttention(width, heads), width, settings.prompt_norm_context)
            for _ in range(settings.depth)
        ]
        return PromptDecoder(blocks, *shared)
    if settings.type == "cross":
        blocks = [
            QueryBlock(CrossAttention(width, student_width, heads), width)
            for _ in range(settings.depth)
        ]
        return CrossDecoder(blocks, *shared, embed=layout.cls or layout.num_visible > 0)
    raise ValueError(f"decoder type {settings.type!r} is not one of prompt, full, cross, none")


class Heads(nn.Module):
    """One linear map a target.

    Args:
        width: E.
        teacher_width: F, or ``None`` without teacher features.
        student_width: D, or ``None`` without momentum features.
        pixel_width: ``3 p p``, or ``None`` without pixels.
        has_cls: whether the first token is the class token, which has no pixels.
    """

    def __init__(
        self,
        width: int,
        teacher_width: int | None,
        student_width: int | None,
        pixel_width: int | None,
        has_cls: bool,
    ) -> None:
        super().__init__()
        self.has_cls = has_cls
        self.teacher = make_head(width, teacher_width)
        self.student = make_head(width, student_width)
        self.pixel = make_head(width, pixel_width)

    def forward(self, x: Tensor) -> Predictions:
        """Predictions from decoder outputs ``[R, Q, E]``."""
        return Predictions(
            None if self.teacher is None else self.teacher(x),
            None if self.student is None else self.student(x),
            None if self.pixel is None else self.pixel(x[:, int(self.has_cls) :]),
        )


def make_head(width: int, target_width: int | None) -> nn.Linear | None:
    """Linear map, or nothing for a target that is not used."""
    return None if target_width is None else nn.Linear(width, target_width)
