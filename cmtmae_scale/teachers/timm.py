"""Teachers from timm: DINOv2, DeiT, SigLIP, CLIP's image towers and other ViTs.

Source: docs/method.md, sections "Attention maps" and "Teacher".
"""

import difflib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers import QuickGELU
from timm.layers.attention import Attention
from timm.layers.attention_pool import AttentionPoolLatent
from timm.models import get_arch_pretrained_cfgs, is_model_in_modules
from timm.models._hub import HF_SAFE_WEIGHTS_NAME
from timm.models.vision_transformer import Block, VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from cmtmae_scale.config.schema import Teacher as TeacherConfig
from cmtmae_scale.errors import TeacherError
from cmtmae_scale.method.student import VIT_MODULES
from cmtmae_scale.teachers.base import QueryKey, Tower
from cmtmae_scale.teachers.weights import (
    describe_unreachable,
    find_non_finite,
    is_file_name,
    keep_blocks,
    load_strictly,
    read_weights,
)

logger = logging.getLogger(__name__)

QUICK_GELU_TAGS = ("openai", "dfn2b", "dfn5b", "metaclip_400m", "metaclip_2pt5b")
CLASSIFIER = ("head.", "head_dist.")


class TimmTower(Tower):
    """timm's ``VisionTransformer``, without classifier; see ``Tower`` for the attributes."""

    def __init__(self, vit: VisionTransformer, name: str, source: dict[str, object]) -> None:
        self.model = self.vit = vit
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

    def embed(self, images: Tensor) -> Tensor:
        """Embed patches, add prefix tokens and positions, apply the norm before the blocks."""
        return self.vit.norm_pre(self.vit._pos_embed(self.vit.patch_embed(images)))

    def query_key(self, block: int, tokens: Tensor, queries: slice) -> QueryKey:
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
        prefix = self.num_prefix if getattr(self.vit, "pool_include_prefix", False) else 0
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

    def norm(self, tokens: Tensor) -> Tensor:
        """Apply ``norm``."""
        return self.vit.norm(tokens)

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
        for layer in layers:
            block: Any = self.blocks[layer]
            if not isinstance(block, Block) or not isinstance(block.attn, Attention):
                inner = type(getattr(block, "attn", None)).__name__
                raise TeacherError(
                    f"attention.source={source}: the attention of teacher.model={self.name} "
                    f"({type(block).__name__}, {inner}) is not supported; choose a plain ViT"
                )


