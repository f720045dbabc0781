"""MAE, MILAN and CrossMAE here against transformers and plain versions, weights copied."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cmtmae_scale.checkpoint.init_weights import load_init_weights, rename_tensors
from cmtmae_scale.config.schema import Config, Mask
from cmtmae_scale.config.schema import Decoder as DecoderSettings
from cmtmae_scale.method.decoder import build_decoder
from cmtmae_scale.method.initialisation import initialise
from cmtmae_scale.method.masking import PatchChoice, choose_masks, hash_uniform, select_patches
from cmtmae_scale.method.model import CollaborativeMAE
from cmtmae_scale.method.targets import (
    TokenLayout,
    normalise,
    objective,
    patchify,
    pixel_targets,
    term_weights,
)
from tests.references import decoders as reference
from tests.references import targets as plain
from tests.references import vit_mae


def make_config(**changes: Any) -> Config:
    """``test_vit``: 64 wide, 6 deep, 2 heads, MLP 192; 4 x 4 patches of 16 pixels."""
    config = Config()
    config.student.arch, config.views.image_size = "test_vit", 64
    config.decoder.depth, config.decoder.width, config.decoder.heads = 2, 32, 4
    config.collaboration.alpha_attention = config.collaboration.alpha_target = 1.0
    config.mask.salient_fraction = 0.0
    for key, value in changes.items():
        group, name = key.split("__")
        setattr(getattr(config, group), name, value)
    return config


def mae_config(**changes: Any) -> Config:
    settings = {"decoder__type": "full", "mask__sampler": "random", "loss__tokens": "masked"}
    settings |= {"loss__teacher": 0.0, "loss__student": 0.0, "loss__pixel": 1.0}
    return make_config(**settings | changes)


def random_images(count: int, size: int = 64) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.manual_seed(5))


def shake(module: nn.Module) -> None:
    """Random values everywhere, biases, norms and tokens too; fixed tables stay."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)


def pixel_losses(
    model: CollaborativeMAE, config: Config, images: Tensor, choice: PatchChoice
) -> dict[str, Tensor]:
    layout = TokenLayout.from_config(config, choice.ids_keep.shape[1], choice.ids_hidden.shape[1])
    pixels = pixel_targets(patchify(images, model.encoder.patch_side), config.target.pixel.norm)
    targets = {"pixel": layout.without_cls().gather(pixels, choice)}
    valid = torch.ones(len(images), dtype=torch.bool)
    weights = term_weights(config, 0.0)
    return objective(model(images, choice), targets, valid, layout, config.loss, weights)


@pytest.mark.parametrize("norm", ["patch", "none"])
def test_mae_equals_transformers_in_loss_and_every_gradient(norm: str) -> None:
    config = mae_config(student__patch_size=8)
    config.target.pixel.norm = norm
    theirs = vit_mae.build(64, 6, 2, 192, 64, 8, (32, 2, 4), norm_pix_loss=norm == "patch")
    ours = CollaborativeMAE(config)
    load_init_weights(ours, theirs.state_dict(), "transformers")
    images, positions = random_images(3), torch.arange(3)
    choice = choose_masks(config.mask, None, positions, 9, 0.0, length=64)
    # MAE shows the patches of the smallest noise, we those of the largest key.
    outcome = theirs(images, noise=1 - hash_uniform(9, 0, positions, 64))
    outcome.loss.backward()
    loss = pixel_losses(ours, config, images, choice)["total"] / 3
    loss.backward()
    hidden = torch.zeros(3, 64, dtype=torch.bool).scatter(1, choice.ids_hidden, True)
    assert torch.equal(outcome.mask.bool(), hidden)
    assert abs(float(loss.detach()) - float(outcome.loss.detach())) < 1e-6
    expected = {n: p.value for n, p in rename_tensors(named_gradients(theirs)).items()}
    found = named_gradients(ours)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        difference = gradient - expected[name]
        assert float(difference.abs().max()) < 1e-5, name
        assert float(difference.norm()) < 1e-5 * float(gradient.norm()), name


