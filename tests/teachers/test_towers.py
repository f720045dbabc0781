"""Rotary transformers, networks without attention and modules of one's own as teachers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from cmtmae_scale.config.schema import Config
from cmtmae_scale.errors import TeacherError
from cmtmae_scale.teachers.build import build_teacher_skeleton
from cmtmae_scale.teachers.online import OnlineTeacher
from tests.teachers import (
    families,  # noqa: F401 - registers the small networks with timm
    own_teacher,
)
from tests.teachers.cases import BOTH, build, prob, random_images, refusal, timm_config
from tests.teachers.test_timm import normalised

OWN = "tests.teachers.own_teacher"


def config_of(model: str, source: str, feature: str = "block", **teacher: Any) -> Config:
    """A student with a grid of 4 x 4, and a teacher."""
    config = timm_config(model, 64, 16, feature=feature, **teacher)
    config.attention.source = source  # pyright: ignore[reportAttributeAccessIssue]
    return config


def perturb(teacher: OnlineTeacher) -> None:
    """Give every tensor random values, so that no part of the network is an identity."""
    generator = torch.Generator().manual_seed(3)
    for parameter in teacher.model.parameters():
        parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def rotated(x: Tensor, table: Tensor, half: bool) -> Tensor:
    """Rotate each pair of channels by its angle, pair by pair."""
    sine, cosine = table.chunk(2, dim=-1)
    count, out = x.shape[-1] // 2, torch.empty_like(x)
    for pair in range(count):
        a, b = (pair, pair + count) if half else (2 * pair, 2 * pair + 1)
        out[..., a] = x[..., a] * cosine[..., a] - x[..., b] * sine[..., a]
        out[..., b] = x[..., b] * cosine[..., b] + x[..., a] * sine[..., b]
    return out


@torch.no_grad()
def explicit_matrix(attention: Any, x: Tensor, rope: Tensor | None) -> Tensor:
    """Head-mean attention ``[B, T, T]`` written out; it must rebuild the module's own output."""
    heads = attention.num_heads
    if attention.qkv is None:
        parts = [attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)]
    else:
        flat = attention.qkv(x)
        if getattr(attention, "q_bias", None) is not None:
            flat = flat + torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
        parts = list(flat.chunk(3, dim=-1))
    query, key, value = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in parts)
    query, key = attention.q_norm(query), attention.k_norm(key)
    if rope is not None:
        prefix = attention.num_prefix_tokens
        for each in (query, key):
            each[:, :, prefix:] = rotated(each[:, :, prefix:], rope, attention.rotate_half)
    matrix = (query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5).softmax(-1)
    mixed = attention.proj(attention.norm((matrix @ value).transpose(1, 2).flatten(2)))
    torch.testing.assert_close(mixed, attention(x, rope=rope), atol=1e-5, rtol=1e-4)
    return matrix.mean(1)