class TimmSource:
    """Find and build a model.

    Raises:
        TeacherError: for an unknown model or tag, or a model that is not a VisionTransformer.
    """

    def __init__(self, config: TeacherConfig) -> None:
        self.config = config
        self.name, _, tag = str(config.model).partition(".")
        weights = str(config.weights)
        if not timm.is_model(self.name):
            close = difflib.get_close_matches(self.name, timm.list_models(), n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else "see timm.list_models()"
            raise TeacherError(f"teacher.model={config.model} is not a model of timm; {hint}")
        self.local = is_file_name(weights)
        self.tag = "" if self.local or weights == "random" else weights
        if tag and self.tag and tag != self.tag:
            raise TeacherError(
                f"teacher.weights={weights}, but teacher.model={config.model} names {tag}; drop one"
            )
        known = [name.partition(".")[2] for name in get_arch_pretrained_cfgs(self.name)]
        for wanted in filter(None, (tag, self.tag)):
            if wanted not in known:
                raise TeacherError(
                    f"teacher.weights={wanted} is neither a file nor a tag of {self.name}; its "
                    f"tags: {', '.join(known) or 'none'}"
                )
        # the tag also determines mean and standard deviation of the pixels
        self.full_name = ".".join(filter(None, (self.name, self.tag or tag)))
        with torch.device("meta"):
            probe = self.create(pretrained=False, initialised=False)
        self.patch = int(probe.patch_embed.patch_size[0])
        self.quick_gelu = self.check_activation(probe, self.tag or tag)

    def create(self, *, pretrained: bool, initialised: bool = True) -> VisionTransformer:
        """Build the model at its default size, without classifier.

        Args:
            pretrained: download its weights.
            initialised: draw timm's initial weights; else torch's remain, until others are loaded.

        Raises:
            TeacherError: if it is not a ``VisionTransformer``.
        """
        options: dict[str, Any] = {"num_classes": 0}
        if not initialised and is_model_in_modules(self.name, VIT_MODULES):
            options["weight_init"] = "skip"
        model = timm.create_model(self.full_name, pretrained=pretrained, **options)
        if not isinstance(model, VisionTransformer):
            raise TeacherError(
                f"teacher.model={self.config.model} is a {type(model).__name__}, not timm's "
                "VisionTransformer; choose one, such as vit_base_patch14_dinov2"
            )
        return model

    def check_activation(self, probe: VisionTransformer, tag: str) -> bool:
        """Return whether the model has QuickGELU; refuse weights trained with another activation.

        Raises:
            TeacherError: naming ``teacher.quick_gelu``.
        """
        mlp: Any = probe.blocks[0]
        built = isinstance(getattr(getattr(mlp, "mlp", None), "act", None), QuickGELU)
        asked = self.config.quick_gelu
        if asked is not None and asked != built:
            raise TeacherError(
                f"teacher.quick_gelu={str(asked).lower()}, but teacher.model={self.config.model} "
                f"of timm is built {'with' if built else 'without'} QuickGELU; choose the model "
                f"{'without' if built else 'with'} quickgelu in its name"
            )
        if asked is None and not built and "clip" in self.name and tag in QUICK_GELU_TAGS:
            raise TeacherError(
                f"teacher.weights={tag} were trained with QuickGELU, teacher.model="
                f"{self.config.model} computes GELU; choose the model with clip_quickgelu in its "
                "name, or set teacher.quick_gelu=false to keep GELU"
            )
        return built

    def build(self, image_size: int, seed: int, *, load: bool = True) -> TimmTower:
        """Build the model at one size, with its weights.

        Args:
            image_size: S, a multiple of the patch.
            seed: seed of random weights.
            load: False keeps the initialised weights and downloads nothing (dry run).

        Raises:
            TeacherError: for weights that are missing, not reachable or do not fit.
        """
        config = self.config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            vit = (
                self.download()
                if self.tag and load
                else self.create(pretrained=False, initialised=not (self.local and load))
            )
        found = find_non_finite(vit.state_dict()) if self.tag and load else ""
        if found:
            raise TeacherError(f"teacher.weights={self.tag}: {found}; choose another tag")
        full = len(vit.blocks)
        if config.depth is not None:
            if config.depth > full:
                raise TeacherError(
                    f"teacher.depth={config.depth}: teacher.model={config.model} has {full} blocks"
                )
            vit.blocks = vit.blocks[: config.depth]
        vit.set_input_size(img_size=(image_size, image_size))
        if self.local and load:
            self.load(vit, str(config.weights), full)
        source: dict[str, object] = {
            "library": "timm",
            "library_version": timm.__version__,
            "model": self.full_name,
            "weights": Path(str(config.weights)).name if self.local else config.weights,
            "weights_file": config.weights if self.local else None,
            "seed": seed if config.weights == "random" else None,
            "quick_gelu": self.quick_gelu,
        }
        tower = TimmTower(vit, self.full_name, source)
        logger.info(
            "teacher: %s, pixels with mean %s and std %s", tower.name, tower.mean, tower.std
        )
        return tower

    def download(self) -> VisionTransformer:
        """Download a tag's weights, or find them in the library's cache.

        Raises:
            TeacherError: if they are not reachable; names the remedy.
        """
        try:
            return self.create(pretrained=True)
        except TeacherError:
            raise
        except Exception as error:  # each transport has its own; all end the run with the remedy
            published: Any = timm.get_pretrained_cfg(self.full_name)
            raise describe_unreachable(
                self.tag,
                error,
                repository=published.hf_hub_id or "",
                url=published.url or "",
                files={"teacher.weights": published.hf_hub_filename or HF_SAFE_WEIGHTS_NAME},
                settings=[f"teacher.model={self.full_name}"],  # its tag determines the pixels
            ) from error

    def load(self, vit: VisionTransformer, path: str, full_depth: int) -> None:
        """Load a file strictly, its positional embedding resampled to the grid."""
        state = read_weights(path)
        own = vit.patch_embed.proj.weight.shape
        for key in ("patch_embed.proj.weight", "visual.conv1.weight"):
            if key in state and state[key].ndim == 4 and state[key].shape != own:
                # timm resamples another patch size silently
                raise TeacherError(
                    f"teacher.weights={path} does not fit teacher.model={self.config.model}: {key} "
                    f"is {list(state[key].shape)} instead of {list(own)}; set "
                    "teacher.model to that of the file"
                )
        if "pos_embed" in state:
            state["pos_embed"] = state["pos_embed"].float()
        state = dict(checkpoint_filter_fn(state, vit))
        state = {name: value for name, value in state.items() if not name.startswith(CLASSIFIER)}
        if len(vit.blocks) < full_depth:
            state = keep_blocks(state, "blocks", len(vit.blocks))
        load_strictly(
            vit,
            state,
            path,
            str(self.config.model),
            "give the file of this model, or the teacher.model and teacher.depth of the file",
        )
