"""Statistics per channel of target features: their sums over views, and how they are applied.

Legend: B views in a micro-batch, T tokens (class token, if any, then N patches), F channels, G
groups of tokens that have statistics of their own: class tokens, if any, then patches.

Source: docs/method.md, section "Statistics per channel".
"""

from typing import NamedTuple

import torch
from torch import Tensor


class ChannelScaling(NamedTuple):
    """Values that are subtracted from features, and the factor that follows; float32."""

    mean: Tensor
    """``[G, F]``."""
    factor: Tensor
    """``[G, F]``; 1 for centring; 0 where a standard deviation is not known yet."""

    def apply(self, features: Tensor) -> Tensor:
        """Return ``(features - mean) * factor`` of float32 features ``[B, T, F]``."""
        length = features.shape[1]
        return (features - spread(self.mean, length)) * spread(self.factor, length)


class ChannelMoments(NamedTuple):
    """Discounted statistics of all views so far; float64."""

    num_tokens: Tensor
    """``[G, 1]``; 0: no statistics are known."""
    mean: Tensor
    """``[G, F]``."""
    variance: Tensor
    """``[G, F]``, biased."""


def spread(values: Tensor, length: int) -> Tensor:
    """Return the values of each token's group, ``[T, F]`` of ``[G, F]``."""
    num_prefix = len(values) - 1
    return torch.cat([values[:num_prefix], values[num_prefix:].expand(length - num_prefix, -1)])


def sum_channels(features: Tensor, valid: Tensor, mean: Tensor) -> Tensor:
    """Sum count, deviations and squared deviations over the valid views of a micro-batch.

    Args:
        features: ``[B, T, F]``, any float dtype.
        valid: views that count, bool ``[B]``; others add exactly 0, whatever they hold.
        mean: float32 ``[G, F]``, from which deviations are taken, so that squares do not cancel.

    Returns:
        Float32 ``[G, 1 + 2 F]``. No gradient, no host synchronisation.
    """
    x = features.detach().float() - spread(mean, features.shape[1])
    x = torch.where(valid[:, None, None], x, 0.0)
    num_prefix = len(mean) - 1
    groups = [x[:, :num_prefix], x[:, num_prefix:]] if num_prefix else [x]
    views = valid.sum().float().reshape(1)
    return torch.stack(
        [
            torch.cat([views * one.shape[1], one.sum((0, 1)), one.square().sum((0, 1))])
            for one in groups
        ]
    )


def merge_moments(
    moments: ChannelMoments, sums: Tensor, mean: Tensor, decay: float
) -> ChannelMoments:
    """Add the sums of a step to discounted statistics.

    Args:
        moments: of the steps before.
        sums: ``[G, 1 + 2 F]`` over all micro-batches and ranks, see ``sum_channels``.
        mean: as for ``sum_channels``.
        decay: factor of the earlier tokens' count.

    Returns:
        Moments of both; the earlier moments where the step has no valid view.

    Source: T. F. Chan, G. H. Golub and R. J. LeVeque, "Algorithms for computing the sample
    variance", The American Statistician 37 (1983): combining means and variances of two sets.
    """
    width = mean.shape[1]
    added, first, second = (
        sums[:, a:b].double() for a, b in ((0, 1), (1, 1 + width), (1 + width, None))
    )
    count = added.clamp_min(1)
    shift = first / count
    own_mean = mean.double() + shift
    own_variance = (second / count - shift.square()).clamp_min(0)
    kept = decay * moments.num_tokens
    total = (kept + added).clamp_min(1)
    share = added / total
    apart = own_mean - moments.mean
    merged = ChannelMoments(
        kept + added,
        moments.mean + share * apart,
        (1 - share) * moments.variance + share * own_variance + share * (1 - share) * apart**2,
    )
    return ChannelMoments(
        *(torch.where(added > 0, new, old) for new, old in zip(merged, moments, strict=True))
    )