@torch.no_grad()
def own_forward(teacher: OnlineTeacher, images: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Tokens of timm's own forward of a second model, and its last attention written out."""
    name = str(teacher.tower.source["model"])
    model = timm.create_model(name, num_classes=0, **options).eval()
    model.load_state_dict(teacher.model.state_dict())
    caught: list[Any] = []
    last = model.blocks[-1].attn
    last.register_forward_pre_hook(
        lambda _, args, kwargs: caught.append((args[0], kwargs["rope"])), with_kwargs=True
    )
    tokens = model.forward_features(normalised(images, teacher))
    x, rope = caught[0]
    last._forward_pre_hooks.clear()
    return tokens, explicit_matrix(last, x, rope)


@pytest.mark.parametrize(
    ("name", "source", "feature", "size", "options"),
    [
        ("small_dinov3", "cls", "ln_post", 64, {}),  # timm's own: any size per forward
        ("small_eva02", "mean_query", "block", 56, {"img_size": 56}),
        ("small_pe", "cls", "ln_post", 64, {"img_size": 64}),
        ("small_mixed_rope", "cls", "ln_post", 64, {"img_size": 64}),
        ("small_post_norm", "mean_query", "ln_post", 56, {"img_size": 56}),
    ],
)
def test_rotary_transformers_equal_timms_own_forward(
    name: str, source: str, feature: str, size: int, options: dict[str, Any]
) -> None:
    teacher = build(config_of(name, source, feature))
    assert teacher.image_size == size and teacher.grid == teacher.tower.grid == (4, 4)
    perturb(teacher)
    images = random_images(2, size)
    view = teacher(images)
    assert view.attention is not None and view.features is not None
    tokens, matrix = own_forward(teacher, images, **options)
    prefix = teacher.tower.num_prefix
    expected = torch.cat([tokens[:, :1], tokens[:, prefix:]], 1)
    torch.testing.assert_close(view.features, expected, atol=1e-5, rtol=1e-5)
    rows = matrix[:, 0] if source == "cls" else matrix[:, prefix:].mean(1)
    torch.testing.assert_close(view.attention, prob(rows[:, prefix:]), atol=1e-6, rtol=1e-5)


def test_pes_pool_map_is_its_pooling_heads_own_attention() -> None:
    teacher = build(config_of("small_pe", "pool", "ln_post"))
    perturb(teacher)
    images = random_images(2, 64)
    view = teacher(images)
    assert view.attention is not None and view.features is not None
    model: Any = teacher.model
    pool, tokens = model.attn_pool, view.features
    with torch.no_grad():
        query = pool.q(pool.latent).reshape(1, 1, 8, 4).transpose(1, 2)
        key, value = pool.kv(tokens).reshape(2, 17, 2, 8, 4).permute(2, 0, 3, 1, 4)
        rows = (query @ key.transpose(-2, -1) * 4**-0.5).softmax(-1)
        mixed = pool.proj((rows @ value).transpose(1, 2).reshape(2, 1, 32))
        rebuilt = (mixed + pool.mlp(pool.norm(mixed)))[:, 0]
        pooled = model.forward_head(model.forward_features(normalised(images, teacher)))
    torch.testing.assert_close(rebuilt, pooled, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(view.attention, prob(rows.mean(1)[:, 0, 1:]), atol=1e-6, rtol=1e-5)


def test_stages_that_are_cut_off_may_have_a_single_patch() -> None:
    """A batch norm in training refuses one value per channel, in eval mode it does not."""
    teacher = build(config_of("test_resnet", "activation_norm", depth=3))
    assert (teacher.image_size, teacher.grid) == (32, (4, 4))
    view = teacher(random_images(2, 32))
    assert view.features is not None and view.features.shape[:2] == (2, 16)


@pytest.mark.parametrize("depth", [None, 3])
def test_a_network_without_attention_gives_a_stage_and_its_norm(depth: int | None) -> None:
    teacher = build(config_of("small_convnext", "activation_norm", depth=depth))
    assert teacher.image_size == (128 if depth is None else 64)
    assert teacher.grid == teacher.tower.grid == (4, 4) and not teacher.has_cls
    images = random_images(2, teacher.image_size)
    view = teacher(images)
    assert view.attention is not None and view.features is not None
    model = timm.create_model("small_convnext").eval()
    model.load_state_dict(teacher.model.state_dict(), strict=False)
    with torch.no_grad():
        stages = model.forward_intermediates(normalised(images, teacher), intermediates_only=True)
    stage = stages[-1 if depth is None else depth - 1]
    torch.testing.assert_close(
        view.features, stage.flatten(2).transpose(1, 2), atol=1e-5, rtol=1e-5
    )
    norms = stage.square().sum(1).sqrt().flatten(1)
    torch.testing.assert_close(view.attention, prob(norms), atol=1e-6, rtol=1e-5)


def test_the_activation_norm_of_a_transformer_is_that_of_its_blocks() -> None:
    config = config_of("small_dinov3", "activation_norm")
    config.attention.layers = [0, 1]
    config.target.teacher.layers = [0, 1]
    attention = build(config)(images := random_images(2, 64)).attention
    maps = []
    for layer in (0, 1):
        config.attention.layers = config.target.teacher.layers = [layer]
        features = build(config)(images).features
        assert features is not None
        maps.append(prob(features[:, 1:].square().sum(-1).sqrt()))
    assert attention is not None
    torch.testing.assert_close(attention, (maps[0] + maps[1]) / 2, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "source", "feature"),
    [("small_dinov3", "cls", "ln_post"), ("small_convnext", "activation_norm", "block")],
)
def test_a_published_file_is_loaded_without_its_classifier(
    name: str, source: str, feature: str, tmp_path: Path
) -> None:
    torch.manual_seed(5)
    options = {"dynamic_img_size": False} if "dino" in name else {}
    model = timm.create_model(name, num_classes=7, **options)
    path = tmp_path / "w.safetensors"
    save_file(model.state_dict(), path)
    teacher = build(config_of(name, source, feature, weights=str(path)))
    own, published = teacher.model.state_dict(), model.state_dict()
    body = [key for key in own if not key.startswith("head.")]
    assert body and all(torch.equal(own[key], published[key]) for key in body)
    torch.save({k: v for k, v in published.items() if k != body[3]}, tmp_path / "w.pt")
    text = refusal(config_of(name, source, feature, weights=str(tmp_path / "w.pt")))
    assert f"1 missing ({body[3]})" in text


def test_a_skeleton_on_meta_allocates_nothing() -> None:
    for config in (
        config_of("small_dinov3", "cls", "ln_post", weights="lvd1689m.pt"),
        config_of("small_convnext", "activation_norm", weights="random", depth=3),
        own_config("make_own_teacher"),
    ):
        with torch.device("meta"):
            teacher = build_teacher_skeleton(config, BOTH)
            view = teacher(torch.zeros(1, teacher.image_size, teacher.image_size, 3).byte())
        assert view.features is not None and view.features.is_meta
        assert all(p.is_meta for p in teacher.model.parameters())


def own_config(factory: str, source: str = "cls", **teacher: Any) -> Config:
    settings: dict[str, Any] = {"library": "python", "weights": None}
    return config_of(f"{OWN}:{factory}", source, **(settings | teacher))


def test_a_module_of_ones_own_gives_its_tokens_and_its_rows() -> None:
    teacher = build(own_config("make_own_teacher"))
    images = random_images(2, 64)
    view = teacher(images)
    assert view.attention is not None and view.features is not None
    with torch.no_grad():
        tokens, query, key = teacher.model(normalised(images, teacher))
    torch.testing.assert_close(view.features, tokens, atol=1e-5, rtol=1e-5)
    rows = (query @ key.transpose(-2, -1) / 12**0.5).softmax(-1).mean(1)[:, 0, 1:]
    torch.testing.assert_close(view.attention, prob(rows), atol=1e-6, rtol=1e-5)
    norms = build(own_config("FeaturesOnly", "activation_norm"))(images)
    assert norms.features is not None and norms.attention is not None
    expected = prob(norms.features.square().sum(-1).sqrt())
    torch.testing.assert_close(norms.attention, expected, atol=1e-6, rtol=1e-5)


def test_a_changed_factory_or_weights_gives_another_fingerprint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = Path(own_teacher.__file__).read_text()
    monkeypatch.chdir(tmp_path)
    found = []
    for package, text in (
        ("first", code),
        ("second", code + "\n# changed\n"),
        ("third", code.replace("torch.randn", "torch.zeros")),
    ):
        (tmp_path / f"my_{package}.py").write_text(text)
        config = own_config("x")
        config.teacher.model = f"my_{package}:make_own_teacher"
        found.append(build(config).fingerprint())
    first, second, third = found
    assert first["state_sha256"] == second["state_sha256"] != third["state_sha256"]
    assert len({str(each["factory_sha256"]) for each in found}) == 3
    again = build(own_config("make_own_teacher")).fingerprint()
    assert again == build(own_config("make_own_teacher")).fingerprint()
    config = own_config("make_own_teacher")
    config.run.seed = 1
    assert build(config).fingerprint()["state_sha256"] != again["state_sha256"]
    torch.manual_seed(0)
    torch.save(own_teacher.OwnTeacher().state_dict(), "w.pt")
    of_file = build(own_config("make_own_teacher", weights="w.pt"))
    assert of_file.fingerprint()["weights_sha256"] and not of_file.fingerprint()["state_sha256"]
    with torch.device("meta"):
        skeleton = build_teacher_skeleton(own_config("make_own_teacher", weights="w.pt"), BOTH)
    assert skeleton.to("meta", torch.float32).fingerprint() == of_file.fingerprint()


@pytest.mark.parametrize(
    ("factory", "changes", "said"),
    [
        ("make_own_teacher", {"weights": "random"}, "teacher.weights=random is not a file"),
        ("make_own_teacher", {"depth": 1}, "teacher.depth=1 does not apply to"),
        ("make_own_teacher", {"precision": "fp8"}, "teacher.precision=fp8 does not apply to"),
        ("make_own_teacher", {"model": "mine"}, "is not of the form package.module:factory"),
        ("make_own_teacher", {"model": "absent_module:f"}, "absent_module cannot be imported"),
        ("make_own_teacher", {"feature": "proj"}, "set teacher.feature=block"),
        ("make_own_teacher", {"source": "pool"}, "set attention.source=cls or activation_norm"),
        ("FeaturesOnly", {}, "attention_source=None; set attention.source=activation_norm"),
        ("absent", {}, "absent in tests.teachers.own_teacher is nothing, no function"),
        ("fails", {}, "the factory failed (OSError: no weights)"),
        ("no_module", {}, "the factory returned a int, no nn.Module"),
    ],
)
def test_what_is_no_teacher_is_refused(factory: str, changes: dict[str, Any], said: str) -> None:
    config = own_config(factory)
    for name, value in changes.items():
        setattr(config.attention if name == "source" else config.teacher, name, value)
    assert said in refusal(config)


def test_a_factory_returns_a_new_module_at_each_call() -> None:
    """A module that was counted on the meta device has no weights."""
    config = own_config("kept", "activation_norm")
    with torch.device("meta"):
        build_teacher_skeleton(config, BOTH)
    assert "return a new module at each call" in refusal(config)


def test_an_output_of_another_form_is_named() -> None:
    teacher = build(own_config("WrongShape", "activation_norm"))
    with pytest.raises(TeacherError, match=r"tokens of shape \[1, 16, 24\]; .* \[1, 16, 32\]"):
        teacher(random_images(1, 64))
    teacher = build(own_config("WrongSource", "mean_query"))
    with pytest.raises(TeacherError, match=r"returned a Tensor; .* tokens, query and key"):
        teacher(random_images(1, 64))


def test_queries_of_other_tokens_are_refused() -> None:
    """Their mean is a map of the right shape, and another one."""
    with pytest.raises(TeacherError, match=r"query of shape \[2, 2, 17, 12\]; .* \[2, 2, 1, 12\]"):
        build(own_config("AllQueries"))(random_images(2, 64))
    with pytest.raises(TeacherError, match=r"query of shape .*17, 12\]; .* \[2, 2, 16, 12\]"):
        build(own_config("AllQueriesOfPatches", "mean_query"))(random_images(2, 64))


def test_a_query_of_another_form_and_a_forward_that_reads_values_are_named() -> None:
    with pytest.raises(TeacherError, match=r"query of shape \[1, 24\]; expected four"):
        build(own_config("FlatQuery"))(random_images(1, 64))
    with torch.device("meta"):
        skeleton = build_teacher_skeleton(own_config("ReadsValues", "activation_norm"), BOTH)
        with pytest.raises(TeacherError, match="its forward failed on the meta device"):
            skeleton(torch.zeros(1, 64, 64, 3).byte())


def test_an_attribute_of_another_kind_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_teacher.OwnTeacher, "patch_size", "16")
    assert "its patch_size is '16'; expected a whole number" in refusal(own_config("OwnTeacher"))


