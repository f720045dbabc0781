"""How features are stored: as they are in bf16, or as int8 over standardised channels.

CLIP-like features have a few channels far from zero and far larger than the rest. One scale a token
would give these all of the range; standardising channels first gives each its own. A raw cosine
hides that damage, so fidelity is judged on standardised features.
"""

from collections.abc import Iterable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Codec = Literal["int8", "bf16", "attention"]

LEVELS = 127
_SMALLEST = 2.0**-14
"""Smallest scale: below it float16 loses bits."""


class Calibration(NamedTuple):
    """What standardises channels, frozen when a cache is begun."""

    mean: Tensor
    """Of each channel, ``[F]`` float32."""
    std: Tensor
    """Deviation of each channel, ``[F]`` float32, above 0."""


class Encoded(NamedTuple):
    """Stored features."""

    values: Tensor
    """``[B, T, F]`` int8, or bfloat16."""
    scales: Tensor | None
    """One a token, ``[B, T]`` float16, for int8."""


def calibrate(batches: Iterable[Tensor]) -> Calibration:
    """Mean and deviation of each channel over all tokens.

    Args:
        batches: features ``[B, T, F]``; rows that are not finite are to be left out before.

    Raises:
        ValueError: if there is no token.
    """
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for features in batches:
        tokens = features.flatten(0, -2).double()
        count += len(tokens)
        total = total.to(tokens.device) + tokens.sum(0)
        squares = squares.to(tokens.device) + tokens.square().sum(0)
    if not count:
        raise ValueError("no token to calibrate with")
    mean = total / count
    std = (squares / count - mean.square()).clamp_min(0).sqrt()
    # A channel that never moves is stored exactly by its mean.
    std = torch.where(std > 1e-6 * std.max().clamp_min(1e-30), std, torch.ones_like(std))
    return Calibration(mean.float().cpu(), std.float().cpu())


def encode(features: Tensor, codec: Codec, calibration: Calibration | None) -> Encoded:
    """Store features.

    Args:
        features: ``[B, T, F]``, finite.
        codec: ``int8`` or ``bf16``.
        calibration: for int8; on any device.
    """
    if codec == "bf16":
        return Encoded(features.to(torch.bfloat16), None)
    if codec != "int8" or calibration is None:
        raise ValueError(f"codec {codec} stores no features, or lacks its calibration")
    mean, std = (one.to(features.device) for one in calibration)
    standard = (features.float() - mean) / std
    scales = (standard.abs().amax(-1) / LEVELS).clamp_min(_SMALLEST).half()
    values = (standard / scales.float().unsqueeze(-1)).round_().clamp_(-LEVELS, LEVELS)
    return Encoded(values.to(torch.int8), scales)


def decode(encoded: Encoded, calibration: Calibration | None) -> Tensor:
    """Features ``[B, T, F]``: float32 from int8, bfloat16 as stored. No host synchronisation.

    Args:
        encoded: on any device.
        calibration: for int8, on the same device.
    """
    if encoded.scales is None:
        return encoded.values
    if calibration is None:
        raise ValueError("int8 features need the calibration that they were stored with")
    standard = encoded.values.float() * encoded.scales.float().unsqueeze(-1)
    return torch.addcmul(calibration.mean, standard, calibration.std)


def as_stored(features: Tensor, codec: Codec, calibration: Calibration | None) -> Tensor:
    """Features as they come out of a cache.

    Args:
        features: ``[B, T, F]``.
        codec: ``int8`` or ``bf16``.
        calibration: for int8, on the same device.
    """
    return decode(encode(features, codec, calibration), calibration)


class Fidelity(NamedTuple):
    """Cosines of stored against live features, a token each: mean, 1st percentile, minimum."""

    raw: tuple[float, float, float]
    standardised: tuple[float, float, float]


def fidelity(live: Tensor, stored: Tensor, calibration: Calibration) -> Fidelity:
    """Compare features ``[B, T, F]``; standardised ones tell the damage that raw ones hide."""
    mean, std = (one.to(live.device) for one in calibration)
    both = [one.float() for one in (live, stored)]
    standard = [(one - mean) / std for one in both]
    return Fidelity(_cosines(*both), _cosines(*standard))


def _cosines(one: Tensor, two: Tensor) -> tuple[float, float, float]:
    found = torch.cosine_similarity(one.double(), two.double(), dim=-1).flatten().sort().values
    return float(found.mean()), float(found[len(found) // 100]), float(found[0])
