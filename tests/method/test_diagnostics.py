"""Diagnostics against float64 references and cases that are known by hand."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cmtmae_scale.method.diagnostics import constant_loss, spread_tokens, token_diagnostics
from cmtmae_scale.method.targets import token_loss
from tests.references import diagnostics as reference
from tests.references import targets


def random_tokens(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_measures_match_the_reference(dtype: torch.dtype) -> None:
    tokens = (random_tokens(4, 9, 24) + 0.7).to(dtype)
    rank, cosine = token_diagnostics(tokens)
    plain = tokens.double().flatten(0, 1).tolist()
    assert rank.dtype == cosine.dtype == torch.float32 and rank.shape == cosine.shape == ()
    assert float(rank) == pytest.approx(reference.effective_rank(plain), rel=1e-4)
    assert float(cosine) == pytest.approx(reference.pairwise_cosine(plain), abs=1e-5)


def test_cases_known_by_hand() -> None:
    basis = torch.eye(8).view(2, 4, 8)
    assert [float(x) for x in token_diagnostics(basis)] == pytest.approx([8.0, 0.0], abs=1e-5)
    same = torch.arange(1.0, 9.0).expand(2, 4, 8)
    assert [float(x) for x in token_diagnostics(same)] == pytest.approx([1.0, 1.0], abs=1e-3)
    # singular values 3 and 1: shares 3/4 and 1/4
    two = torch.tensor([[[3.0, 0.0], [0.0, 1.0]]])
    entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert float(token_diagnostics(two)[0]) == pytest.approx(math.exp(entropy), rel=1e-5)
    assert [float(x) for x in token_diagnostics(torch.zeros(1, 4, 3))] == [1.0, 0.0]


def test_a_token_that_is_not_finite_gives_nan_and_no_error() -> None:
    tokens = random_tokens(2, 4, 3)
    tokens[1, 2, 0] = float("inf")
    assert all(bool(value.isnan()) for value in token_diagnostics(tokens))
    with pytest.raises(ValueError, match="at least two"):
        token_diagnostics(random_tokens(1, 1, 3))


@pytest.mark.parametrize(
    ("batch", "length", "expected"),
    [(1, 196, 196), (2, 196, 256), (3, 196, 255), (64, 196, 256), (256, 196, 256), (1000, 4, 256)],
)
def test_tokens_are_distinct_and_spread_over_images_and_patches(
    batch: int, length: int, expected: int
) -> None:
    names = torch.cartesian_prod(torch.arange(batch), torch.arange(length)).view(batch, length, 2)
    taken = spread_tokens(names)
    assert torch.equal(taken, spread_tokens(names))
    assert len(taken) == len({tuple(name) for name in taken.tolist()}) == expected
    per_image = torch.bincount(taken[:, 0], minlength=batch)
    assert int(per_image.max() - per_image.min()) <= 1
    per_quarter = torch.bincount(taken[:, 1] * 4 // length, minlength=4) / expected
    assert float((per_quarter - 0.25).abs().max()) < 0.05


@pytest.mark.parametrize("kind", ["cosine", "mse", "smooth_l1"])
def test_the_loss_of_a_constant_matches_loops_and_no_constant_is_better(kind: str) -> None:
    tokens = random_tokens(2, 5, 6) + 1.5
    plain = tokens.double().flatten(0, 1).tolist()
    rows = [targets.l2(row) for row in plain] if kind == "cosine" else plain
    mean = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    expected = sum(targets.token_loss(mean, row, kind) for row in plain) / len(plain)
    found = float(constant_loss(tokens, kind, 2.0))
    assert found == pytest.approx(expected, rel=1e-5)
    if kind != "smooth_l1":
        for other in torch.tensor(mean) + 0.1 * random_tokens(20, 6):
            one = other.expand(10, -1)
            assert token_loss(one, tokens.flatten(0, 1), kind).mean() >= found - 1e-6
    assert float(constant_loss(torch.ones(2, 4, 6), kind, 2.0)) == pytest.approx(0, abs=1e-6)


def test_diagnostics_run_on_fake_tensors() -> None:
    with FakeTensorMode():
        token_diagnostics(torch.empty(4, 16, 8))
        constant_loss(torch.empty(4, 16, 8), "cosine", 2.0)
