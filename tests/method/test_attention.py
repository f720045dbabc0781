"""Attention maps against plain references and numbers known by hand."""

import math

import pytest
import torch

from cmtmae_scale.config.schema import Attention
from cmtmae_scale.method.attend import attend, attention_dtype
from cmtmae_scale.method.attention import (
    activation_map,
    collaborative_attention,
    map_agreement,
    mean_agreement,
    mean_query_row,
    mix_attention,
    normalise_map,
    patch_map,
    resize_map,
    resize_tokens,
    sharpen,
    visible_mass,
)
from tests.references import attention as reference

TEACHER = torch.tensor([[0.50, 0.30, 0.15, 0.05]])
STUDENT = torch.tensor([[0.10, 0.20, 0.30, 0.40]])
MIXED = {
    1.0: (0.5, 0.3, 0.15, 0.05),
    0.75: (0.4, 0.275, 0.1875, 0.1375),
    0.5: (0.3, 0.25, 0.225, 0.225),
    0.25: (0.2, 0.225, 0.2625, 0.3125),
    0.0: (0.1, 0.2, 0.3, 0.4),
}


def close(found, expected, tolerance=1e-6):
    torch.testing.assert_close(found, torch.tensor(expected), atol=tolerance, rtol=0)


def test_heads_are_averaged_before_the_prefix_is_dropped():
    scores = torch.tensor([0.0, math.log(2), math.log(3), math.log(4)])
    key = torch.stack([scores, torch.zeros(4)]).view(1, 2, 4, 1)
    query = torch.ones(1, 2, 1, 1)
    first = mean_query_row(query[:, :1], key[:, :1], 1.0)
    close(first, [[0.1, 0.2, 0.3, 0.4]])
    close(patch_map(first, 1), [[0.222222, 0.333333, 0.444444]])
    both = mean_query_row(query, key, 1.0)
    close(both, [[0.175, 0.225, 0.275, 0.325]])
    found = patch_map(both, 1)
    close(found, [[0.272727, 0.333333, 0.393939]])
    assert not torch.allclose(found, torch.tensor([[0.277778, 0.333333, 0.388889]]), atol=1e-3)


def test_rows_match_loops():
    generator = torch.manual_seed(1)
    q = torch.randn(2, 3, 5, 4, generator=generator)
    k = torch.randn(2, 3, 7, 4, generator=generator)
    for b in range(2):
        rows = [reference.row(q[b, :, i].tolist(), k[b].tolist(), 0.5) for i in range(5)]
        close(mean_query_row(q[:, :, 2:3], k, 0.5)[b], rows[2])
        mean = [sum(column) / 5 for column in zip(*rows, strict=True)]
        close(mean_query_row(q, k, 0.5)[b], mean)


def test_rows_are_float32_under_autocast():
    q, k = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 6, 8)
    expected = mean_query_row(q, k, 0.3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mean_query_row(q, k, 0.3), expected)
    assert mean_query_row(q.bfloat16(), k.bfloat16(), 0.3).dtype == torch.float32


@pytest.mark.parametrize("alpha", list(MIXED))
def test_mix(alpha):
    close(collaborative_attention(TEACHER, STUDENT, alpha), [MIXED[alpha]])
    close(collaborative_attention(TEACHER, STUDENT, torch.tensor(alpha)), [MIXED[alpha]])


@pytest.mark.parametrize("alpha", list(MIXED))
def test_the_class_tokens_own_attention_does_not_change_alpha(alpha):
    teacher = torch.tensor([[0.05, 0.475, 0.285, 0.1425, 0.0475]])
    student = torch.tensor([[0.80, 0.02, 0.04, 0.06, 0.08]])
    mixed = collaborative_attention(teacher[:, 1:], student[:, 1:], alpha)
    close(mixed, [MIXED[alpha]])
    if alpha == 0.5:
        assert not torch.allclose(mixed, torch.tensor([[0.2475, 0.1625, 0.10125, 0.06375]]))


@pytest.mark.parametrize("norm", list(reference.NORMS))
def test_normalisations_match_loops(norm):
    values = torch.rand(4, 9, generator=torch.manual_seed(2))
    values[0, 3] = values[0, 5]  # a tie
    values[1, :4] = torch.tensor([float("nan"), float("inf"), -float("inf"), -1.0])
    values[2] = 0.0
    values[3] = 1e-14
    other = torch.rand(4, 9, generator=torch.manual_seed(3))
    for b in range(4):
        close(normalise_map(values, norm)[b], reference.NORMS[norm](values[b].tolist()), 2e-6)
        expected = reference.blend(values[b].tolist(), other[b].tolist(), 0.3, norm)
        close(collaborative_attention(values, other, 0.3, norm)[b], expected, 2e-6)


def test_huge_and_tiny_maps_keep_their_mass():
    close(normalise_map(torch.tensor([[3e38, 3e38, 3e38, 0.0]]))[0, :3].sum(), 1.0)
    close(normalise_map(torch.tensor([[1e-42, 0.0]])), [[0.5, 0.5]])
    for scale in (1e-3, 7.0, 1e20):
        close(collaborative_attention(TEACHER * scale, STUDENT, 0.5), [MIXED[0.5]])


