"""Targets and losses against plain references."""

import itertools
from dataclasses import replace

import pytest
import torch

from cmtmae_scale.config.schema import Collaboration, Config, Decoder, Loss, NamedTeacher
from cmtmae_scale.method.masking import PatchChoice, select_patches
from cmtmae_scale.method.targets import (
    TokenLayout,
    normalise,
    objective,
    patchify,
    pixel_targets,
    term_weights,
    token_loss,
)
from tests.references import targets as reference

RAMP = torch.tensor([1.0, 2.0, 3.0, 4.0])
BACK = torch.tensor([4.0, 3.0, 2.0, 1.0])


def approx(values, tolerance=1e-6):
    return pytest.approx(values, abs=tolerance)


def test_norms():
    assert normalise(RAMP, "ln").tolist() == approx([-1.341640, -0.447213, 0.447213, 1.341640])
    assert normalise(RAMP, "l2").tolist() == approx([0.182574, 0.365148, 0.547723, 0.730297])
    unbiased = [-1.161895, -0.387298, 0.387298, 1.161895]
    assert pixel_targets(RAMP, "patch").tolist() == approx(unbiased)
    assert normalise(RAMP, "none").tolist() == RAMP.tolist()
    assert normalise(torch.zeros(4), "l2").tolist() == [0.0] * 4


def test_norms_match_loops_and_are_detached_float32():
    x = torch.randn(3, 12, generator=torch.manual_seed(0), requires_grad=True)
    for kind, slow in (("l2", reference.l2), ("ln", reference.layer_norm)):
        out = normalise(x, kind)
        assert not out.requires_grad
        assert [row.tolist() for row in out] == [approx(slow(row.tolist())) for row in x.detach()]
    for row in x.detach():
        assert pixel_targets(row, "patch").tolist() == approx(reference.unbiased(row.tolist()))
    assert normalise(x.bfloat16(), "ln").dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(normalise(x, "ln"), normalise(x.clone(), "ln"))
        assert normalise(x, "l2").dtype == torch.float32
    for function, kind in ((normalise, "batch"), (pixel_targets, "ln")):
        with pytest.raises(ValueError, match="is not one of"):
            function(x, kind)


def test_losses():
    assert float(token_loss(BACK, RAMP, "cosine")) == approx(0.666667)
    assert float(token_loss(BACK, RAMP, "mse")) == approx(5.0)
    unit = float(token_loss(normalise(BACK, "l2"), normalise(RAMP, "l2"), "mse"))
    assert unit == approx(0.166667)
    assert float(token_loss(BACK, RAMP, "smooth_l1", beta=1.0)) == approx(1.5)
    assert float(token_loss(BACK, RAMP, "smooth_l1")) == approx(1.125)
    distances = torch.tensor([[0.5], [1.0], [2.0], [3.0]])
    zeros = torch.zeros(4, 1)
    assert token_loss(distances, zeros, "smooth_l1", 1.0).tolist() == approx([0.125, 0.5, 1.5, 2.5])
    assert token_loss(distances, zeros, "smooth_l1", 2.0).tolist() == approx([0.0625, 0.25, 1, 2])


