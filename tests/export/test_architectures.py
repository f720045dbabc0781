"""Students of other shapes, which of them can be a ViTModel, and why the others cannot."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from cmtmae_scale.checkpoint.chunks import HostChunk, write_chunks
from cmtmae_scale.checkpoint.index import INDEX, rank_file
from cmtmae_scale.checkpoint.layout import STATE
from cmtmae_scale.checkpoint.shards import build_index, describe_shard
from cmtmae_scale.config.schema import Config
from cmtmae_scale.errors import ConfigError
from cmtmae_scale.export.hugging_face import (
    check_hf,
    hf_snippet,
    model_config,
    vit_config,
    write_hf,
)
from cmtmae_scale.export.origin import Origin
from cmtmae_scale.export.timm_folder import check_timm, write_timm
from cmtmae_scale.method.build import build_student
from cmtmae_scale.method.initialisation import initialise
from cmtmae_scale.method.student import Student


def student(arch: str, size: int = 224) -> Student:
    config = Config()
    config.student.arch, config.views.image_size = arch, size
    with torch.device("meta"):
        return build_student(config)


def saved(
    folder: Path, arch: str, size: int, patch: int, seed: int = 1, **sizes: int | None
) -> Origin:
    """A checkpoint's weights of a student that differs in every value from its initialisation."""
    config = Config()
    config.student.arch, config.student.patch_size, config.views.image_size = arch, patch, size
    for name, value in sizes.items():
        setattr(config.student, name, value)
    model = build_student(config)
    initialise(model, 0)
    generator = torch.Generator().manual_seed(seed)
    chunks = [
        HostChunk(
            f"model.encoder.{name}",
            0,
            tuple(value.shape),
            (value + 0.1 * torch.randn(value.shape, generator=generator)).flatten(),
        )
        for name, value in model.state_dict().items()
    ]
    shapes = {chunk.key: chunk.shape for chunk in chunks}
    facts = write_chunks(chunks, folder / rank_file(0))
    index = build_index({0: describe_shard(facts, chunks, shapes)}, shapes)
    (folder / INDEX).write_text(json.dumps(index))
    (folder / STATE).write_text("{}")
    return Origin(folder, {}, config, "student")


def noise(size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, 256, (2, size, size, 3), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("arch", "size", "patch"),
    [
        ("test_vit", 56, 14),
        ("test_vit2", 64, 16),  # registers, layer scale, mean of patches
        ("test_vit3", 64, 16),  # no class token, pools registers too
        ("vit_tiny_patch16_224", 48, 16),
    ],
)
def test_timm_computes_students_of_any_shape(
    arch: str, size: int, patch: int, tmp_path: Path
) -> None:
    origin = saved(tmp_path, arch, size, patch)
    (tmp_path / "x").mkdir()
    write_timm(tmp_path / "x", origin)
    assert check_timm(tmp_path / "x", origin, noise(size)).difference < 1e-4


@pytest.mark.filterwarnings("ignore:Using a slow image processor")
@pytest.mark.parametrize(("arch", "patch"), [("test_vit", 14), ("vit_tiny_patch16_224", 7)])
def test_transformers_computes_students_of_any_patch(arch: str, patch: int, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    origin = saved(tmp_path, arch, 56, patch)
    (tmp_path / "x").mkdir()
    write_hf(tmp_path / "x", origin)
    assert check_hf(tmp_path / "x", origin, noise(56)).difference < 1e-4


@pytest.mark.filterwarnings("ignore:Using a slow image processor")
@pytest.mark.parametrize(
    ("arch", "gated", "biased"),
    [("vit_small_patch16_dinov3_qkvb", False, True), ("vit_7b_patch16_dinov3", True, False)],
)
def test_transformers_computes_dinov3_students(
    arch: str, gated: bool, biased: bool, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    origin = saved(tmp_path, arch, 56, 14, width=32, depth=2, heads=2)
    (tmp_path / "x").mkdir()
    write_hf(tmp_path / "x", origin)
    assert check_hf(tmp_path / "x", origin, noise(56)).difference < 1e-4
    found = json.loads((tmp_path / "x" / "config.json").read_text())
    assert (found["use_gated_mlp"], found["query_bias"]) == (gated, biased)
    names: dict[str, Any] = {}
    exec(hf_snippet(origin, None).replace("FOLDER", str(tmp_path / "x")), names)
    assert type(names["model"]).__name__ == "DINOv3ViTModel"
    if not hasattr(transformers, "DINOv3ViTBackbone"):
        return
    backbone: Any = transformers.DINOv3ViTBackbone.from_pretrained(tmp_path / "x").eval()
    for size in (56, 84):  # rotary positions have no grid
        pixels = torch.randn(1, 3, size, size, generator=torch.manual_seed(0))
        origin.config.views.image_size = size
        with torch.no_grad():
            tokens = origin.encoder()(pixels)[:, 5:]
            (maps,) = backbone(pixels).feature_maps
        expected = tokens.mT.unflatten(2, (size // 14, size // 14))
        torch.testing.assert_close(maps, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("arch", "what"),
    [
        (
            "eva02_base_patch14_224",
            "absolute positions, rotary positions of another kind (RotaryEmbeddingCat), no "
            "registers, no layer scale, queries, keys and values of separate matrices, a norm "
            "within the MLP; export it with cmtmae export timm",
        ),
        (
            "vit_pe_core_base_patch16_224",
            "a norm before the blocks, a patch embedding without bias",
        ),
        ("vit_medium_patch16_rope_reg1_gap_256", "(RotaryEmbeddingCat), no class token; export"),
        ("vit_base_patch16_rope_mixed_224", "(RotaryEmbeddingMixed), no registers"),
    ],
)
def test_what_a_dinov3_model_lacks_is_named(arch: str, what: str) -> None:
    config = Config()
    config.student.arch, config.student.depth = arch, 1
    with pytest.raises(ConfigError) as error:
        model_config(config)
    start = f"student.arch={arch} is not a DINOv3ViTModel of transformers: it has "
    assert str(error.value).startswith(start)
    assert what in str(error.value)


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
        ("vit_small_patch14_dinov2", 224, "it has layer scale; export it with cmtmae export timm"),
        (
            "vit_small_patch14_reg4_dinov2",
            224,
            "it has 4 registers, a class token without positional embedding, layer scale",
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
    start = f"student.arch={arch} is not a ViTModel of transformers: it has "
    assert str(error.value).startswith(start)
    assert what in str(error.value)