def test_temperature_and_norms():
    close(sharpen(TEACHER, 0.5), [[0.684932, 0.246575, 0.061644, 0.006849]])
    close(sharpen(TEACHER, 2.0), [[0.378996, 0.293569, 0.207585, 0.119849]])
    close(sharpen(TEACHER, 0.5)[0], reference.temper(TEACHER[0].tolist(), 0.5))
    close(normalise_map(TEACHER, "minmax"), [[1.0, 0.555556, 0.222222, 0.0]])
    close(normalise_map(TEACHER, "rank"), [[0.875, 0.625, 0.375, 0.125]])
    close(normalise_map(TEACHER, "zscore"), [[1.474420, 0.294884, -0.589768, -1.179536]])
    close(normalise_map(STUDENT, "zscore"), [[-1.341641, -0.447214, 0.447214, 1.341641]], 2e-6)


def test_sharpen_clamps_outliers_and_survives_extremes():
    values = torch.tensor([[1.0] * 9 + [91.0]])
    assert float(sharpen(values)[0, -1]) == pytest.approx(0.91)
    assert float(sharpen(values, clip_quantile=0.5)[0, -1]) == pytest.approx(0.1)
    cold = sharpen(torch.tensor([[1e-6, 2e-6, 0.0]]), temperature=0.01)
    close(cold, [[0.0, 1.0, 0.0]])
    close(sharpen(torch.zeros(1, 4), temperature=0.01), [[0.25] * 4])
    with pytest.raises(ValueError, match="temperature"):
        sharpen(values, 0.0)
    with pytest.raises(ValueError, match="clip_quantile"):
        sharpen(values, 1.0, 1.5)


def test_resize():
    image = torch.arange(16.0).view(1, 16)
    close(resize_tokens(image[..., None], (4, 4), (2, 2))[0, :, 0], [2.5, 4.5, 10.5, 12.5])
    close(resize_map(image, (4, 4), (2, 2)), [[2.5 / 30, 4.5 / 30, 10.5 / 30, 12.5 / 30]])
    large = resize_tokens(torch.tensor([[0.0, 1.0, 4.0, 5.0]])[..., None], (2, 2), (4, 4))
    close(large.view(4, 4), [[0.0, 0, 1, 1], [0, 0, 1, 1], [4, 4, 5, 5], [4, 4, 5, 5]])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_stays_so_until_maps_are_mixed(value: float):
    """As a uniform map it would hide that the network has failed."""
    tokens = torch.rand(2, 16, 3)
    tokens[1, 5, 0] = value
    query = tokens[:, None, 5:6]  # of the second row it is not finite
    maps = (
        patch_map(mean_query_row(query, torch.rand(2, 1, 17, 3), 1.0), 1),
        activation_map(tokens),
        resize_map(tokens[:, :, 0], (4, 4), (2, 2)),
    )
    for found in maps:
        close(found[:1].sum(1), [1.0])
        assert bool(found[1].isnan().all())
        mixed = collaborative_attention(found, None, 1.0)
        close(mixed[1], [1 / mixed.shape[1]] * mixed.shape[1])


def test_resize_keeps_mass_and_uniformity():
    values = torch.rand(3, 256)
    for grid in ((14, 14), (16, 16), (8, 32), (20, 12)):
        resized = resize_map(values, (16, 16), grid)
        assert resized.shape == (3, grid[0] * grid[1])
        close(resized.sum(1), [1.0] * 3, 1e-5)
        assert float(resized.min()) >= 0.0
        close(resize_map(torch.ones(1, 256), (16, 16), grid)[0, :2] * grid[0] * grid[1], [1.0, 1.0])
    with pytest.raises(ValueError, match="do not fill"):
        resize_map(values, (16, 15), (14, 14))


def test_a_missing_map_must_have_no_weight():
    close(collaborative_attention(TEACHER, None, 1.0), [MIXED[1.0]])
    close(collaborative_attention(None, STUDENT, 0), [MIXED[0.0]])
    with pytest.raises(ValueError, match="weight to the student's attention map"):
        collaborative_attention(TEACHER, None, 0.5)
    with pytest.raises(ValueError, match="weight to the teacher's attention map"):
        collaborative_attention(None, STUDENT, 0.5)
    with pytest.raises(ValueError, match="neither"):
        collaborative_attention(None, None, 0.5)
    with pytest.raises(ValueError, match="differ in shape"):
        collaborative_attention(TEACHER, STUDENT[:, :3], 0.5)
    with pytest.raises(ValueError, match="not one of prob"):
        normalise_map(TEACHER, "softmax")


def test_maps_have_no_gradient():
    teacher = TEACHER.clone().requires_grad_()
    assert not collaborative_attention(teacher, STUDENT, 0.5).requires_grad


