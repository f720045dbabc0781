"""The student is timm's model; these tests compare it with timm's own forward."""

import inspect
from inspect import signature
from typing import Any

import pytest
import timm
import torch
from timm.layers.attention import Attention
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from cmtmae_scale.config.schema import Config
from cmtmae_scale.errors import ConfigError
from cmtmae_scale.method.build import build_student
from cmtmae_scale.method.initialisation import fix_positions, initialise, sincos_positions
from cmtmae_scale.method.rotary import use_rotary
from cmtmae_scale.method.student import MomentumEncoder, RowAttention, Student, become, use_attend

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "qk_norm": {"qk_norm": True},
    "registers": {"reg_tokens": 3},
    "registers without position": {"reg_tokens": 2, "no_embed_class": True},
    "no bias, layer scale": {"qkv_bias": False, "init_values": 0.3},
    "norm before": {"pre_norm": True},
    "no class token": {"class_token": False, "reg_tokens": 1, "global_pool": ""},
}
ROTARY: dict[str, Any] = {"use_rot_pos_emb": True, "use_fc_norm": False}
EVAS: dict[str, dict[str, Any]] = {
    "DINOv3": {
        "use_abs_pos_emb": False,
        "rope_type": "dinov3",
        "rope_rotate_half": True,
        "rope_rescale_coords": 2.0,
        "num_reg_tokens": 4,
        "no_embed_class": True,
        "init_values": 0.3,
        "dynamic_img_size": True,
    },
    "EVA-02": {
        "qkv_fused": False,
        "swiglu_mlp": True,
        "scale_mlp": True,
        "ref_feat_shape": (3, 3),
        "rope_grid_offset": 1.0,
    },
    "mixed": {"rope_type": "mixed", "attn_type": "rope", "rope_grid_indexing": "xy"},
    "mean query": {
        "class_token": False,
        "num_reg_tokens": 1,
        "global_pool": "avg",
        "attn_type": "rope",
        "qk_norm": True,
        "rope_grid_indexing": "xy",
        "use_pre_transformer_norm": True,
    },
    "post norm": {"use_post_norm": True, "swiglu_mlp": True},
    "grouped": {"qkv_fused": False, "attn_type": "rope", "num_kv_heads": 2},
}
LATER_TIMM = inspect.signature(Eva).parameters.keys()
"""Arguments of the installed timm; an older one lacks some."""


def make_config(**changes: Any) -> Config:
    config = Config()
    config.student.arch = "test_vit"
    config.views.image_size = 64
    config.collaboration.alpha_attention = 0.5
    config.collaboration.alpha_target = 0.7
    for key, value in changes.items():
        *groups, name = key.split("__")
        group: Any = config
        for part in groups:
            group = getattr(group, part)
        setattr(group, name, value)
    return config


def make_timm(variant: str) -> Any:
    """Build timm's own model, with random weights."""
    torch.manual_seed(1)
    sizes: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "num_classes": 0}
    sizes |= {"depth": 3, "num_heads": 4}
    if variant in VARIANTS:
        model = VisionTransformer(**sizes, **VARIANTS[variant])
    else:
        given = {"global_pool": "token"} | ROTARY | EVAS[variant]
        if given.keys() - LATER_TIMM:
            pytest.skip(f"timm {timm.__version__} has no {sorted(given.keys() - LATER_TIMM)}")
        model = Eva(**sizes, **given)
    for parameter in model.parameters():  # biases and norms too
        nn.init.normal_(parameter, std=0.2)
    fix_positions(model)
    return model.eval()


def make_vit(variant: str, cls: type[Any] = Student) -> Any:
    model = make_timm(variant)
    if isinstance(model, Eva):
        use_rotary(model)
    use_attend(model)
    return become(model, cls)


def make_momentum(variant: str, **changes: Any) -> MomentumEncoder:
    model = make_vit(variant, MomentumEncoder)
    model.configure(make_config(**changes))
    return model


def make_images(count: int = 2, size: int = 32) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(2))


def make_ids(rows: int) -> Tensor:
    return torch.rand(rows, 16, generator=torch.Generator().manual_seed(3)).argsort(1)


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max())


@pytest.fixture(params=[*VARIANTS, *EVAS])
def variant(request: pytest.FixtureRequest) -> str:
    return request.param


