"""Small networks of each family of teachers, with random weights, registered with timm.

Each has the settings of the published model that it is named after, at a small width and depth.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from timm.models import convnext, eva, mlp_mixer, register_model, vision_transformer

SMALL: dict[str, Any] = {"embed_dim": 32, "depth": 2, "num_heads": 2}
CLIP = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 32, "head_width": 8, "patch_size": 16},
    "text_cfg": {"context_length": 4, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1},
}


@register_model
def small_dinov3(pretrained: bool = False, **options: Any) -> Any:
    return eva.vit_small_patch16_dinov3(pretrained, **(SMALL | options))


@register_model
def small_eva02(pretrained: bool = False, **options: Any) -> Any:
    return eva.eva02_tiny_patch14_224(pretrained, **(SMALL | options))


@register_model
def small_pe(pretrained: bool = False, **options: Any) -> Any:
    return eva.vit_pe_core_tiny_patch16_384(pretrained, **(SMALL | options))


@register_model
def small_mixed_rope(pretrained: bool = False, **options: Any) -> Any:
    return eva.vit_small_patch16_rope_mixed_224(pretrained, **(SMALL | options))


@register_model
def small_post_norm(pretrained: bool = False, **options: Any) -> Any:
    return eva.eva02_enormous_patch14_clip_224(pretrained, **(SMALL | options))


@register_model
def small_dinov2(pretrained: bool = False, **options: Any) -> Any:
    return vision_transformer.vit_giant_patch14_reg4_dinov2(pretrained, **(SMALL | options))


@register_model
def small_siglip2(pretrained: bool = False, **options: Any) -> Any:
    return vision_transformer.vit_base_patch16_siglip_224(pretrained, **(SMALL | options))


@register_model
def small_convnext(pretrained: bool = False, **options: Any) -> Any:
    sizes = {"dims": (8, 16, 24, 32), "depths": (1, 1, 1, 1)}
    return convnext.convnext_tiny(pretrained, **(sizes | options))


@register_model
def small_mixer(pretrained: bool = False, **options: Any) -> Any:
    return mlp_mixer.mixer_s32_224(pretrained, **options)


class Family(NamedTuple):
    """A family of teachers, and the settings of its small network."""

    model: str
    source: str
    feature: str
    more: tuple[str, ...] = ("teacher.library=timm", "teacher.weights=random")
    has_cls: bool = True

    def overrides(self, folder: Path) -> list[str]:
        """Overrides of a recipe; ``folder`` takes a model's description."""
        model = self.model
        if model.endswith(".json"):
            model = str(folder / model)
            Path(model).write_text(json.dumps(CLIP))
        return [
            f"teacher.model={model}",
            f"attention.source={self.source}",
            f"teacher.feature={self.feature}",
            f"loss.include_cls={str(self.has_cls).lower()}",
            *self.more,
        ]


FAMILIES = {
    "DINOv3": Family("small_dinov3", "cls", "ln_post"),
    "EVA-02": Family("small_eva02", "mean_query", "block"),
    "PE": Family("small_pe", "pool", "ln_post"),
    "SigLIP 2": Family("small_siglip2", "pool", "ln_post", has_cls=False),
    "ConvNeXt": Family(
        "small_convnext",
        "activation_norm",
        "block",
        ("teacher.library=timm", "teacher.weights=random", "teacher.depth=3"),
        has_cls=False,
    ),
    "CLIP": Family(
        "clip.json",
        "cls",
        "proj",
        ("teacher.library=open_clip", "teacher.weights=random", "teacher.quick_gelu=true"),
    ),
    "python": Family(
        "tests.teachers.own_teacher:make_own_teacher",
        "cls",
        "block",
        ("teacher.library=python", "teacher.weights=null"),
    ),
}