@pytest.mark.parametrize("norm", reference.NORMS)
def test_several_teachers_are_normalised_each_then_averaged_by_weight(norm):
    generator = torch.Generator().manual_seed(3)
    first, second, student = torch.rand(3, 2, 9, generator=generator) ** 3
    settings = Attention(norm=norm, temperature=0.5)
    maps, weights = {"a": first, "b": second}, {"a": 3.0, "b": 1.0, "unused": 5.0}
    found = mix_attention(settings, maps, weights, student, torch.tensor(0.25))
    assert found is not None
    for row in range(2):
        own = [reference.temper(one[row].tolist(), 0.5) for one in (first, second, student)]
        a, b, s = (reference.NORMS[norm](one) for one in own)
        mean = [0.75 * x + 0.25 * y for x, y in zip(a, b, strict=True)]
        expected = [0.25 * x + 0.75 * y for x, y in zip(mean, s, strict=True)]
        close(found[row], expected, 1e-5)
    one = mix_attention(settings, {"a": first}, {"a": 7.0}, student, 0.25)
    sharp = (sharpen(values, 0.5) for values in (first, student))
    torch.testing.assert_close(one, collaborative_attention(*sharp, 0.25, norm), rtol=0, atol=0)
    assert mix_attention(settings, {}, {}, None, 0.25) is None
    with pytest.raises(ValueError, match="weight to the student's attention map"):
        mix_attention(settings, maps, weights, None, 0.25)


def test_the_agreement_of_several_maps_is_the_mean_over_pairs():
    first, second, third = torch.rand(3, 4, 9, generator=torch.Generator().manual_seed(4))
    pairs = [(first, second), (first, third), (second, third)]
    expected = sum(float(map_agreement(*pair)) for pair in pairs) / 3
    assert float(mean_agreement([first, second, third])) == pytest.approx(expected, abs=1e-6)


def test_agreement_and_visible_mass():
    assert float(map_agreement(TEACHER, STUDENT)) == pytest.approx(-1.0)
    assert float(map_agreement(TEACHER, TEACHER**2)) == pytest.approx(1.0)
    assert float(map_agreement(TEACHER, TEACHER * 3, "cosine")) == pytest.approx(1.0)
    shifted = TEACHER - TEACHER.mean()  # zscore: half of the patches are negative
    assert float(map_agreement(TEACHER, shifted)) == pytest.approx(1.0)
    assert float(map_agreement(-shifted, TEACHER)) == pytest.approx(-1.0)
    both = torch.cat([TEACHER, STUDENT])
    assert float(map_agreement(both, TEACHER.expand(2, -1))) == pytest.approx(0.0, abs=1e-6)
    keep = torch.tensor([[0, 3], [0, 1], [2, 3], [0, 1]])  # two masks per view
    expected = (0.55 + 0.80 + 0.70 + 0.30) / 4
    assert float(visible_mass(both, keep)) == pytest.approx(expected)
    with pytest.raises(ValueError, match="not one of rank"):
        map_agreement(TEACHER, STUDENT, "kendall")


@pytest.mark.parametrize(
    ("device", "dtype", "has_backward", "expected"),
    [
        ("cpu", torch.bfloat16, True, torch.float32),
        ("cpu", torch.bfloat16, False, torch.bfloat16),
        ("cpu", torch.float32, True, torch.float32),
        ("cpu", torch.float32, False, torch.float32),
        ("cuda", torch.bfloat16, True, torch.bfloat16),
        ("cuda", torch.bfloat16, False, torch.bfloat16),
        ("meta", torch.bfloat16, True, torch.bfloat16),
    ],
)
def test_the_dtype_of_attention_follows_device_dtype_and_pass(
    device, dtype, has_backward, expected
):
    assert attention_dtype(device, dtype, has_backward) == expected


@pytest.mark.parametrize(
    ("dtype", "trained", "bound"),
    [(torch.float32, True, 1e-6), (torch.bfloat16, True, 2.0**-8), (torch.bfloat16, False, 2e-2)],
)
def test_attention_and_its_gradients_equal_a_float64_reference(dtype, trained, bound):
    """With a backward in bf16 only inputs, output and gradients are rounded, each once."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 3, tokens, 8, generator=generator).to(dtype) for tokens in (5, 9, 9)]
    weight = torch.randn(2, 3, 5, 8, generator=generator).to(dtype)
    given = [one.clone().requires_grad_(trained) for one in inputs]
    exact = [one.double().requires_grad_(trained) for one in inputs]
    q, k, v = exact
    expected = (q @ k.transpose(-2, -1) / 8**0.5).softmax(-1) @ v
    output = attend(*given)
    assert output.dtype == dtype
    pairs = [(output, expected)]
    if trained:
        output.backward(weight)
        expected.backward(weight.double())
        pairs += [(one.grad, other.grad) for one, other in zip(given, exact, strict=True)]
    for found, wanted in pairs:
        assert found.dtype == dtype
        assert (found.double() - wanted).abs().max() <= bound * wanted.abs().max()
