"""timm's networks as towers: vision transformers, and other networks as features on a grid.

Source: docs/method.md, sections "Attention maps" and "Teacher".
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention, AttentionRope
from timm.layers.attention_pool import AttentionPoolLatent
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from cmtmae_scale.errors import TeacherError
from cmtmae_scale.method.attention import activation_map
from cmtmae_scale.teachers.base import (
    QueryKey,
    TeacherOutputs,
    TowerOutput,
    Transformer,
    WholeNetwork,
)


class TimmTower(Transformer):
    """timm's ``VisionTransformer``, without classifier; see ``Tower`` for the attributes."""

    attention_kinds: tuple[tuple[type[nn.Module], ...], ...] = ((Block,), (Attention,))
    """Classes of blocks, and of their attention, whose queries and keys are computed."""

    def __init__(self, vit: VisionTransformer | Eva, name: str, source: dict[str, object]) -> None:
        self.model = vit
        self.vit: Any = vit
        self.name = name
        self.blocks = list(vit.blocks)
        rows, columns = vit.patch_embed.grid_size
        self.grid = (rows, columns)
        self.num_prefix = vit.num_prefix_tokens
        self.has_cls = vit.cls_token is not None
        pixels: dict[str, Any] = vit.pretrained_cfg  # pyright: ignore
        self.mean = tuple(pixels["mean"])
        self.std = tuple(pixels["std"])
        self.source = source

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Embed patches, add prefix tokens and positions, apply the norm before the blocks."""
        return self.vit.norm_pre(self.vit._pos_embed(self.vit.patch_embed(images))), None

    def run_block(self, block: int, tokens: Tensor, rotary: Tensor | None) -> Tensor:
        return self.blocks[block](tokens)

    def query_key(
        self, block: int, tokens: Tensor, queries: slice, rotary: Tensor | None
    ) -> QueryKey:
        """Compute them from the block's ``qkv``, with q_norm and k_norm if it has them."""
        layer: Any = self.blocks[block]
        attention: Attention = layer.attn
        normed = layer.norm1(tokens)
        qkv, heads = attention.qkv, attention.num_heads
        width = qkv.out_features // 3

        def heads_of(part: int, rows: Tensor) -> Tensor:
            cut = slice(part * width, (part + 1) * width)
            flat = F.linear(rows, qkv.weight[cut], None if qkv.bias is None else qkv.bias[cut])
            return flat.unflatten(-1, (heads, width // heads)).transpose(1, 2)  # [B, H, T, d]

        query = attention.q_norm(heads_of(0, normed[:, queries]))
        return QueryKey(query, attention.k_norm(heads_of(1, normed)), float(attention.scale))

    def pool_query_key(self, tokens: Tensor) -> tuple[QueryKey, int]:
        """Compute the query from the pooling head's latent and the keys from its ``kv``."""
        pool: Any = self.vit.attn_pool
        prefix = self.num_prefix if self.pools_prefix() else 0
        tokens = tokens[:, self.num_prefix - prefix :]
        if pool.pos_embed is not None:
            tokens = tokens + pool.pos_embed.to(tokens.dtype)
        heads, depth = pool.num_heads, pool.head_dim
        width = heads * depth
        bias = None if pool.kv.bias is None else pool.kv.bias[:width]
        query = pool.q(pool.latent).unflatten(-1, (heads, depth)).transpose(1, 2)
        key = F.linear(tokens, pool.kv.weight[:width], bias)
        key = key.unflatten(-1, (heads, depth)).transpose(1, 2)  # [B, H, T, d]
        query = query.expand(len(tokens), -1, -1, -1)
        return QueryKey(pool.q_norm(query), pool.k_norm(key), float(pool.scale)), prefix

    def pools_prefix(self) -> bool:
        """Return whether the keys of the pooling head include the prefix."""
        return bool(getattr(self.vit, "pool_include_prefix", False))

    def norm(self, tokens: Tensor) -> Tensor:
        """Apply ``norm``."""
        return self.vit.norm(tokens)

    def normed_tokens(self, images: Tensor) -> Tensor:
        """See ``Tower.normed_tokens``; the norm of the pooled vector where there is no other."""
        tokens = super().normed_tokens(images)
        return self.vit.fc_norm(tokens) if isinstance(self.vit.norm, nn.Identity) else tokens

    def project(self, tokens: Tensor) -> Tensor:
        """Raise: timm models have no projection; the builder refuses it earlier."""
        raise TeacherError("teacher.feature=proj: timm models have no projection; use ln_post")

    def width(self, feature: str) -> int:
        return self.vit.embed_dim

    def check_feature(self, feature: str) -> None:
        """Refuse ``proj``, and ``ln_post`` where the model norms only the pooled vector."""
        if feature == "proj":
            raise TeacherError(
                f"teacher.feature=proj: teacher.model={self.name} of timm has no projection; set "
                "teacher.feature=ln_post"
            )
        if feature == "ln_post" and isinstance(self.vit.norm, nn.Identity):
            raise TeacherError(
                f"teacher.feature=ln_post: teacher.model={self.name} norms only its pooled vector; "
                "set teacher.feature=block"
            )

    def check_source(self, source: str, layers: Sequence[int]) -> None:
        """Refuse a missing class token or pooling head, and blocks of another kind."""
        if source == "pool":
            if not isinstance(self.vit.attn_pool, AttentionPoolLatent):
                raise TeacherError(
                    f"attention.source=pool: teacher.model={self.name} has no attention pooling; "
                    f"use {'cls' if self.has_cls else 'mean_query'}"
                )
            return
        if source == "cls" and not self.has_cls:
            pooled = isinstance(self.vit.attn_pool, AttentionPoolLatent)
            raise TeacherError(
                f"attention.source=cls: teacher.model={self.name} has no class token; use "
                f"{'pool' if pooled else 'mean_query'}"
            )
        if source == "activation_norm":
            return
        for layer in layers:
            block: Any = self.blocks[layer]
            kinds, inner_kinds = self.attention_kinds
            if not isinstance(block, kinds) or not isinstance(block.attn, inner_kinds):
                inner = type(getattr(block, "attn", None)).__name__
                raise TeacherError(
                    f"attention.source={source}: the attention of teacher.model={self.name} "
                    f"({type(block).__name__}, {inner}) is not supported; use "
                    "attention.source=activation_norm, or choose a plain ViT"
                )


class EvaTower(TimmTower):
    """timm's ``Eva``, with rotary positions: DINOv3, EVA-02, PE and others, without classifier."""

    attention_kinds = ((EvaBlock, EvaBlockPostNorm), (EvaAttention, AttentionRope))

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Embed patches, add prefix tokens and positions, apply the norm before the blocks."""
        tokens, rotary = self.vit._pos_embed(self.vit.patch_embed(images))
        return self.vit.norm_pre(tokens), rotary

    def run_block(self, block: int, tokens: Tensor, rotary: Tensor | None) -> Tensor:
        return self.blocks[block](tokens, rope=self.rotary_of(block, rotary))

    def rotary_of(self, block: int, rotary: Tensor | None) -> Tensor | None:
        """Return the table of a block: one for all blocks, or learned ones for each."""
        return rotary[block] if rotary is not None and self.vit.rope_mixed else rotary

    def query_key(
        self, block: int, tokens: Tensor, queries: slice, rotary: Tensor | None
    ) -> QueryKey:
        """Compute them from ``qkv``, or ``q_proj`` and ``k_proj``; rotate those of patches."""
        layer: Any = self.blocks[block]
        attention = layer.attn
        normed = tokens if isinstance(layer, EvaBlockPostNorm) else layer.norm1(tokens)
        rows = normed[:, queries]
        if attention.qkv is None:
            query, key = attention.q_proj(rows), attention.k_proj(normed)
        else:
            weights = attention.qkv.weight.chunk(3)
            if isinstance(attention, EvaAttention):
                biases = attention.q_bias, attention.k_bias
            else:
                bias = attention.qkv.bias
                biases = (None, None) if bias is None else bias.chunk(3)[:2]
            query = F.linear(rows, weights[0], biases[0])
            key = F.linear(normed, weights[1], biases[1])
        heads = attention.num_heads
        depth = query.shape[-1] // heads
        query, key = (x.unflatten(-1, (-1, depth)).transpose(1, 2) for x in (query, key))
        query, key = attention.q_norm(query), attention.k_norm(key)  # [B, H, T, d]
        table = self.rotary_of(block, rotary)
        if table is not None:
            half = getattr(attention, "rotate_half", False)
            key = rotate_patches(key, table, self.num_prefix, half)
            query = rotate_patches(query, table, len(range(self.num_prefix)[queries]), half)
        if key.shape[1] < heads:  # several heads share a key
            key = key.repeat_interleave(heads // key.shape[1], dim=1)
        return QueryKey(query, key, float(attention.scale))

    def pools_prefix(self) -> bool:
        return True


def rotate_patches(x: Tensor, rotary: Tensor, num_prefix: int, half: bool) -> Tensor:
    """Rotate the patches among queries or keys ``[B, H, T, d]`` by their positions."""
    if x.shape[2] == num_prefix:
        return x
    rotated = apply_rot_embed_cat(x[:, :, num_prefix:], rotary, half=half)
    return torch.cat([x[:, :, :num_prefix], rotated], dim=2).type_as(x)


class FeatureTower(WholeNetwork):
    """Any other network of timm, such as ConvNeXt, that returns features on a grid.

    Its map is the activation norm: it has no attention over all patches.

    Args:
        network: the network, cut after its last stage that is used.
        name: of messages.
        shape: C, rows and columns of the stage's output.
        source: entries of the fingerprint.
    """

    num_prefix = 0
    has_cls = False

    def __init__(
        self, network: nn.Module, name: str, shape: Sequence[int], source: dict[str, object]
    ) -> None:
        self.model = network
        self.network: Any = network
        self.name = name
        self.blocks = [network]
        self.channels, rows, columns = shape
        self.grid = (rows, columns)
        pixels: dict[str, Any] = self.network.pretrained_cfg
        self.mean, self.std = tuple(pixels["mean"]), tuple(pixels["std"])
        self.source = source

    def forward(self, images: Tensor, outputs: TeacherOutputs) -> TowerOutput:
        """Run the network; its features ``[B, C, rows, columns]`` become tokens ``[B, N, C]``."""
        stage = self.network.forward_intermediates(images, indices=1, intermediates_only=True)[0]
        tokens = stage.flatten(2).transpose(1, 2)
        maps = [activation_map(tokens) for _ in outputs.attention_layers]
        return TowerOutput(maps, [tokens for _ in outputs.feature_layers])

    def check_feature(self, feature: str) -> None:
        """Accept ``block`` alone."""
        if feature != "block":
            raise TeacherError(
                f"teacher.feature={feature}: teacher.model={self.name} "
                f"({type(self.network).__name__}) has the outputs of its stages only; set "
                "teacher.feature=block"
            )

    def check_source(self, source: str, layers: Sequence[int]) -> None:
        """Accept ``activation_norm`` alone."""
        if source != "activation_norm":
            raise TeacherError(
                f"attention.source={source}: teacher.model={self.name} "
                f"({type(self.network).__name__}) has no attention over all patches; set "
                "attention.source=activation_norm, the norm of its features"
            )


def set_size(network: Any, size: int) -> None:
    """Set the side of a network's images, where it has one."""
    if hasattr(network, "set_input_size"):
        network.set_input_size(img_size=(size, size))


def stage_shapes(network: nn.Module, size: int) -> list[tuple[int, ...]]:
    """Set the size of a network on the meta device; return C, rows and columns of each stage.

    Raises:
        TeacherError: if it has no stages with features on a grid, or does not take the size.
    """
    forward = getattr(network, "forward_intermediates", None)
    kind = type(network).__name__
    if forward is None:
        raise TeacherError(f"{kind} returns no features on a grid; choose another model")
    network.eval()  # as the teacher runs: a batch norm in training refuses one value per channel
    try:
        with torch.device("meta"), torch.no_grad():
            set_size(network, size)
            stages = forward(torch.empty(1, 3, size, size), intermediates_only=True)
    except Exception as error:  # each network has its own checks of the size
        first = str(error).strip().split("\n")[0]
        raise TeacherError(
            f"{kind} does not run at {size} pixels ({type(error).__name__}: {first})"
        ) from error
    shapes = [tuple(stage.shape[1:]) for stage in stages]
    if any(len(shape) != 3 for shape in shapes):
        raise TeacherError(f"{kind} returns no features on a grid; choose another model")
    return shapes
