import re
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from cmtmae_scale.config.needs import Needs
from cmtmae_scale.errors import ConfigError, TeacherError
from cmtmae_scale.evaluation.encoders import encoder_from_tower
from cmtmae_scale.teachers.base import TeacherOutputs
from cmtmae_scale.teachers.build import build_teacher, build_teacher_skeleton
from cmtmae_scale.teachers.online import OnlineTeacher
from cmtmae_scale.teachers.timm import TimmSource
from cmtmae_scale.teachers.timm_towers import TimmTower
from cmtmae_scale.teachers.weights import describe_unreachable
from tests.teachers.cases import (
    BOTH,
    build,
    prob,
    random_images,
    real_teacher,
    refusal,
    timm_config,
)


def normalised(images: Tensor, teacher: OnlineTeacher) -> Tensor:
    pixels = images.permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(teacher.mean).view(3, 1, 1)) / torch.tensor(teacher.std).view(
        3, 1, 1
    )


@torch.no_grad()
def explicit_attention(attention: Any, tokens: Tensor) -> Tensor:
    """Head-mean attention matrix ``[B, T, T]``, written out."""
    batch, count, _ = tokens.shape
    qkv = attention.qkv(tokens).reshape(batch, count, 3, attention.num_heads, -1)
    query, key = (
        norm(qkv[:, :, part].transpose(1, 2))
        for part, norm in ((0, attention.q_norm), (1, attention.k_norm))
    )
    return (query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5).softmax(-1).mean(1)


@torch.no_grad()
def last_attention(model: Any, pixels: Tensor) -> Tensor:
    """The last block's attention matrix, its input caught by a hook in the model's own forward."""
    caught: list[Tensor] = []
    handle = model.blocks[-1].norm1.register_forward_hook(lambda *x: caught.append(x[-1]))
    model.forward_features(pixels)
    handle.remove()
    return explicit_attention(model.blocks[-1].attn, caught[0])


