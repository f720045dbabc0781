"""What a column shows: predictions at their places, colours that do not depend on a basis."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from cmtmae_scale.config.load import load_config
from cmtmae_scale.config.schema import Config, NamedTeacher
from cmtmae_scale.method.images import IMAGENET_MEAN, IMAGENET_STD, normalise_images
from cmtmae_scale.method.masking import PatchChoice
from cmtmae_scale.method.targets import TokenLayout, patchify, pixel_targets
from cmtmae_scale.pretraining.scalars import scalars_at
from cmtmae_scale.tools.figures.columns import (
    Networks,
    compute_columns,
    name_maps,
    place_on_grid,
    principal_colours,
    reconstruct,
)

SIDE, PATCH = 24, 8
LENGTH = (SIDE // PATCH) ** 2


def choice_of(rows: int, keep: int, hidden: int) -> PatchChoice:
    generator = torch.Generator().manual_seed(1)
    order = torch.stack([torch.randperm(LENGTH, generator=generator) for _ in range(rows)])
    return PatchChoice(order[:, :keep], order[:, keep : keep + hidden], order[:, keep + hidden :])


def images(rows: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (rows, SIDE, SIDE, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("norm", ["patch", "none"])
@pytest.mark.parametrize("num_visible", [0, 3])
def test_perfect_predictions_give_the_image_back(norm: str, num_visible: int) -> None:
    config = Config()
    config.target.pixel.norm = norm
    photographs, choice = images(4), choice_of(4, 3, 6)
    layout = TokenLayout(True, num_visible, 6)
    pixels = normalise_images(photographs, IMAGENET_MEAN, IMAGENET_STD)
    targets = layout.without_cls().gather(pixel_targets(patchify(pixels, PATCH), norm), choice)
    column = reconstruct(config, targets, pixels, layout, choice)
    # float32: a unit in the last place of values up to 255
    torch.testing.assert_close(column.values, photographs.float() / 255, rtol=0, atol=1e-5)
    assert column.hidden is not None and not column.hidden.any()


def test_each_of_several_teachers_has_a_map_beside_the_mix() -> None:
    config, one = Config(), torch.full((2, 4), 0.25)
    config.collaboration.alpha_attention = config.collaboration.alpha_target = 0.5
    config.teachers = [NamedTeacher(name="a"), NamedTeacher(name="b")]
    config.teachers[1].attention_source = "activation_norm"
    maps = name_maps(config, {"a": one, "b": one}, one, one)
    titles = ["teacher a", "teacher b, activation norm", "EMA weights", "collaborative"]
    assert [*maps] == titles
    assert [*name_maps(config, {"a": one, "b": one}, None, one)] == [*titles[:2], "collaborative"]
    assert [*name_maps(Config(), {"": one}, None, one)] == ["teacher"]


class Network:
    """Records that it is moved; its forward finds no memory."""

    encoder = SimpleNamespace(grid=(SIDE // PATCH, SIDE // PATCH))

    def __init__(self) -> None:
        self.moves: list[str] = []

    def to(self, *_: Any) -> "Network":
        self.moves.append("to the device")
        return self

    def cpu(self) -> None:
        self.moves.append("back")

    def __call__(self, _: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("no memory")


def test_networks_do_not_stay_on_the_device_after_a_sheet_that_failed() -> None:
    """Training, which continues, needs the memory."""
    model, momentum = Network(), Network()
    networks = Networks({}, cast(Any, model), cast(Any, momentum))
    config = load_config("demo")
    scalars = scalars_at(config, 0.5)
    with pytest.raises(torch.OutOfMemoryError):
        compute_columns(config, networks, TokenLayout(True, 3, 6), (images(2),), scalars, {})
    assert model.moves == momentum.moves == ["to the device", "back"]


def test_what_is_neither_seen_nor_predicted_is_greyed_out() -> None:
    photographs, choice = images(2), choice_of(2, 3, 4)
    layout = TokenLayout(False, 0, 3)  # one hidden patch is not predicted, two are thrown away
    pixels = normalise_images(photographs, IMAGENET_MEAN, IMAGENET_STD)
    predicted = torch.zeros(2, 3, 3 * PATCH**2)
    column = reconstruct(Config(), predicted, pixels, layout, choice)
    assert column.hidden is not None
    for row, hidden in enumerate(column.hidden.flatten(1)):
        grey = {*choice.ids_thrown[row].tolist(), int(choice.ids_hidden[row, 3])}
        assert set(hidden.nonzero().flatten().tolist()) == grey


def test_values_land_at_their_patches_and_nowhere_else() -> None:
    choice, layout = choice_of(3, 2, 5), TokenLayout(True, 2, 4)
    values = torch.rand(3, 6, generator=torch.Generator().manual_seed(2))
    placed = place_on_grid(values, layout, choice)
    for row in range(3):
        ids = [*choice.ids_keep[row].tolist(), *choice.ids_hidden[row, :4].tolist()]
        assert [placed[row, i].item() for i in ids] == values[row].tolist()
        assert placed[row].isnan().sum() == LENGTH - 6


def features(rows: int = 2, tokens: int = 30, width: int = 10) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    scales = torch.tensor([9.0, 6.0, 4.0, *[0.2] * (width - 3)])
    return torch.randn(rows, tokens, width, generator=generator) * scales


def test_colours_do_not_depend_on_the_basis_of_the_features() -> None:
    x = features()
    reference = torch.rand(2, 30, 3, generator=torch.Generator().manual_seed(4))
    basis = torch.linalg.qr(torch.randn(10, 10, generator=torch.Generator().manual_seed(5))).Q
    expected = principal_colours(x, reference)
    assert expected.std() > 0.1
    for same in (-x, x + 5, 3 * x, x.flip(-1), x @ basis):
        torch.testing.assert_close(principal_colours(same, reference), expected, rtol=0, atol=1e-4)


def test_colours_stay_when_components_change_places() -> None:
    x = features()
    reference = torch.rand(2, 30, 3, generator=torch.Generator().manual_seed(4))
    other = x * torch.tensor([4.0, 1.0, 9.0, *[1.0] * 7])  # the third is now the largest
    before, after = principal_colours(x, reference), principal_colours(other, reference)
    # whitened, the three span the same space but for the noise of the other seven
    torch.testing.assert_close(after, before, rtol=0, atol=0.1)


def test_features_equal_to_the_reference_keep_its_order_of_colours() -> None:
    reference = torch.rand(2, 30, 3, generator=torch.Generator().manual_seed(6))
    found = principal_colours(reference, reference).flatten(0, 1)
    for channel in range(3):
        pair = torch.stack([found[:, channel], reference.flatten(0, 1)[:, channel]])
        assert torch.corrcoef(pair)[0, 1] > 0.95


@pytest.mark.parametrize("width", [3, 10])
def test_features_that_do_not_vary_are_grey(width: int) -> None:
    reference = torch.rand(2, 30, 3, generator=torch.Generator().manual_seed(6))
    found = principal_colours(torch.ones(2, 30, width), reference)
    assert (found == 0.5).all()