def test_all_tokens_equal_timm(variant: str) -> None:
    model, images = make_vit(variant), make_images()
    assert difference(model(images), make_timm(variant).forward_features(images)) < 1e-5
    assert list(model.state_dict()) == list(make_timm(variant).state_dict())


def test_embedding_equals_timms_convolution() -> None:
    model, images = make_vit("plain"), make_images()
    initialise(model, 0)
    model.pos_embed.data.zero_()
    assert difference(model.embed(images)[:, 1:], model.patch_embed(images)) < 2e-6


def test_permuted_patches_permute_the_output(variant: str) -> None:
    model, images, ids = make_vit(variant), make_images(), make_ids(2)
    full, permuted = make_timm(variant).forward_features(images), model(images, ids)
    prefix = model.num_prefix
    index = ids.unsqueeze(-1).expand(-1, -1, 48)
    assert difference(permuted[:, prefix:], full[:, prefix:].gather(1, index)) < 2e-5
    assert prefix == 0 or difference(permuted[:, :prefix], full[:, :prefix]) < 2e-5


def test_kept_patches_equal_a_full_run_that_attends_to_them_only(variant: str) -> None:
    model, images, ids = make_vit(variant), make_images(), make_ids(2)[:, :5]
    prefix = model.num_prefix
    allowed = torch.zeros(2, prefix + 16, dtype=torch.bool)
    allowed[:, :prefix] = True
    allowed.scatter_(1, ids + prefix, True)
    mask = allowed[:, None, None, :].expand(-1, 1, prefix + 16, -1)
    timms = make_timm(variant)
    if "attn_mask" not in signature(timms.forward_features).parameters:
        pytest.skip("this timm's model takes no mask")
    full = timms.forward_features(images, attn_mask=mask)
    index = torch.cat([torch.arange(prefix).expand(2, -1), ids + prefix], dim=1)
    kept = full.gather(1, index.unsqueeze(-1).expand(-1, -1, 48))
    assert difference(model(images, ids), kept) < 2e-5


