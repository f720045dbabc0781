"""Student, decoder and heads together."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from cmtmae_scale.config.needs import needs
from cmtmae_scale.config.schema import Config
from cmtmae_scale.errors import ConfigError
from cmtmae_scale.method.build import build_student
from cmtmae_scale.method.initialisation import initialise
from cmtmae_scale.method.masking import PatchChoice, choose_masks, token_counts
from cmtmae_scale.method.model import CollaborativeMAE
from cmtmae_scale.method.student import MomentumEncoder
from cmtmae_scale.method.targets import (
    TokenLayout,
    normalise,
    objective,
    patchify,
    pixel_targets,
    term_weights,
)

LENGTH, TEACHER = 16, {"teacher": 7}


def make_config(**changes: Any) -> Config:
    config = Config()
    config.student.arch = "test_vit"
    config.views.image_size = 64
    config.decoder.depth, config.decoder.width, config.decoder.heads = 2, 24, 3
    config.collaboration.alpha_attention = 0.5
    config.collaboration.alpha_target = 0.7
    config.mask.salient_fraction = 0.0
    for key, value in changes.items():
        group, name = key.split("__")
        setattr(getattr(config, group), name, value)
    return config


def make_model(config: Config) -> CollaborativeMAE:
    model = CollaborativeMAE(config, TEACHER)
    initialise(model, 0)
    return model


def make_images(views: int = 2) -> Tensor:
    return torch.randn(views, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def make_choice(config: Config, views: int = 2) -> PatchChoice:
    attention = torch.rand(views, LENGTH, generator=torch.Generator().manual_seed(2))
    return choose_masks(config.mask, attention, torch.arange(views), 0, 0.0)


def make_layout(config: Config) -> TokenLayout:
    return TokenLayout.from_config(
        config, *token_counts(LENGTH, config.mask.ratio, config.mask.throw_ratio)
    )


def step_loss(
    config: Config, model: CollaborativeMAE, momentum: MomentumEncoder | None
) -> tuple[Any, Tensor]:
    """Losses of one micro-batch, and the teacher's features, which require a gradient."""
    images, choice, layout = make_images(), make_choice(config), make_layout(config)
    features = torch.randn(2, LENGTH + 1, TEACHER["teacher"], requires_grad=True)
    need = needs(config)
    own = momentum(images)[0] if momentum else None
    targets = {}
    if need.teacher_features:
        targets["teacher"] = layout.gather(normalise(features, "l2"), choice)
    if own is not None:
        targets["student"] = layout.gather(normalise(own, "ln"), choice)
    if need.pixels:
        pixels = pixel_targets(patchify(images, 16), "patch")
        targets["pixel"] = layout.without_cls().gather(pixels, choice)
    valid = torch.ones(choice.ids_keep.shape[0], dtype=torch.bool)
    predictions = model(images, choice)
    weights = term_weights(config, 0.7)
    return objective(predictions, targets, valid, layout, config.loss, weights), features


CASES: dict[str, dict[str, Any]] = {
    "prompt": {},
    "prompt, two masks": {"mask__masks_per_view": 2},
    "prompt, normed context": {"decoder__prompt_norm_context": True},
    "prompt, hidden only": {"loss__tokens": "masked"},
    "prompt, thrown": {"mask__throw_ratio": 0.1},
    "weighted": {"loss__tokens": "weighted", "loss__visible_weight": 0.3},
    "full": {"decoder__type": "full"},
    "full, pixels too": {"decoder__type": "full", "loss__pixel": 1.0},
    "cross": {"decoder__type": "cross"},
    "cross, part": {
        "decoder__type": "cross",
        "decoder__predict_ratio": 0.5,
        "loss__tokens": "masked",
    },
    "none": {"decoder__type": "none", "loss__tokens": "visible"},
    "MAE": {
        "decoder__type": "full",
        "loss__tokens": "masked",
        "loss__teacher": 0.0,
        "loss__student": 0.0,
        "loss__pixel": 1.0,
        "mask__sampler": "random",
    },
    "pixels of all": {"loss__teacher": 0.0, "loss__student": 0.0, "loss__pixel": 1.0},
    "no class token": {"student__arch": "test_vit2", "loss__include_cls": False},
}


@pytest.fixture(params=CASES)
def config(request: pytest.FixtureRequest) -> Config:
    return make_config(**CASES[request.param])


