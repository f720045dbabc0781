"""Stored features keep their direction, even if a few channels are far larger than the others."""

import math
from pathlib import Path

import pytest
import torch

from cmtmae_scale.cache.codecs import (
    Calibration,
    calibrate,
    decode,
    encode,
    load_calibration,
    measure_fidelity,
    save_calibration,
)
from cmtmae_scale.cache.verify import Comparison
from cmtmae_scale.errors import CacheError


def clip_like(seed: int) -> torch.Tensor:
    """Tokens with three channels far from zero and a few tokens six times as long, like CLIP's."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(64, 17, 96, generator=generator)
    tokens[torch.rand(64, 17, generator=generator) < 0.01] *= 6
    for channel, mean in ((7, 60.0), (41, 25.0), (90, -15.0)):
        jitter = torch.randn(64, 17, generator=generator)
        tokens[..., channel] = mean * (1 + 0.03 * jitter)
    return tokens


def test_calibration_is_mean_and_standard_deviation() -> None:
    tokens = clip_like(0)
    found = calibrate(tokens.split(10))
    flat = tokens.double().flatten(0, 1)
    torch.testing.assert_close(found.mean, flat.mean(0).float())
    torch.testing.assert_close(found.std, flat.std(0, correction=0).float())


def test_int8_keeps_the_direction_of_standardised_features() -> None:
    calibration = calibrate([clip_like(0)])
    tokens = clip_like(1)
    stored = decode(encode(tokens, "int8", calibration), calibration)
    found = measure_fidelity(tokens, stored, calibration)
    assert found.standardised[1] >= 0.9995 and found.raw[1] >= 0.9995


def test_without_standardising_the_raw_cosine_would_hide_the_damage() -> None:
    """One scale per token alone: why channels are standardised, and standardised cosines judge."""
    none = Calibration(torch.zeros(96), torch.ones(96))
    tokens = clip_like(1)
    stored = decode(encode(tokens, "int8", none), none)
    found = measure_fidelity(tokens, stored, calibrate([clip_like(0)]))
    assert found.raw[1] > 0.999 and found.standardised[1] < 0.99


def test_int8_is_within_half_a_level_of_each_value() -> None:
    calibration = calibrate([clip_like(0)])
    tokens = clip_like(2)
    encoded = encode(tokens, "int8", calibration)
    assert encoded.scales is not None and encoded.scales.dtype == torch.float16
    error = ((decode(encoded, calibration) - tokens) / calibration.std).abs()
    bound = encoded.scales.float().unsqueeze(-1)
    # 127.5 levels reach to the largest value when its scale was rounded down by float16.
    assert bool((error <= 0.57 * bound + 1e-5).all())


def test_bf16_is_rounding_alone() -> None:
    tokens = clip_like(3)
    stored = decode(encode(tokens, "bf16", None), None)
    assert torch.equal(stored, tokens.bfloat16())


def test_channels_and_tokens_that_never_move_are_kept() -> None:
    tokens = clip_like(4)
    tokens[..., 3] = 2.5
    calibration = calibrate([tokens])
    tokens[0] = calibration.mean
    stored = decode(encode(tokens, "int8", calibration), calibration)
    torch.testing.assert_close(stored[..., 3], tokens[..., 3])
    torch.testing.assert_close(stored[0], tokens[0], rtol=0, atol=1e-3)
    assert stored.isfinite().all()


def test_one_token_that_is_not_finite_makes_a_cache_not_good(tmp_path: Path) -> None:
    online = clip_like(0)
    stored = online.clone()
    stored.view(-1, stored.shape[-1])[5, 0] = math.nan  # of more tokens than a percentile skips
    assert stored.flatten(0, -2).shape[0] > 100
    damaged = measure_fidelity(online, stored, calibrate([online]))
    intact = measure_fidelity(online, online, calibrate([online]))
    assert Comparison(1, intact, 0.0, 1.0, 0).good
    assert not Comparison(1, damaged, None, None, 0).good
    assert not Comparison(1, intact, math.nan, 1.0, 0).good
    sha256 = save_calibration(tmp_path, Calibration(torch.zeros(2), torch.tensor([1, math.inf])))
    with pytest.raises(CacheError, match="it holds values that are not finite"):
        load_calibration(tmp_path, sha256, 2)


def test_nothing_to_calibrate_with_is_an_error() -> None:
    with pytest.raises(ValueError, match="no token"):
        calibrate([])


def test_a_codec_without_its_calibration_is_an_error() -> None:
    with pytest.raises(ValueError, match="calibration"):
        encode(clip_like(0), "int8", None)