@pytest.mark.parametrize("kind", ["cosine", "mse", "smooth_l1"])
def test_losses_match_loops(kind):
    generator = torch.manual_seed(1)
    p, t = torch.randn(5, 7, generator=generator) * 3, torch.randn(5, 7, generator=generator)
    pairs = zip(p.tolist(), t.tolist(), strict=True)
    expected = [reference.token_loss(a, b, kind) for a, b in pairs]
    assert token_loss(p, t, kind).tolist() == approx(expected, 1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert token_loss(p, t, kind).dtype == torch.float32
        assert token_loss(p, t, kind).tolist() == approx(expected, 1e-5)


def test_initial_losses_on_layer_normed_targets():
    t = normalise(torch.randn(400, 256, generator=torch.manual_seed(2)), "ln")
    zero = torch.zeros_like(t)
    assert float(token_loss(zero, t, "mse").mean()) == approx(1.0, 1e-4)
    assert float(token_loss(zero, t, "smooth_l1", 1.0).mean()) == approx(0.425, 0.01)
    assert float(token_loss(zero, t, "smooth_l1", 2.0).mean()) == approx(0.247, 0.005)
    other = torch.randn(400, 256, generator=torch.manual_seed(3))
    assert float(token_loss(other, t, "cosine").mean()) == approx(2.0, 0.02)


def test_a_zero_prediction_has_cosine_loss_2_and_a_finite_gradient():
    p = torch.zeros(2, 4, requires_grad=True)
    loss = token_loss(p, RAMP.expand(2, -1), "cosine")
    assert loss.tolist() == [2.0, 2.0]
    loss.sum().backward()
    assert p.grad is not None and bool(p.grad.isfinite().all())


def test_wrong_losses_are_named():
    with pytest.raises(ValueError, match="differ in shape"):
        token_loss(RAMP, RAMP[:3], "mse")
    with pytest.raises(ValueError, match="not one of cosine"):
        token_loss(RAMP, RAMP, "l1")


def test_patchify_matches_loops():
    images = torch.arange(2 * 3 * 6 * 6.0).view(2, 3, 6, 6)
    patches = patchify(images, 2)
    assert patches.shape == (2, 9, 12)
    for b in range(2):
        assert patches[b].tolist() == reference.patchify(images[b].tolist(), 2)
    with pytest.raises(ValueError, match="not a multiple"):
        patchify(images, 4)


def layout_for(tokens, include_cls=True, predict_ratio=None, thrown=0):
    config = Config(
        loss=Loss(tokens=tokens, include_cls=include_cls, visible_weight=0.3),
        decoder=Decoder(predict_ratio=predict_ratio),
    )
    return TokenLayout.from_config(config, 2, 6 - thrown, thrown)


@pytest.mark.parametrize(
    "tokens, include_cls, weights",
    [
        ("all", True, [1.0] * 9),
        ("all", False, [1.0] * 8),
        ("masked", True, [1.0] * 6),
        ("visible", True, [1.0] * 3),
        ("visible", False, [1.0] * 2),
        ("weighted", True, [1.0, 0.3, 0.3] + [1.0] * 6),
    ],
)
def test_layout_weights(tokens, include_cls, weights):
    layout = layout_for(tokens, include_cls)
    assert layout.weights("cpu").tolist() == approx(weights)
    assert layout.num_tokens == len(weights)
    assert layout.weight_sum == approx(sum(weights))
    pixels = layout.without_cls()
    assert pixels.num_tokens == len(weights) - (include_cls and tokens != "masked")


def test_layout_predicts_a_share_of_all_patches():
    assert layout_for("masked", predict_ratio=0.5).num_hidden == 4
    assert layout_for("masked", predict_ratio=0.5, thrown=3).num_hidden == 3
    assert layout_for("all", predict_ratio=0.01).num_hidden == 1


def test_layout_gathers_class_visible_then_hidden_tokens():
    choice = PatchChoice(
        ids_keep=torch.tensor([[7, 0], [1, 2], [3, 4], [5, 6]]),
        ids_hidden=torch.tensor(
            [[1, 2, 3, 4, 5], [7, 6, 5, 4, 3], [0, 1, 2, 5, 6], [7, 4, 3, 2, 1]]
        ),
        ids_thrown=torch.tensor([[6], [0], [7], [0]]),
    )
    features = torch.randn(2, 9, 3, generator=torch.manual_seed(4))  # class token first
    layout = TokenLayout(cls=True, num_visible=2, num_hidden=3)
    found = layout.gather(features, choice)
    assert found.shape == (4, 6, 3)
    for row in range(4):
        ids = choice.ids_keep[row].tolist() + choice.ids_hidden[row, :3].tolist()
        expected = [features[row // 2, 0]] + [features[row // 2, 1 + i] for i in ids]
        assert torch.equal(found[row], torch.stack(expected))
    without = layout.without_cls()
    assert torch.equal(without.gather(features, choice), found[:, 1:])
    assert torch.equal(without.gather(features[:, 1:], choice), found[:, 1:])
    with pytest.raises(ValueError, match=r"loss\.include_cls"):
        layout.gather(features[:, 1:], choice)
    with pytest.raises(ValueError, match="do not fit"):
        layout.gather(features[:, :6], choice)
    with pytest.raises(ValueError, match="do not fit"):
        layout.gather(features[:1].expand(3, -1, -1), choice)
    with pytest.raises(ValueError, match="does not fit masks"):
        TokenLayout(cls=True, num_visible=3, num_hidden=3).gather(features, choice)


def test_reduction_over_tokens():
    """Losses 1, 2, 3, 4 and 10, 20, 30, 40 with labels 1010 and 0110: hidden 13.5, all 13.75."""
    losses = torch.tensor([[1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 30.0, 40.0]])
    choice = PatchChoice(
        torch.tensor([[1, 3], [0, 3]]), torch.tensor([[0, 2], [1, 2]]), torch.zeros(2, 0).long()
    )
    for tokens, expected in (("masked", 13.5), ("all", 13.75)):
        config = Config(loss=Loss(tokens=tokens, include_cls=False, type="mse"))
        layout = TokenLayout.from_config(config, 2, 2)
        p = layout.gather(losses.sqrt()[..., None], choice)
        pair = {"teacher": p}, {"teacher": torch.zeros_like(p)}
        result = objective(*pair, torch.ones(2).bool(), layout, config.loss, {"teacher": 1.0})
        assert float(result["total"]) / 2 == approx(expected, 1e-5)


WIDTHS = {"teacher_a": 5, "teacher_b": 3, "student": 4, "pixel": 12}


def make_config(kind="cosine"):
    return Config(
        teachers=[NamedTeacher(name="a", loss=3.0), NamedTeacher(name="b", loss=1.0)],
        loss=Loss(type=kind, teacher=1.5, student=2.0, pixel=0.25),
        collaboration=Collaboration(alpha_attention=0.5, alpha_target=0.7),
    )


def case(rows=4, kind="cosine"):
    generator = torch.manual_seed(5)
    layout = TokenLayout(cls=True, num_visible=2, num_hidden=3, visible_weight=0.5)

    def values():
        return {
            name: torch.randn(rows, 6 - (name == "pixel"), width, generator=generator)
            for name, width in WIDTHS.items()
        }

    return values(), values(), layout, make_config(kind).loss


WEIGHTS = term_weights(make_config(), 0.7)


@pytest.mark.parametrize("kind", ["cosine", "mse", "smooth_l1"])
def test_objective_matches_loops(kind):
    predictions, targets, layout, loss = case(kind=kind)
    valid = torch.tensor([True, False, True, True])
    weights = layout.weights().tolist()
    terms = []
    for name in WIDTHS:
        how = (weights[1:], "mse") if name == "pixel" else (weights, kind)
        pair = predictions[name].tolist(), targets[name].tolist()
        terms.append(reference.summed_loss(*pair, valid.tolist(), *how))
    teacher = 0.75 * terms[0] + 0.25 * terms[1]
    total = 0.7 * 1.5 * teacher + 0.3 * 2.0 * terms[2] + 0.25 * terms[3]
    for alpha in (0.7, torch.tensor(0.7), torch.tensor(0.7, dtype=torch.float64)):
        own = term_weights(make_config(kind), alpha)
        found = objective(predictions, targets, valid, layout, loss, own)
        assert [*found] == ["total", *WIDTHS]
        assert [float(x) for x in found.values()] == approx([total, *terms], 1e-4)
        assert all(x.shape == () and x.dtype == torch.float32 for x in found.values())


def test_alpha_weighs_the_teacher():
    layout = TokenLayout(False, 0, 1)
    config = replace(make_config(), teachers=[], loss=Loss(type="mse"))
    zero = torch.zeros(1, 1, 1)
    predictions = {"teacher": zero + 2.0**0.5, "student": zero + 5.0**0.5}
    targets, weights = dict.fromkeys(predictions, zero), term_weights(config, 0.7)
    found = objective(predictions, targets, torch.tensor([True]), layout, config.loss, weights)
    assert {name: float(x) for name, x in found.items()} == approx(
        {"total": 2.9, "teacher": 2.0, "student": 5.0}
    )


@pytest.mark.parametrize("kind", ["cosine", "mse", "smooth_l1"])
def test_invalid_rows_give_exactly_no_gradient(kind):
    predictions, targets, layout, loss = case(kind=kind)
    leaves = {name: p.clone() for name, p in predictions.items()}
    for leaf in leaves.values():
        leaf[1], leaf[2] = 1e18, 0.0
        leaf.requires_grad_()
    targets["teacher_a"][1] = -1e18
    valid = torch.tensor([True, False, False, True])
    found = objective(leaves, targets, valid, layout, loss, WEIGHTS)
    found["total"].backward()
    kept = [{name: x[[0, 3]] for name, x in p.items()} for p in (predictions, targets)]
    alone = objective(*kept, torch.ones(2).bool(), layout, loss, WEIGHTS)
    assert [float(x.detach()) for x in found.values()] == approx(
        [float(x) for x in alone.values()], 1e-5
    )
    for leaf in leaves.values():
        assert leaf.grad is not None
        assert leaf.grad[1].abs().sum() == 0.0 and leaf.grad[2].abs().sum() == 0.0
        assert leaf.grad[0].abs().sum() > 0.0


def test_no_valid_row_is_a_finite_zero():
    predictions, targets, layout, loss = case()
    leaf = predictions["teacher_a"].requires_grad_()
    found = objective(predictions, targets, torch.zeros(4).bool(), layout, loss, WEIGHTS)
    assert [float(x.detach()) for x in found.values()] == [0.0] * 5
    found["total"].backward()
    assert leaf.grad.abs().sum() == 0.0


def test_targets_receive_no_gradient():
    predictions, targets, layout, loss = case()
    target, leaf = (one["student"].requires_grad_() for one in (targets, predictions))
    objective(predictions, targets, torch.ones(4).bool(), layout, loss, WEIGHTS)["total"].backward()
    assert target.grad is None and leaf.grad is not None


def test_the_sum_over_ranks_is_the_sum_over_the_batch():
    predictions, targets, layout, loss = case(rows=8)
    valid = torch.tensor([True] * 5 + [False, True, True])
    whole = objective(predictions, targets, valid, layout, loss, WEIGHTS)
    parts = []
    for start in range(0, 8, 2):
        rows = slice(start, start + 2)
        piece = [{name: x[rows] for name, x in p.items()} for p in (predictions, targets)]
        parts.append(objective(*piece, valid[rows], layout, loss, WEIGHTS))
    for name, value in whole.items():
        assert float(sum(p[name] for p in parts)) == approx(float(value), 1e-5)


def test_half_given_terms_are_errors():
    predictions, targets, layout, loss = case()
    valid = torch.ones(4).bool()
    kinds = ("prediction", "target", "weight")
    for name, (side, kind) in itertools.product(WIDTHS, enumerate(kinds)):
        given = [{**one} for one in (predictions, targets, WEIGHTS)]
        del given[side][name]
        with pytest.raises(ValueError, match=f"{name} term has no {kind}"):
            objective(*given[:2], valid, layout, loss, given[2])
    with pytest.raises(ValueError, match="rows of"):
        objective(predictions, targets, valid, layout.without_cls(), loss, WEIGHTS)


def test_a_choice_from_the_sampler_fits_the_layout():
    choice = select_patches(None, torch.rand(4, 16), sampler="random", num_keep=4, num_thrown=3)
    layout = TokenLayout.from_config(Config(), 4, 9, 3)
    assert layout.gather(torch.randn(2, 17, 5), choice).shape == (4, 14, 5)
