"""Which students can be a ViTModel, and what is said of the others."""

import pytest
import timm
import torch

from cmtmae_scale.config.schema import Config
from cmtmae_scale.errors import ConfigError
from cmtmae_scale.export.hugging_face import vit_config
from cmtmae_scale.method.student import Student, build_student


def student(arch: str, size: int = 224) -> Student:
    config = Config()
    config.student.arch, config.views.size = arch, size
    with torch.device("meta"):
        return build_student(config)


@pytest.mark.parametrize(
    ("arch", "width", "depth", "heads", "patch"),
    [
        ("vit_base_patch16_224", 768, 12, 12, 16),
        ("vit_large_patch16_224", 1024, 24, 16, 16),
        ("vit_huge_patch14_224", 1280, 32, 16, 14),
        ("deit_small_patch16_224", 384, 12, 6, 16),
    ],
)
def test_plain_students_are_vit_models(
    arch: str, width: int, depth: int, heads: int, patch: int
) -> None:
    transformers = pytest.importorskip("transformers")
    found = vit_config(student(arch), arch)
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size")
    assert tuple(found[key] for key in keys) == (width, depth, heads, patch)
    assert (found["layer_norm_eps"], found["hidden_act"]) == (1e-6, "gelu")
    theirs = transformers.ViTConfig(**{k: v for k, v in found.items() if k != "model_type"})
    with torch.device("meta"):
        model = transformers.ViTModel(theirs, add_pooling_layer=False)
        own = timm.create_model(arch, num_classes=0)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in own.parameters())


@pytest.mark.parametrize(
    ("arch", "size", "what"),
    [
        ("vit_small_patch14_dinov2", 224, "it has layer scale; export it with export.py timm"),
        (
            "vit_small_patch14_reg4_dinov2",
            224,
            "it has 4 registers, a class token without position, layer scale",
        ),
        ("vit_giant_patch14_dinov2", 224, "layer scale, an MLP of another kind"),
        (
            "vit_base_patch16_clip_224",
            224,
            "a patch embedding without bias, a norm before the blocks; export",
        ),
        ("vit_base_patch16_clip_quickgelu_224", 224, "an activation other than GELU"),
        ("vit_base_patch16_siglip_224", 224, "it has no class token"),
        ("vit_base_patch16_rpn_224", 224, "it has no class token, blocks of another kind"),
    ],
)
def test_what_a_vit_model_lacks_is_named(arch: str, size: int, what: str) -> None:
    with pytest.raises(ConfigError) as error:
        vit_config(student(arch, size), arch)
    start = f"student.arch={arch} is no ViTModel of transformers: it has "
    assert str(error.value).startswith(start)
    assert what in str(error.value)
