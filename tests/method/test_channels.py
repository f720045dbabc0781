"""Statistics per channel of target features against loops in float64."""

import pytest
import torch

from cmtmae_scale.method.channels import ChannelMoments, ChannelScaling, merge_moments, sum_channels
from cmtmae_scale.method.targets import normalise
from tests.references import targets as reference

FEATURES, DECAY = 5, 0.9


def features_of(views: int, seed: int) -> torch.Tensor:
    """Tokens with channels of unequal means and spreads."""
    x = torch.randn(views, 9, FEATURES, generator=torch.manual_seed(seed))
    return x * torch.tensor([1e-3, 0.1, 1.0, 5.0, 30.0]) + torch.tensor([0.0, 3.0, -1.0, 40.0, 9.0])


def no_moments(groups: int) -> ChannelMoments:
    shape = (groups, FEATURES)
    return ChannelMoments(
        *(torch.zeros(s, dtype=torch.float64) for s in ((groups, 1), shape, shape))
    )


@pytest.mark.parametrize("num_prefix", [0, 1])
def test_running_statistics_match_the_reference(num_prefix: int) -> None:
    """Invalid views, whatever they hold, and steps without a valid view add nothing."""
    moments = no_moments(1 + num_prefix)
    groups: list[list[list[list[float]]]] = [[] for _ in range(1 + num_prefix)]
    valid = [[True, True, True], [True, False, True], [False] * 3, [True, True, False]]
    for step, flags in enumerate(valid):
        x = features_of(3, seed=step) + 0.2 * step
        for view, is_valid in enumerate(flags):
            x[view] = x[view] if is_valid else torch.nan
        mean = moments.mean.float()
        parts = (slice(0, 1), slice(1, 3))  # two micro-batches
        sums = [sum_channels(x[part], torch.tensor(flags)[part], mean) for part in parts]
        moments = merge_moments(moments, sums[0] + sums[1], mean, DECAY)
        seen = x[torch.tensor(flags)].double()
        tokens = [seen[:, :1], seen[:, 1:]] if num_prefix else [seen]
        for group, values in zip(groups, tokens, strict=True):
            group.append(values.flatten(0, 1).tolist())
    for number, group in enumerate(groups):
        total, mean, var = reference.discounted_statistics(group, DECAY)
        std = torch.tensor(var).sqrt()
        assert float(moments.num_tokens[number]) == pytest.approx(total)
        assert ((moments.mean[number] - torch.tensor(mean)).abs() / std).max() < 1e-4
        assert moments.variance[number].tolist() == pytest.approx(var, rel=1e-4)


def test_a_step_without_a_valid_view_changes_no_bit() -> None:
    x, yes, no = (
        features_of(2, 0),
        torch.ones(2, dtype=torch.bool),
        torch.zeros(2, dtype=torch.bool),
    )
    zero = torch.zeros(2, FEATURES)
    before = merge_moments(no_moments(2), sum_channels(x, yes, zero), zero, DECAY)
    after = merge_moments(before, sum_channels(x, no, zero), zero, DECAY)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_scaling_applies_each_groups_own_statistics() -> None:
    x = features_of(2, 1)
    mean = torch.stack([x[:, 0].mean(0), x[:, 1:].mean((0, 1))])
    std = torch.stack([x[:, 0].std(0, False), x[:, 1:].std((0, 1), False)])
    out = normalise(x, "channel", 1, ChannelScaling(mean, 1 / std))
    for tokens in (out[:, 0], out[:, 1:].flatten(0, 1)):
        assert tokens.mean(0).abs().max() < 1e-4
        assert tokens.std(0, False).tolist() == pytest.approx([1.0] * FEATURES, rel=1e-4)
    centred = normalise(x, "center", 1, ChannelScaling(mean, torch.ones_like(mean)))
    assert torch.allclose(centred[:, 1:], x[:, 1:] - mean[1])
    for kind in ("channel", "center"):
        with pytest.raises(ValueError, match="needs statistics"):
            normalise(x, kind, 1)


@pytest.mark.parametrize("num_prefix", [0, 1])
def test_instance_norm_matches_loops(num_prefix: int) -> None:
    x = features_of(2, 2).double().requires_grad_()
    out = normalise(x, "instance", num_prefix)
    assert out.dtype == torch.float32 and not out.requires_grad
    for view, expected in zip(out, x.detach(), strict=True):
        patches = reference.instance_norm(expected[num_prefix:].tolist())
        for token, plain in zip(view[num_prefix:], patches, strict=True):
            assert token.tolist() == pytest.approx(plain, abs=1e-4)
        for token, plain in zip(view[:num_prefix], expected, strict=False):
            assert token.tolist() == pytest.approx(reference.layer_norm(plain.tolist()), abs=1e-5)