def named_gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


WIDTH, STUDENT, HEADS, GRID, KEEP, DEPTH = 16, 12, 2, (3, 4), 4, 2


def decoder_case(
    kind: Any, layout: TokenLayout, **settings: Any
) -> tuple[nn.Module, Tensor, PatchChoice, dict[str, Tensor]]:
    """A float64 decoder, tokens of two images, masks, and a copy of the weights."""
    group = DecoderSettings(type=kind, width=WIDTH, heads=HEADS, depth=DEPTH, **settings)
    decoder = build_decoder(group, STUDENT, GRID, 1, layout).double()
    decoder.positions = reference.sincos_table(WIDTH, GRID)  # not rounded to float32
    initialise(decoder, 0)
    shake(decoder)
    order = torch.rand(2, 12, generator=torch.manual_seed(0)).argsort(1)
    choice = PatchChoice(order[:, :KEEP], order[:, KEEP:], order[:, :0])
    tokens = torch.randn(2, 1 + KEEP, STUDENT, dtype=torch.float64, generator=torch.manual_seed(1))
    copied = {n: p.detach().clone().requires_grad_() for n, p in decoder.named_parameters()}
    return decoder, tokens, choice, copied


def compare_with_plain(
    decoder: nn.Module, tokens: Tensor, choice: PatchChoice, weights: Any, expected: Any
) -> None:
    """Outputs, and gradients of a random sum, of all weights and of the encoder's tokens."""
    here, there = (tokens.clone().requires_grad_() for _ in range(2))
    output = decoder(here, choice)
    rows = [expected(there[i], *(ids[i].tolist() for ids in choice[:2])) for i in range(2)]
    assert float((output - torch.stack(rows)).detach().abs().max()) < 1e-6
    factor = torch.randn(output.shape, dtype=torch.float64, generator=torch.manual_seed(4))
    (output * factor).sum().backward()
    (torch.stack(rows) * factor).sum().backward()
    pairs = {name: (p.grad, weights[name].grad) for name, p in decoder.named_parameters()}
    pairs["tokens"] = (here.grad, there.grad)
    for name, (found, wanted) in pairs.items():
        assert found is not None and wanted is not None and found.any(), name
        assert float((found - wanted).abs().max()) < 1e-6, name


@pytest.mark.parametrize("norm_context", [False, True])
def test_the_prompting_decoder_equals_milans_written_with_loops(norm_context: bool) -> None:
    layout = TokenLayout(True, KEEP, 12 - KEEP)
    case = decoder_case("prompt", layout, prompt_norm_context=norm_context)
    weights = case[3]

    def expected(tokens: Tensor, ids_keep: list[int], ids_hidden: list[int]) -> Tensor:
        image = reference.milan(weights, tokens, ids_keep, GRID, HEADS, DEPTH, norm_context)
        return image[[0] + [1 + i for i in ids_keep + ids_hidden]]

    compare_with_plain(*case, expected)


def test_the_cross_decoder_equals_crossmaes_written_with_loops() -> None:
    case = decoder_case("cross", TokenLayout(False, 0, 12 - KEEP))
    weights = case[3]

    def expected(tokens: Tensor, ids_keep: list[int], ids_hidden: list[int]) -> Tensor:
        return reference.crossmae(weights, tokens, ids_hidden, GRID, HEADS, DEPTH)

    compare_with_plain(*case, expected)