def test_several_masks_of_a_view_are_rows_in_a_row() -> None:
    model, images, ids = make_vit("plain"), make_images(), make_ids(6)[:, :5]
    rows = model(images, ids)
    for row in range(6):
        alone = model(images[row // 3 : row // 3 + 1], ids[row : row + 1])
        assert difference(rows[row : row + 1], alone) < 2e-5


def test_shapes_that_do_not_fit_are_refused() -> None:
    model = make_vit("plain")
    with pytest.raises(ValueError, match="3 masks are not a multiple of 2 views"):
        model(make_images(), make_ids(3))
    with pytest.raises(ValueError, match="40 x 40 pixels do not fit 4 x 4 patches of 8"):
        model(make_images(size=40))


def test_hidden_pixels_do_not_reach_the_encoder() -> None:
    """Not even in the last bit."""
    model, images, ids = make_vit("plain"), make_images(), make_ids(2)[:, :5]
    hidden = torch.ones(2, 16).scatter(1, ids, 0.0).reshape(2, 1, 4, 4)
    noise = torch.randn(2, 3, 32, 32) * hidden.repeat_interleave(8, 2).repeat_interleave(8, 3)
    assert torch.equal(model(images + noise, ids), model(images, ids))
    assert not torch.equal(model(images + noise), model(images))


def explicit_rows(attention: Any, x: Tensor, rope: Tensor | None = None) -> Tensor:
    """Softmax of every query, mean over heads, in float64."""
    heads = attention.num_heads
    if attention.qkv is None:
        q, k = attention.q_proj(x), attention.k_proj(x)
    else:
        q, k, _ = attention.qkv(x).chunk(3, dim=-1)
        q = q if getattr(attention, "q_bias", None) is None else q + attention.q_bias
    q, k = (one.unflatten(-1, (-1, q.shape[-1] // heads)).transpose(1, 2) for one in (q, k))
    q, k = attention.q_norm(q).double(), attention.k_norm(k).double()
    if rope is not None:
        prefix, half = attention.num_prefix_tokens, getattr(attention, "rotate_half", False)
        q, k = (rotate_explicitly(one, rope, prefix, half) for one in (q, k))
    k = k.repeat_interleave(heads // k.shape[1], dim=1)
    return (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1).mean(1)


def rotate_explicitly(x: Tensor, rope: Tensor, prefix: int, half: bool) -> Tensor:
    """Rotate pairs of channels as complex numbers."""
    width = x.shape[-1]
    pairs = [(i, i + width // 2) if half else (2 * i, 2 * i + 1) for i in range(width // 2)]
    rotated = x.clone()
    for first, second in pairs:
        turn = torch.complex(rope[..., width + first].double(), rope[..., first].double())
        value = torch.complex(x[:, :, prefix:, first], x[:, :, prefix:, second]) * turn
        rotated[:, :, prefix:, first] = value.real
        rotated[:, :, prefix:, second] = value.imag
    return rotated


@pytest.mark.parametrize("norm", [False, True])
def test_row_attention_keeps_timms_output_and_adds_the_row(norm: bool) -> None:
    torch.manual_seed(0)
    attention = Attention(48, 4, qkv_bias=True, qk_norm=norm, norm_layer=nn.LayerNorm)
    x = torch.randn(2, 17, 48)
    expected, rows = attention(x), explicit_rows(attention, x)
    keys = list(attention.state_dict())
    attention = become(attention, RowAttention)
    attention.queries = slice(0, 1)
    output, row = attention(x)
    assert torch.equal(output, expected)
    assert row.dtype == torch.float32 and not row.requires_grad
    assert difference(row, rows[:, 0]) < 1e-7
    assert list(attention.state_dict()) == keys
    attention.queries = slice(1, None)
    assert difference(attention(x)[1], rows[:, 1:].mean(1)) < 1e-7


def reference_momentum(model: Any, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Raw outputs and patch maps of every block, from timm's own pieces."""
    caught: list[tuple[Tensor, Tensor | None]] = []

    def catch(module: nn.Module, inputs: Any, options: Any) -> None:
        caught.append((inputs[0], options.get("rope")))

    handles = [
        block.attn.register_forward_pre_hook(catch, with_kwargs=True) for block in model.blocks
    ]
    outputs = model.forward_intermediates(
        images, return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
    )
    for handle in handles:
        handle.remove()
    prefix = model.num_prefix_tokens
    maps = []
    for block, inputs in zip(model.blocks, caught, strict=True):
        rows = explicit_rows(block.attn, *inputs)
        row = rows[:, 0] if model.cls_token is not None else rows[:, prefix:].mean(1)
        maps.append(row[:, prefix:] / row[:, prefix:].sum(1, keepdim=True))
    return [torch.cat([tokens, patches], dim=1) for patches, tokens in outputs], maps


@pytest.mark.parametrize("layers", [[-1], [0, -1], [1]])
def test_momentum_encoder_reads_whole_images(variant: str, layers: list[int]) -> None:
    images = make_images()
    with torch.no_grad():
        outputs, maps = reference_momentum(make_timm(variant), images)
    model = make_momentum(variant, attention__layers=layers, target__student__layers=layers)
    features, attention = model(images)
    assert features is not None and attention is not None
    expected = sum(outputs[i] for i in layers) / len(layers)
    cls = int(model.has_class_token)
    keep = [*range(cls), *range(model.num_prefix, expected.shape[1])]
    assert features.shape == (2, 16 + cls, 48)
    assert difference(features, expected[:, keep]) < 3e-5
    assert difference(attention, sum(maps[i] for i in layers) / len(layers)) < 1e-6
    assert not features.requires_grad and not attention.requires_grad


def test_momentum_features_after_the_final_norm() -> None:
    model = make_momentum("plain", target__student__feature="norm")
    plain, images = make_vit("plain"), make_images()
    features, attention = model(images)
    assert features is not None and difference(features, plain.forward_features(images)) < 2e-5
    assert attention is not None


def test_momentum_encoder_computes_only_what_is_used() -> None:
    images = make_images()
    features, attention = make_momentum("plain", mask__sampler="random")(images)
    assert features is not None and attention is None
    model = make_momentum("plain", collaboration__alpha_target=1.0, attention__layers=[0])
    assert model.num_needed_blocks == 1
    features, attention = model(images)
    assert features is None and attention is not None
    nothing = make_momentum("plain", mask__sampler="random", collaboration__alpha_target=1.0)
    assert nothing(images) == (None, None)


def test_momentum_encoder_keeps_no_row() -> None:
    model = make_momentum("plain")
    model(make_images())
    known = {id(t) for t in (*model.parameters(), *model.buffers())}
    left = [v for m in model.modules() for v in vars(m).values() if isinstance(v, Tensor)]
    assert all(id(tensor) in known for tensor in left)


def test_momentum_encoder_takes_the_students_state() -> None:
    config = make_config()
    student, momentum = build_student(config), build_student(config, MomentumEncoder)
    initialise(student, 0)
    momentum.load_state_dict(student.state_dict())
    assert not momentum.training and not any(p.requires_grad for p in momentum.parameters())
    assert [n for n, _ in momentum.named_parameters()] == [n for n, _ in student.named_parameters()]


@pytest.mark.parametrize(
    ("arch", "millions"),
    [
        ("vit_base_patch16_224", 85.80),
        ("vit_large_patch16_224", 303.30),
        ("vit_huge_patch14_224", 630.76),
    ],
)
def test_keys_and_shapes_are_timms(arch: str, millions: float) -> None:
    with torch.device("meta"):
        mine = build_student(make_config(student__arch=arch, views__image_size=224))
        theirs = timm.create_model(arch, num_classes=0)
    shapes = {key: value.shape for key, value in mine.state_dict().items()}
    assert shapes == {key: value.shape for key, value in theirs.state_dict().items()}
    assert list(shapes) == list(theirs.state_dict())
    assert round(sum(p.numel() for p in mine.parameters()) / 1e6, 2) == millions


@pytest.mark.parametrize("arch", ["test_vit", "test_vit2", "test_vit3", "test_vit4"])
def test_timms_models_are_built_initialised_and_equal_timm(arch: str) -> None:
    model = build_student(make_config(student__arch=arch, student__patch_size=8))
    assert (model.patch_side, model.grid) == (8, (8, 8))
    initialise(model, 0)
    images = make_images(1, 64)
    exported = timm.create_model(
        arch,
        img_size=64,
        patch_size=8,
        num_classes=0,
        fc_norm=False,
        global_pool="token" if model.has_class_token else "avg",
    )
    exported.load_state_dict(model.state_dict())
    assert difference(model(images), exported.forward_features(images)) < 2e-5
    model(images).square().sum().backward()
    untrained = {name for name, p in model.named_parameters() if p.grad is None}
    assert untrained == {"pos_embed"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student__arch": "vit_basic"}, "vit_basic is not a model of timm"),
        ({"student__arch": "test_vit.mae"}, "no weights mae of test_vit; .*=test_vit$"),
        (
            {"student__arch": "resnet18"},
            "student.arch=resnet18 is another kind of model; use a Vis",
        ),
        (
            {"student__arch": "eva02_tiny_patch14_224", "student__heads": 32},
            "heads=32 gives each head 6 channels of 192; rotary .* multiple of 4, such as 64",
        ),
        ({"views__image_size": 70}, "views.image_size=70 is not a multiple .* 16; use 64 or 80"),
        ({"student__width": 40}, "width=40 .* 32, .* of test_vit; use 32 or 64, or set .*heads"),
        ({"student__width": 16}, "width=16 is not a multiple of 32, .*; use 32, or set"),
        ({"student__heads": 7}, "heads=7 does not divide the student's width 64; .* such as 2"),
        ({"student__width": 72, "student__heads": 16}, "heads=16 does .* width 72; .* such as 8"),
        ({"student__depth": 2, "attention__layers": [2]}, "the student has blocks 0 to 1"),
        ({"attention__layers": [6]}, r"attention.layers=\[6\]: the student has blocks 0 to 5"),
        ({"target__student__layers": [0, -6]}, "target.student.layers=.* names a block twice"),
    ],
)
def test_what_cannot_be_a_student_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_student(make_config(**changes), MomentumEncoder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_drop_rate": 0.1}, "drops patches"),
        ({"pos_embed": "none"}, "without position"),
        ({"embed_dim": 42, "num_heads": 2}, "42 channels"),
        ({"attn_layer": lambda *a, **k: Attention(*a, **{**k, "gated": True})}, "gated"),
    ],
)
def test_unusual_vision_transformers_are_refused(
    options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = timm.create_model

    def create(arch: str, **settings: Any) -> nn.Module:
        if "attn_layer" in options:
            model = original(arch, **settings)
            model.blocks[0].attn.gate = nn.Linear(64, 64)
            return model
        return original(arch, **settings, **options)

    monkeypatch.setattr(timm, "create_model", create)
    with pytest.raises(ConfigError, match=message):
        build_student(make_config())


def test_sincos_positions_known_values() -> None:
    expected = torch.tensor(
        [
            [0, 0, 1, 1, 0, 0, 1, 1],
            [0.841471, 0.01, 0.540302, 0.99995, 0, 0, 1, 1],
            [0, 0, 1, 1, 0.841471, 0.01, 0.540302, 0.99995],
            [0.841471, 0.01, 0.540302, 0.99995, 0.841471, 0.01, 0.540302, 0.99995],
        ]
    )
    assert difference(sincos_positions(8, (2, 2)), expected) < 1e-6


def test_sincos_positions_of_a_grid_that_is_not_square() -> None:
    table = sincos_positions(16, (2, 3)).reshape(2, 3, 16)
    assert torch.equal(table[0, :, :8], table[1, :, :8])  # columns in the first half
    assert torch.equal(table[:, 0, 8:], table[:, 2, 8:])  # rows in the second
    with pytest.raises(ValueError, match="multiple of 4"):
        sincos_positions(6, (2, 2))


def test_sincos_positions_of_a_stretched_grid_keep_their_places() -> None:
    for grid in ((2, 2), (2, 4)):
        assert torch.equal(
            sincos_positions(16, grid, 2)[:2, 8:], sincos_positions(16, (2, 2))[:2, 8:]
        )
    assert torch.equal(sincos_positions(16, (3, 3), 3), sincos_positions(16, (3, 3)))
    table = sincos_positions(4, (4, 4), 2).reshape(4, 4, 4)  # sin x, cos x, sin y, cos y
    places = torch.tensor([-0.25, 0.25, 0.75, 1.25])
    assert difference(table[0, :, 0], places.sin()) < 1e-6
    assert difference(table[:, 0, 2], places.sin()) < 1e-6


def test_positions_are_fixed_and_zero_for_the_prefix() -> None:
    model = build_student(make_config())
    assert not model.pos_embed.requires_grad
    assert torch.equal(model.pos_embed[0, 0], torch.zeros(64))
    assert torch.equal(model.pos_embed[0, 1:], sincos_positions(64, (4, 4)))


def test_initialise_is_a_function_of_the_seed_alone() -> None:
    one, two, other = (build_student(make_config()) for _ in range(3))
    state = torch.get_rng_state()
    initialise(one, 0)
    torch.rand(3)
    initialise(two, 0)
    initialise(other, 1)
    torch.set_rng_state(state)
    initialise(two, 0)
    assert torch.equal(torch.get_rng_state(), state)
    for (name, a), b, c in zip(
        one.named_parameters(), two.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(a, b), name
        assert torch.equal(a, c) == (a.ndim == 1 or name == "pos_embed"), name


def test_initialise_follows_mae() -> None:
    model = build_student(make_config(student__arch="vit_tiny_patch16_224"))
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    initialise(model, 3)
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            assert not weight.any(), name
        elif "norm" in name:
            assert torch.equal(weight, torch.ones_like(weight)), name
        elif weight.ndim in (2, 4):
            flat = weight.detach().flatten(1)
            bound = (6 / sum(flat.shape)) ** 0.5
            assert 0.99 * bound < float(flat.abs().max()) <= bound, name
            assert float(flat.std()) == pytest.approx(bound / 3**0.5, rel=0.02), name
    assert float(model.cls_token.detach().std()) == pytest.approx(0.02, rel=0.2)


def test_initialise_refuses_parameters_that_it_does_not_know() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.PReLU())
    with pytest.raises(TypeError, match="no rule to initialise weight of 1"):
        initialise(model, 0)


@pytest.mark.parametrize("variant_name", ["plain", "no class token"])
def test_momentum_forward_runs_on_fake_tensors(variant_name: str) -> None:
    model = make_momentum(variant_name)
    with FakeTensorMode(allow_non_fake_inputs=True):
        features, attention = model(torch.randn(2, 3, 32, 32))
    assert features is not None and features.shape[0] == 2
    assert attention is not None and attention.shape == (2, 16)