def small(**options: Any) -> Any:
    """A small model of the kind that ``options`` ask for, with its pooling head perturbed."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 4,
        "num_classes": 0,
    }
    model = timm.models.VisionTransformer(**(settings | options)).eval()
    model.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 or "gamma" in name or "reg" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def teacher_of(model: Any, source: str, feature: str = "ln_post") -> OnlineTeacher:
    depth = len(model.blocks)
    outputs = TeacherOutputs(source, (depth - 1,), feature, (depth - 1,))
    return OnlineTeacher(TimmTower(model, "small", {"library": "timm"}), outputs, 32, (4, 4))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reg_tokens": 4, "no_embed_class": True, "init_values": 0.5},
        {"qk_norm": True, "qkv_bias": False},
        {"pre_norm": True, "dynamic_img_size": True},
    ],
    ids=["plain", "registers", "qk_norm", "pre_norm"],
)
def test_equals_the_models_own_forward(options: dict[str, Any]) -> None:
    model = small(**options)
    teacher = teacher_of(model, "cls")
    images = random_images(2, 32)
    pixels = normalised(images, teacher)
    view = teacher(images)
    assert view.attention is not None and view.features is not None
    with torch.no_grad():
        tokens = model.forward_features(pixels)
    prefix = model.num_prefix_tokens
    expected = torch.cat([tokens[:, :1], tokens[:, prefix:]], 1)
    torch.testing.assert_close(view.features, expected, atol=1e-5, rtol=1e-5)
    rows = last_attention(model, pixels)[:, 0, prefix:]
    torch.testing.assert_close(view.attention, prob(rows), atol=1e-6, rtol=1e-5)


def test_pool_map_is_the_pooling_heads_own_attention() -> None:
    model = small(class_token=False, global_pool="map", reg_tokens=1)
    teacher = teacher_of(model, "pool")
    images = random_images(2, 32)
    view = teacher(images)
    assert view.attention is not None and view.features is not None
    assert not teacher.has_cls and view.features.shape == (2, 16, 32)
    tokens, pool = view.features, model.attn_pool
    with torch.no_grad():
        # the value path with a map of one head at a time must rebuild the pooled output
        query = pool.q(pool.latent).reshape(1, 1, 4, 8).transpose(1, 2)
        key, value = pool.kv(tokens).reshape(2, 16, 2, 4, 8).permute(2, 0, 3, 1, 4)
        rows = (query @ key.transpose(-2, -1) * 8**-0.5).softmax(-1)
        mixed = pool.proj((rows @ value).transpose(1, 2).reshape(2, 1, 32))
        rebuilt = (mixed + pool.mlp(pool.norm(mixed)))[:, 0]
        pooled = model.forward_head(model.forward_features(normalised(images, teacher)))
    torch.testing.assert_close(rebuilt, pooled, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(view.attention, rows.mean(1)[:, 0], atol=1e-6, rtol=1e-5)


def test_mean_query_is_the_column_mean_over_patches() -> None:
    model = small(class_token=False, global_pool="avg", fc_norm=False)
    teacher = teacher_of(model, "mean_query")
    images = random_images(2, 32)
    attention = teacher(images).attention
    matrix = last_attention(model, normalised(images, teacher))
    assert attention is not None
    torch.testing.assert_close(attention, matrix.mean(1), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "source", "feature", "said"),
    [
        ({"class_token": False, "global_pool": "map"}, "cls", "ln_post", "use pool"),
        ({"class_token": False, "global_pool": "avg"}, "cls", "block", "use mean_query"),
        ({}, "pool", "ln_post", "attention.source=pool: .* use cls"),
        ({}, "cls", "proj", "set teacher.feature=ln_post"),
        ({"global_pool": "avg"}, "cls", "ln_post", "set teacher.feature=block"),
        (
            {"block_fn": timm.models.vision_transformer.ParallelScalingBlock},
            "cls",
            "ln_post",
            "attention.source=cls: .*is not supported",
        ),
    ],
)
def test_maps_and_features_that_a_model_lacks_are_refused(
    options: dict[str, Any], source: str, feature: str, said: str
) -> None:
    with pytest.raises(TeacherError, match=said):
        teacher_of(small(**options), source, feature)


def test_size_and_pixels_come_from_student_and_model() -> None:
    teacher = build(timm_config("vit_tiny_patch16_224", 64, 16, depth=1))
    assert teacher.image_size == 64 and teacher.grid == (4, 4) and teacher.width == 192
    assert teacher.mean == (0.5, 0.5, 0.5)
    dino = timm_config("vit_small_patch14_dinov2", 32, 8, depth=1)
    dino.student.patch_size, dino.student.arch, dino.views.image_size = (
        None,
        "vit_tiny_patch16_224",
        64,
    )
    teacher = build(dino)
    assert teacher.image_size == 56 and teacher.mean == (0.485, 0.456, 0.406)


def test_proj_default_does_not_matter_without_features() -> None:
    config = timm_config("vit_tiny_patch16_224", 64, 16, depth=1, feature="proj")
    teacher = build(config, Needs(True, False, False, False, False))
    assert teacher(random_images(1, 64)).features is None
    assert "teacher.feature=proj" in refusal(config)


def test_a_local_file_is_loaded_with_resampled_positions(tmp_path: Path) -> None:
    torch.manual_seed(5)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=7).eval()
    path = tmp_path / "w.safetensors"
    save_file({f"module.{name}": value for name, value in model.state_dict().items()}, path)
    teacher = build(timm_config("vit_tiny_patch16_224", 64, 16, weights=str(path), depth=2))
    own: dict[str, Tensor] = teacher.model.state_dict()
    expected = resample_abs_pos_embed(
        model.state_dict()["pos_embed"], new_size=[4, 4], old_size=[14, 14], num_prefix_tokens=1
    )
    assert torch.equal(own["pos_embed"], expected)
    assert torch.equal(
        own["blocks.1.mlp.fc1.weight"], model.state_dict()["blocks.1.mlp.fc1.weight"]
    )
    finger = teacher.fingerprint()
    assert finger["weights"] == "w.safetensors" and len(str(finger["weights_sha256"])) == 64
    assert finger["depth"] == 2 and finger["library"] == "timm"
    assert finger["library_version"] == timm.__version__


def test_files_and_names_that_do_not_fit_are_named(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    state = dict(timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict())
    config = timm_config("vit_tiny_patch16_224", 64, 16, weights=str(path))
    torch.save({k: v for k, v in state.items() if k != "norm.bias"}, path)
    assert "1 missing (norm.bias)" in refusal(config)
    torch.save(state | {"patch_embed.proj.weight": torch.zeros(192, 3, 8, 8)}, path)
    assert "[192, 3, 8, 8] instead of [192, 3, 16, 16]" in refusal(config)
    torch.save({k: v for k, v in state.items() if not k.startswith("blocks.11.")}, path)
    text = refusal(config)
    assert "12 missing" in text and "teacher.depth" in text
    torch.save(state, path)
    assert "teacher.depth=13" in refusal(
        timm_config("vit_tiny_patch16_224", 64, 16, weights=str(path), depth=13)
    )
    config = timm_config("test_convnext", 64, 32, weights=str(path), feature="block")
    config.attention.source = "activation_norm"
    assert "does not fit teacher.model=test_convnext" in refusal(config)
    assert "did you mean" in refusal(timm_config("vit_tinny_patch16_224"))
    assert "(ResNet) has no attention over all patches" in refusal(timm_config("resnet18"))
    text = refusal(timm_config("vit_small_patch14_dinov2", weights="nope"))
    assert "neither a file nor a tag" in text and "lvd142m" in text
    both = timm_config("vit_small_patch16_224.dino", weights="augreg_in1k")
    assert "drop one" in refusal(both)
    config = timm_config("vit_tiny_patch16_224", 30, 8)
    with pytest.raises(ConfigError, match=r"views\.image_size=30"):
        build_teacher(config, "cpu", torch.float32, BOTH)
    config = timm_config("vit_tiny_patch16_224", 64, 16)
    config.attention.source, config.attention.layers = "pool", [-2]
    assert "attention.layers=[-2]" in refusal(config)


def test_quick_gelu_is_compared_with_the_model() -> None:
    name = "vit_base_patch16_clip_224"
    assert "clip_quickgelu" in refusal(timm_config(name, weights="openai"))
    text = refusal(timm_config(name, quick_gelu=True))
    assert "teacher.quick_gelu=true" in text and "without QuickGELU" in text
    text = refusal(timm_config("vit_base_patch16_clip_quickgelu_224", quick_gelu=False))
    assert "with QuickGELU" in text
    for model, tag in (  # tags of which timm has the model with QuickGELU too
        ("vit_base_patch32_clip_224", "laion400m_e32"),
        ("vit_huge_patch14_clip_224", "metaclip2_worldwide"),
    ):
        config = timm_config(model, weights=tag)
        assert f"{tag} were trained with QuickGELU" in refusal(config)
        config.teacher.quick_gelu = False
        assert not TimmSource(config.teacher).quick_gelu
    for tag in ("openai_ft_in1k", "laion400m_e32"):
        assert not TimmSource(timm_config(name, weights=tag).teacher).quick_gelu


def test_a_file_of_clip_weights_needs_its_activation() -> None:
    """Loaded with the other activation, features are wrong and every check passes."""
    name = "vit_base_patch16_clip_224"
    text = refusal(timm_config(name, weights="clip.safetensors"))
    assert text.startswith("teacher.weights=clip.safetensors: a file of CLIP weights does not")
    assert "teacher.model=vit_base_patch16_clip_quickgelu_224 for those of OpenAI" in text
    for model, given in (
        (name, False),
        (f"{name}.laion2b", None),
        ("vit_base_patch16_clip_quickgelu_224", None),
        ("vit_tiny_patch16_224", None),
    ):
        config = timm_config(model, weights="clip.safetensors", quick_gelu=given)
        assert TimmSource(config.teacher).quick_gelu == ("quickgelu" in model)


def test_the_remedy_for_an_unreachable_tag_works(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    text = refusal(timm_config("vit_tiny_patch16_224", 32, 16, weights="augreg_in21k"))
    assert "teacher.weights=augreg_in21k cannot be downloaded" in text
    found = re.search(
        r"run `hf download timm/vit_tiny_patch16_224\.augreg_in21k (\S+) --local-dir (\S+)`, "
        r"then set teacher\.weights=(\S+) teacher\.model=(\S+)$",
        text,
    )
    assert found is not None, text
    name, folder, weights, model = found.groups()
    Path(folder).mkdir(parents=True)  # as the command does
    published = timm.create_model("vit_tiny_patch16_224")  # with a classifier
    save_file(published.state_dict(), Path(folder, name))
    teacher = build_teacher(timm_config(model, 32, 16, weights=weights), "cpu", torch.float32, BOTH)
    assert teacher.mean == (0.5, 0.5, 0.5)  # the tag's


def test_an_unreachable_address_names_the_download() -> None:
    address = "https://example.org/vit.pth"
    error = describe_unreachable("tag", OSError("no route"), repository="", url=address, files={})
    assert str(error) == (
        "teacher.weights=tag cannot be downloaded (OSError: no route); where there is internet, "
        f"run `wget --directory-prefix datasets/teachers {address}`, then set "
        "teacher.weights=datasets/teachers/vit.pth"
    )


def test_skeleton_on_meta_allocates_nothing() -> None:
    config = timm_config("vit_small_patch14_dinov2", weights="lvd142m")
    with torch.device("meta"):
        teacher = build_teacher_skeleton(config)
        images = torch.zeros(1, 56, 56, 3, dtype=torch.uint8)
        view = teacher(images)
    assert view.features is not None and view.features.shape == (1, 17, 384)
    assert all(p.is_meta for p in teacher.model.parameters())


def test_the_real_teacher_equals_timms_own_forward(tmp_path: Path) -> None:
    state, _ = real_teacher()
    path = tmp_path / "w.safetensors"
    save_file(state, path)
    config = timm_config("vit_small_patch14_dinov2", 64, 8, weights=str(path), depth=10)
    teacher = build(config)
    model = timm.create_model(
        "vit_small_patch14_dinov2", num_classes=0, img_size=112, depth=10
    ).eval()
    state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], [8, 8], num_prefix_tokens=1)
    model.load_state_dict(state)
    images = random_images(2, 112)
    view = teacher(images)
    assert view.features is not None and view.attention is not None
    pixels = normalised(images, teacher)
    with torch.no_grad():
        expected = model.forward_features(pixels)
    torch.testing.assert_close(view.features, expected, atol=1e-5, rtol=1e-4)
    rows = last_attention(model, pixels)[:, 0, 1:]
    torch.testing.assert_close(view.attention, prob(rows), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("pool", ["avg", "token"])
@torch.no_grad()
def test_evaluated_tokens_are_normed_also_where_the_model_norms_its_pooled_vector(
    pool: str,
) -> None:
    model = small(global_pool=pool)
    norm = model.fc_norm if pool == "avg" else model.norm
    torch.nn.init.uniform_(norm.weight, 0.5, 2.0)
    teacher, images = teacher_of(model, "cls", "block"), random_images(2, 32)
    encoder = encoder_from_tower("x", teacher.tower, 32, torch.device("cpu"))
    assert encoder.encode_tokens is not None
    tokens = encoder.encode_tokens(images)
    whole = model.blocks(model._pos_embed(model.patch_embed(normalised(images, teacher))))
    expected = torch.nn.functional.layer_norm(whole, (32,), norm.weight, norm.bias, norm.eps)
    torch.testing.assert_close(tokens.cls, expected[:, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tokens.patches, expected[:, 1:], rtol=1e-4, atol=1e-5)