@pytest.mark.parametrize(
    ("attribute", "value", "expected"),
    [
        ("std", (0.0, 0.0, 0.0), "three numbers above 0"),
        ("std", (0.5, 0.5, float("inf")), "three numbers above 0"),
        ("mean", ("a", "b", "c"), "three numbers"),
    ],
)
def test_pixels_that_cannot_be_normalised_are_named(
    monkeypatch: pytest.MonkeyPatch, attribute: str, value: Any, expected: str
) -> None:
    monkeypatch.setattr(own_teacher.OwnTeacher, attribute, value)
    wanted = f"its {attribute} is {value}; expected {expected}"
    assert refusal(own_config("OwnTeacher")).endswith(wanted)


def test_pixels_in_numbers_of_numpy_have_a_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = build(own_config("OwnTeacher")).fingerprint()
    monkeypatch.setattr(own_teacher.OwnTeacher, "mean", (np.float32(0.5),) * 3)
    monkeypatch.setattr(own_teacher.OwnTeacher, "std", (np.float32(0.5),) * 3)
    found = json.loads(json.dumps(build(own_config("OwnTeacher")).fingerprint()))
    assert (found["mean"], found["std"]) == (expected["mean"], expected["std"])


def test_networks_that_give_no_grid_or_no_such_map_are_refused() -> None:
    assert "set attention.source=activation_norm" in refusal(config_of("small_convnext", "cls"))
    assert "set teacher.feature=block" in refusal(
        config_of("small_convnext", "activation_norm", "ln_post")
    )
    assert "has 4 stages" in refusal(config_of("small_convnext", "activation_norm", depth=5))
    mixer = config_of("small_mixer", "activation_norm")
    assert "MlpMixer does not run at 128 pixels" in refusal(mixer)
