"""Teachers from open_clip: ViTs of OpenAI, LAION, DataComp, DFN and MetaCLIP.

Only the image tower is built.

Source: docs/method.md, sections "Attention maps" and "Teacher".
"""

import difflib
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import open_clip
import torch
import torch.nn.functional as F
from huggingface_hub import try_to_load_from_cache
from open_clip import transformer
from open_clip.constants import HF_CONFIG_NAME, HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME
from open_clip.model import (
    CLIPVisionCfg,
    _build_vision_tower,  # pyright: ignore[reportPrivateUsage] # avoids building the text tower
    resize_pos_embed,
)
from torch import Tensor, nn

from cmtmae_scale.config.schema import Teacher as TeacherConfig
from cmtmae_scale.errors import TeacherError
from cmtmae_scale.method.attend import SelfAttention
from cmtmae_scale.method.images import CLIP_MEAN, CLIP_STD
from cmtmae_scale.runtime.storage import read_json, read_regular
from cmtmae_scale.teachers.base import QueryKey, Transformer, are_channels, is_count
from cmtmae_scale.teachers.state_dicts import image_state, keep_blocks, load_strictly
from cmtmae_scale.teachers.weights import describe_unreachable, is_file_name, read_weights

logger = logging.getLogger(__name__)

POSITIONS = "positional_embedding"


class ModelConfig(NamedTuple):
    """Config of an open_clip model: architecture, activation, pixel normalisation."""

    name: str
    embed_dim: int
    vision: dict[str, Any]
    quick_gelu: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]