def test_every_trained_parameter_and_nothing_else_gets_a_gradient(config: Config) -> None:
    """Frozen models and fixed positions get none."""
    model = make_model(config)
    momentum = None
    if needs(config).student_features:
        momentum = build_student(config, MomentumEncoder)
        momentum.load_state_dict(model.encoder.state_dict())
        momentum.requires_grad_(True)  # even so
    losses, features = step_loss(config, model, momentum)
    losses["total"].backward()
    assert losses["total"].isfinite()
    assert features.grad is None
    assert momentum is None or all(p.grad is None for p in momentum.parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.any(), name
        else:
            assert name == "encoder.pos_embed" and parameter.grad is None


def test_predictions_follow_the_layout(config: Config) -> None:
    model, layout, need = make_model(config), make_layout(config), needs(config)
    choice = make_choice(config)
    rows = 2 * config.mask.masks_per_view
    predictions = model(make_images(), choice)
    width = model.encoder.embed_dim
    for name, used, size, tokens in (
        ("teacher", need.teacher_features, TEACHER["teacher"], layout.num_tokens),
        ("student", need.student_features, width, layout.num_tokens),
        ("pixel", need.pixels, 768, layout.without_cls().num_tokens),
    ):
        assert (name in predictions) == used
        if used:
            assert predictions[name].shape == (rows, tokens, size)


def test_only_visible_pixels_reach_the_predictions(config: Config) -> None:
    """Noise in the masked and thrown patches changes no prediction."""
    model, choice, images = make_model(config), make_choice(config), make_images()
    masks = config.mask.masks_per_view
    seen = torch.zeros(2, LENGTH).scatter(1, choice.ids_keep.reshape(2, -1), 1.0)
    unseen = (1 - seen).reshape(2, 1, 4, 4).repeat_interleave(16, 2).repeat_interleave(16, 3)
    noisy = images + torch.randn_like(images) * unseen
    assert masks == 2 or float(unseen.mean()) >= config.mask.ratio
    found, expected = model(noisy, choice), model(images, choice)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], one) for name, one in expected.items())
    assert not torch.equal(patchify(images, 16), patchify(noisy, 16))


def test_masks_of_a_view_do_not_see_each_other() -> None:
    config = make_config(mask__masks_per_view=3)
    model, choice, images = make_model(config), make_choice(config), make_images()
    together = model(images, choice)["teacher"]
    for row in range(6):
        one = PatchChoice(*(ids[row : row + 1] for ids in choice))
        alone = model(images[row // 3 : row // 3 + 1], one)["teacher"]
        assert torch.allclose(together[row : row + 1], alone, atol=1e-5)


def test_recomputation_changes_no_gradient() -> None:
    config, gradients = make_config(loss__student=0.0), []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = make_model(config)
        model.set_activation_checkpointing(recompute)
        step_loss(config, model, None)[0]["total"].backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is None or torch.equal(gradient, gradients[1][name]), name


def test_recomputation_covers_every_block() -> None:
    model = make_model(make_config())
    calls: list[int] = []
    blocks = model.transformer_blocks()
    assert len(blocks) == 6 + 2
    for i, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda *_, i=i: calls.append(i))
    model.set_activation_checkpointing(True)
    prediction = model(make_images(), make_choice(make_config()))
    assert calls == list(range(8))
    prediction["teacher"].sum().backward()
    assert sorted(calls) == sorted([*range(8), *range(8)])


def test_state_splits_into_encoder_decoder_and_heads() -> None:
    model = make_model(make_config())
    state = model.state_dict()
    assert {key.split(".")[0] for key in state} == {"encoder", "decoder", "heads"}
    encoder = {k.removeprefix("encoder."): v for k, v in state.items() if k.startswith("encoder.")}
    build_student(make_config()).load_state_dict(encoder, strict=True)


def test_default_decoder_and_heads_have_the_known_size() -> None:
    config = make_config(
        student__arch="vit_base_patch16_224",
        views__image_size=224,
        decoder__depth=8,
        decoder__width=512,
        decoder__heads=16,
    )
    with torch.device("meta"):
        model = CollaborativeMAE(config, {"teacher": 512})
    count = {name: sum(p.numel() for p in m.parameters()) for name, m in model.named_children()}
    assert count["decoder"] == 25_219_072 + (768 * 512 + 512) + 512 + 2 * 512
    assert count["heads"] == (512 * 512 + 512) + (512 * 768 + 768)


def test_missing_class_token_is_named() -> None:
    message = "loss.include_cls=true, but student.arch=test_vit2 has no class token; set"
    with pytest.raises(ConfigError, match=message):
        CollaborativeMAE(make_config(student__arch="test_vit2"), TEACHER)
    pixels = {"loss__teacher": 0.0, "loss__student": 0.0, "loss__pixel": 1.0}
    CollaborativeMAE(make_config(student__arch="test_vit2", **pixels))


def test_missing_teacher_width_is_told() -> None:
    with pytest.raises(ValueError, match="teacher_widths lacks teacher, "):
        CollaborativeMAE(make_config())
    CollaborativeMAE(make_config(loss__teacher=0.0))


@pytest.mark.parametrize("name", ["prompt", "full, pixels too", "cross, part", "none"])
def test_forward_and_backward_run_on_fake_tensors(name: str) -> None:
    """Nothing reads a value on the host."""
    config = make_config(**CASES[name])
    model, choice = make_model(config), make_choice(config)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = PatchChoice(*(mode.from_tensor(ids) for ids in choice))
        predictions = model(torch.randn(2, 3, 64, 64), fake)
        sum(p.sum() for p in predictions.values()).backward()