def test_milans_loss_is_the_mean_of_2_minus_2_cos_over_the_image_and_the_class_token() -> None:
    """The whole of MILAN: the plain decoder and head, the plain distance, in image order."""
    config = make_config(loss__student=0.0)
    model = CollaborativeMAE(config, {"teacher": 7})
    initialise(model, 0)
    shake(model)
    images = random_images(2)
    attention = torch.rand(2, 16, generator=torch.manual_seed(6))
    features = torch.randn(2, 17, 7, generator=torch.manual_seed(7)) * 3  # class token first
    choice = choose_masks(config.mask, attention, torch.arange(2), 0, 0.0)
    layout = TokenLayout.from_config(config, 4, 12)
    targets = layout.gather(normalise(features, config.target.teacher.norm), choice)
    losses = objective(
        model(images, choice),
        {"teacher": targets},
        torch.ones(2, dtype=torch.bool),
        layout,
        config.loss,
        term_weights(config, 1.0),
    )
    weights = {n.removeprefix("decoder."): p.double() for n, p in model.named_parameters()}
    distances = []
    with torch.no_grad():
        tokens = model.encoder(images, choice.ids_keep).double()
        for i in range(2):
            ids = choice.ids_keep[i].tolist()
            x = reference.milan(weights, tokens[i], ids, (4, 4), heads=4, depth=2)
            predicted = reference.linear(x, weights, "heads.teacher").tolist()
            for p, t in zip(predicted, features[i].tolist(), strict=True):
                distances.append(plain.token_loss(p, t, "cosine"))
    assert len(distances) == 2 * 17
    assert abs(float(losses["total"].detach()) / 2 - sum(distances) / len(distances)) < 1e-6


def test_revealed_patches_are_drawn_one_after_the_other_without_replacement() -> None:
    """Ordered pairs out of five, against exact numbers and MILAN's own torch.multinomial."""
    weights, rows = [0.35, 0.3, 0.2, 0.1, 0.05], 200_000
    attention = torch.tensor([weights]).expand(rows, -1)
    noise = hash_uniform(0, 0, torch.arange(rows), 5)
    mask = Mask(sampler="reveal_salient")
    ours = select_patches(attention, noise, sampler=mask.sampler, num_keep=2, floor=mask.floor)
    milans = torch.multinomial(attention, 5, generator=torch.manual_seed(8))[:, :2]
    shares = [torch.bincount(d[:, 0] * 5 + d[:, 1], minlength=25) for d in (ours.ids_keep, milans)]
    for i, j in itertools.permutations(range(5), 2):
        exact = weights[i] * weights[j] / (1 - weights[i])
        for share in shares:  # standard deviation of a share: below 0.0008
            assert abs(float(share[5 * i + j]) / rows - exact) < 0.003, (i, j)


@pytest.mark.parametrize("sampler", ["random", "hide_salient"])
def test_predicting_fewer_patches_changes_no_prediction_and_no_target(sampler: str) -> None:
    images, found = random_images(2), []
    attention = torch.rand(2, 16, generator=torch.manual_seed(9))
    for ratio in (None, 0.25):
        config = mae_config(
            decoder__type="cross", decoder__predict_ratio=ratio, mask__sampler=sampler
        )
        model = CollaborativeMAE(config)
        initialise(model, 0)
        shake(model)
        layout = TokenLayout.from_config(config, 4, 12)
        count = layout.num_hidden
        choice = choose_masks(config.mask, attention, torch.arange(2), 0, 0.0, num_predicted=count)
        target = layout.gather(pixel_targets(patchify(images, 16), "patch"), choice)
        prediction = model(images, choice)["pixel"]
        assert prediction.shape == target.shape == (2, 12 if ratio is None else 4, 768)
        found.append((choice.ids_hidden[:, :count], prediction.detach(), target))
    whole, fewer = found
    places = (fewer[0][:, :, None] == whole[0][:, None, :]).int().argmax(dim=2)
    for row in range(2):
        assert torch.equal(whole[0][row, places[row]], fewer[0][row])
        assert float((whole[1][row, places[row]] - fewer[1][row]).abs().max()) < 1e-6
        assert torch.equal(whole[2][row, places[row]], fewer[2][row])
    assert torch.equal(places, torch.arange(4).expand(2, -1)) == (sampler == "random")