def find_model_config(model: str) -> ModelConfig:
    """Find a model's config by name or by the path of its JSON.

    Args:
        model: a name of ``open_clip.list_models()``, or a ``.json`` file: a bare model config, or
            an ``open_clip_config.json`` with ``model_cfg`` and ``preprocess_cfg`` (mean, std).

    Raises:
        TeacherError: for an unknown name, or a file that is missing or not a model config.
    """
    pixels: dict[str, Any] = {}
    if model.endswith(".json"):
        path = Path(model)
        if not path.is_file():
            raise TeacherError(f"teacher.model={model}: there is no such file")
        try:
            content = read_json(read_regular(path))
        except (OSError, ValueError) as error:
            raise TeacherError(f"teacher.model={model}: not a JSON file ({error})") from error
        if isinstance(content, dict) and "model_cfg" in content:
            content, pixels = content["model_cfg"], content.get("preprocess_cfg", {})
        if (
            not isinstance(content, dict)
            or not is_count(content.get("embed_dim"))
            or not isinstance(content.get("vision_cfg"), dict)
            or not isinstance(pixels, dict)
        ):
            raise TeacherError(
                f"teacher.model={model}: not an open_clip model config; it needs embed_dim and "
                "vision_cfg"
            )
        for key, above_zero, expected in (("mean", False, ""), ("std", True, " above 0")):
            found = pixels.get(key)
            if found and not are_channels(found, above_zero):
                raise TeacherError(
                    f"teacher.model={model}: preprocess_cfg.{key} is {found}; expected three "
                    f"numbers{expected}"
                )
        name = path.stem
    else:
        name = model.replace("/", "-")
        known = name in open_clip.list_models()  # of other names open_clip may ask the network
        content = open_clip.get_model_config(name) if known else None
        if content is None:
            close = difflib.get_close_matches(name, open_clip.list_models(), n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else "see open_clip.list_models()"
            raise TeacherError(f"teacher.model={model} is not a model of open_clip; {hint}")
    return ModelConfig(
        name,
        content["embed_dim"],
        content["vision_cfg"],
        bool(content.get("quick_gelu", False)),
        tuple(pixels.get("mean") or CLIP_MEAN),
        tuple(pixels.get("std") or CLIP_STD),
    )


def check_vision(model: str, vision: dict[str, Any]) -> None:
    """Refuse towers that are not plain vision transformers, and invalid sizes.

    The image size is not checked: the run sets it.

    Raises:
        TeacherError: naming what to use instead.
    """
    trunk = vision.get("timm_model_name")
    if trunk:
        raise TeacherError(
            f"teacher.model={model}: its image tower is timm's {trunk}; set teacher.library=timm "
            f"teacher.model={trunk}"
        )
    if isinstance(vision.get("layers"), list):
        raise TeacherError(
            f"teacher.model={model}: its image tower is a ResNet and has no patch tokens; choose a "
            "ViT model, here or with teacher.library=timm"
        )
    special = {
        "attentional_pool": vision.get("attentional_pool", False),
        "final_ln_after_pool": vision.get("final_ln_after_pool", False),
        "pool_type": vision.get("pool_type", "tok") != "tok",
        "block_type": vision.get("block_type") not in (None, "default"),
    }
    special |= {
        key: vision.get(key, False)
        for key in ("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn", "scale_fc")
    }
    for key, found in special.items():
        if found:
            raise TeacherError(
                f"teacher.model={model}: {key}={vision[key]} is not supported; "
                "choose a plain ViT, or this model with teacher.library=timm"
            )
    defaults = {field.name: field.default for field in fields(CLIPVisionCfg)}
    for key, value in vision.items():
        if key not in defaults:
            raise TeacherError(
                f"teacher.model={model}: vision_cfg.{key} is not known to open_clip "
                f"{open_clip.__version__}; install the version that the file is of"
            )
        default = defaults[key]
        if type(default) is int and key != "image_size" and not is_count(value):
            raise TeacherError(
                f"teacher.model={model}: vision_cfg.{key} is {value!r}; expected a whole number "
                f"above 0, such as open_clip's default {default}"
            )


def check_quick_gelu(config: TeacherConfig, model: ModelConfig) -> bool:
    """Return the activation that the config sets; weights files do not contain it.

    Raises:
        TeacherError: naming ``teacher.quick_gelu``.

    Source: docs/method.md, section "Teacher".
    """
    if config.quick_gelu is None:
        raise TeacherError(
            "teacher.quick_gelu must be given for open_clip: true for OpenAI, DFN and MetaCLIP "
            "weights, false for LAION and DataComp"
        )
    if model.quick_gelu and not config.quick_gelu:
        raise TeacherError(
            f"teacher.quick_gelu=false, but teacher.model={config.model} is built with QuickGELU; "
            "set teacher.quick_gelu=true or choose the model without -quickgelu"
        )
    return config.quick_gelu


def tag_config(config: TeacherConfig, name: str, quick_gelu: bool) -> dict[str, Any]:
    """Return open_clip's entry of a pretrained tag.

    Raises:
        TeacherError: for an unknown tag, or one trained with the other activation.
    """
    tag = str(config.weights)
    base = name.removesuffix("-quickgelu")
    entry = open_clip.get_pretrained_cfg(base, tag) or open_clip.get_pretrained_cfg(name, tag)
    if not entry:
        known = ", ".join(open_clip.list_pretrained_tags_by_model(base)) or "none"
        raise TeacherError(
            f"teacher.weights={tag} is neither a file nor a tag of {base}; its tags: {known}"
        )
    trained = bool(entry.get("quick_gelu", False))
    if trained != quick_gelu:
        raise TeacherError(
            f"teacher.quick_gelu={str(quick_gelu).lower()}, but the weights {tag} of {base} were "
            f"trained with quick_gelu={str(trained).lower()}; set teacher.quick_gelu accordingly"
            + ("" if trained else " and choose the model without -quickgelu")
        )
    return entry


def download_tag(entry: dict[str, Any], tag: str) -> str:
    """Download a tag's file, or find it in the library's cache.

    Raises:
        TeacherError: if it is not reachable; names the remedy.
    """
    repository, name = os.path.split(entry.get("hf_hub", ""))
    files = {"teacher.weights": name or HF_SAFE_WEIGHTS_NAME}
    if (tuple(entry["mean"]), tuple(entry["std"])) != (CLIP_MEAN, CLIP_STD):
        files["teacher.model"] = HF_CONFIG_NAME  # of a model's name the pixels are CLIP's
    url = entry.get("url", "")
    try:
        path = open_clip.download_pretrained(entry)
    except Exception as error:  # each transport has its own errors; all end the run with the remedy
        raise describe_unreachable(
            tag, error, repository=repository, url=url, files=files
        ) from error
    if not path:
        raise TeacherError(
            f"teacher.weights={tag} has no file to download; use teacher.weights=FILE"
        )
    return path


def find_cached_tag(model: str, tag: str) -> str | None:
    """Return a tag's file in the cache of Hugging Face's hub; ``None``: a launch downloads it."""
    entry = open_clip.get_pretrained_cfg(model.removesuffix("-quickgelu"), tag)
    repository, name = os.path.split(entry.get("hf_hub", ""))
    for file in [name] if name else [HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME]:
        found = try_to_load_from_cache(repository, file) if repository else None
        if isinstance(found, str):
            return found
    return None


def resize_positions(state: dict[str, Tensor], visual: nn.Module, path: str) -> None:
    """Resample the positional embedding to the tower's grid in place, with open_clip's function.

    Raises:
        TeacherError: if the file's grid is not square.
    """
    table = state.get(POSITIONS)
    if table is None or table.ndim != 2:
        return
    side = math.isqrt(max(table.shape[0] - 1, 0))
    if side * side != table.shape[0] - 1:
        raise TeacherError(
            f"teacher.weights={path}: {POSITIONS} has {table.shape[0]} rows, not a class token and "
            "a square grid"
        )
    holder = {f"visual.{POSITIONS}": table.float()}
    resize_pos_embed(holder, SimpleNamespace(visual=visual))
    state[POSITIONS] = holder[f"visual.{POSITIONS}"]


class OpenClipTower(Transformer):
    """open_clip's plain ``VisionTransformer``; see ``Tower`` for the attributes."""

    num_prefix = 1
    has_cls = True

    def __init__(
        self,
        visual: transformer.VisionTransformer,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        source: dict[str, object],
    ) -> None:
        self.model = self.visual = visual
        self.blocks = list(visual.transformer.resblocks)
        rows, columns = visual.grid_size
        self.grid = (rows, columns)
        self.mean, self.std, self.source = mean, std, source

    def embed(self, images: Tensor) -> tuple[Tensor, None]:
        """Embed patches, add class token and positions, apply the norm before the blocks."""
        return self.visual._embeds(images), None

    def run_block(self, block: int, tokens: Tensor, rotary: Tensor | None) -> Tensor:
        return self.blocks[block](tokens)

    def fuse_attention(self) -> None:
        """Let the blocks multiply queries, keys and values at once when they are compiled."""
        for module in self.visual.modules():
            if type(module) is nn.MultiheadAttention:
                module.__class__ = SelfAttention

    def query_key(
        self, block: int, tokens: Tensor, queries: slice, rotary: Tensor | None
    ) -> QueryKey:
        """Compute them from ``in_proj_weight`` of ``nn.MultiheadAttention``, rows q, k, v."""
        layer: Any = self.blocks[block]
        attention: nn.MultiheadAttention = layer.attn
        normed = layer.ln_1(tokens)
        width, heads = attention.embed_dim, attention.num_heads
        weight, bias = attention.in_proj_weight, attention.in_proj_bias

        def heads_of(part: int, rows: Tensor) -> Tensor:
            cut = slice(part * width, (part + 1) * width)
            flat = F.linear(rows, weight[cut], None if bias is None else bias[cut])
            return flat.unflatten(-1, (heads, width // heads)).transpose(1, 2)  # [B, H, T, d]

        return QueryKey(
            heads_of(0, normed[:, queries]), heads_of(1, normed), (width // heads) ** -0.5
        )

    def pool_query_key(self, tokens: Tensor) -> tuple[QueryKey, int]:
        """Raise: towers with a pooling head are refused when they are built."""
        raise TeacherError("attention.source=pool: plain open_clip towers have no pooling head")

    def norm(self, tokens: Tensor) -> Tensor:
        return self.visual.ln_post(tokens)

    def project(self, tokens: Tensor) -> Tensor:
        projection = self.visual.proj
        if projection is None:
            raise TeacherError("teacher.feature=proj: the tower has no projection; use ln_post")
        return tokens @ projection

    def width(self, feature: str) -> int:
        return self.visual.output_dim if feature == "proj" else self.visual.transformer.width

    def check_feature(self, feature: str) -> None:
        """Accept all: the tower has the three kinds of features."""

    def check_source(self, source: str, layers: Sequence[int]) -> None:
        """Refuse ``pool``: the tower has no pooling head."""
        if source == "pool":
            raise TeacherError(
                "attention.source=pool: plain open_clip towers have no pooling head; use cls or "
                "mean_query, or a model with one (SigLIP) under teacher.library=timm"
            )


class OpenClipSource:
    """Find and build a tower.

    Raises:
        TeacherError: for an unknown or unsupported model, or an activation that is not given.
    """

    def __init__(self, config: TeacherConfig) -> None:
        self.config = config
        self.model = find_model_config(str(config.model))
        check_vision(str(config.model), self.model.vision)
        self.quick_gelu = check_quick_gelu(config, self.model)
        self.patch: int = self.model.vision.get("patch_size", 16)

    def build(self, image_size: int, seed: int, *, load: bool = True) -> OpenClipTower:
        """Build the tower at one size, with its weights.

        Args:
            image_size: S, a multiple of the patch.
            seed: seed of random weights.
            load: False keeps the initialised weights and downloads nothing (dry run).

        Raises:
            TeacherError: for weights that are missing, not reachable or do not fit.
        """
        config, model = self.config, self.model
        weights = str(config.weights)
        mean, std, path = model.mean, model.std, None
        if weights != "random" and is_file_name(weights):
            path = weights
        elif weights != "random":
            entry = tag_config(config, model.name, self.quick_gelu)
            mean, std = tuple(entry["mean"]), tuple(entry["std"])
            path = download_tag(entry, weights) if load else None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            visual = self.skeleton(image_size)
        full = len(visual.transformer.resblocks)
        if config.depth is not None:
            if config.depth > full:
                raise TeacherError(
                    f"teacher.depth={config.depth}: teacher.model={config.model} has {full} blocks"
                )
            visual.transformer.resblocks = visual.transformer.resblocks[: config.depth]
        if path is not None and load:
            self.load(visual, path, full)
        source: dict[str, object] = {
            "library": "open_clip",
            "library_version": open_clip.__version__,
            "model": model.name,
            "architecture": model.vision | {"embed_dim": model.embed_dim},
            "weights": Path(weights).name if is_file_name(weights) else weights,
            "weights_file": path,
            "seed": seed if weights == "random" else None,
            "quick_gelu": self.quick_gelu,
        }
        logger.info("teacher: %s, pixels with mean %s and std %s", model.name, mean, std)
        return OpenClipTower(visual, mean, std, source)

    def skeleton(self, image_size: int) -> transformer.VisionTransformer:
        """Build the tower without pretrained weights and check its class and activation."""
        model = self.model
        settings = model.vision | {"image_size": image_size, "patch_dropout": 0.0}
        try:
            visual = _build_vision_tower(
                model.embed_dim, CLIPVisionCfg(**settings), self.quick_gelu
            )
        except Exception as error:  # open_clip and torch check values of a file in their own ways
            raise TeacherError(
                f"teacher.model={self.config.model}: open_clip {open_clip.__version__} cannot "
                f"build a tower from vision_cfg {model.vision} ({type(error).__name__}: {error}); "
                "correct the value, or use the file that was published with the weights"
            ) from error
        plain = type(visual) is transformer.VisionTransformer and all(
            isinstance(block, transformer.ResidualAttentionBlock)
            for block in visual.transformer.resblocks
        )
        if not plain or not isinstance(visual, transformer.VisionTransformer):
            raise TeacherError(
                f"teacher.model={self.config.model}: {type(visual).__name__} is not a plain vision "
                "transformer of open_clip; try teacher.library=timm"
            )
        for block in visual.transformer.resblocks:
            activation: nn.Module = block.mlp.gelu  # pyright: ignore
            if isinstance(activation, transformer.QuickGELU) != self.quick_gelu:
                raise TeacherError(
                    f"teacher.quick_gelu={str(self.quick_gelu).lower()}, but open_clip built "
                    f"{type(activation).__name__}; this version of open_clip is not supported"
                )
        return visual

    def load(self, visual: transformer.VisionTransformer, path: str, full_depth: int) -> None:
        """Load a file strictly."""
        state = image_state(read_weights(path), path)
        if len(visual.transformer.resblocks) < full_depth:
            state = keep_blocks(state, "transformer.resblocks", len(visual.transformer.resblocks))
        resize_positions(state, visual, path)
        load_strictly(
            visual,
            state,
            path,
            str(self.config.model),
            "give the file of this model, or the teacher.model and teacher.depth of the file",
        )
