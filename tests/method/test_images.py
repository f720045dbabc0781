"""Normalisation of images against arithmetic in float64."""

import pytest
import torch

from cmtmae_scale.method.images import (
    CLIP_MEAN,
    CLIP_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    normalise_images,
)

PIXELS = torch.randint(0, 256, (2, 5, 5, 3), dtype=torch.uint8, generator=torch.manual_seed(0))


@pytest.mark.parametrize("mean, std", [(IMAGENET_MEAN, IMAGENET_STD), (CLIP_MEAN, CLIP_STD)])
def test_matches_the_definition_pixel_by_pixel(mean, std):
    out = normalise_images(PIXELS, mean, std)
    assert out.shape == (2, 3, 5, 5) and out.dtype == torch.float32 and out.is_contiguous()
    for b, y, x, c in [(0, 0, 0, 0), (1, 4, 2, 1), (0, 3, 4, 2), (1, 1, 1, 0)]:
        expected = (int(PIXELS[b, y, x, c]) / 255 - mean[c]) / std[c]
        assert abs(float(out[b, c, y, x]) - expected) < 1e-6


@pytest.mark.parametrize(
    "mean, std, a, b",
    [
        (CLIP_MEAN, CLIP_STD, (0.852475, 0.857244, 0.815876), (0.013198, -0.006994, -0.008016)),
        ((0.5,) * 3, (0.5,) * 3, (0.458, 0.448, 0.45), (-0.03, -0.088, -0.188)),
    ],
)
def test_other_normalisations_are_an_affine_map_of_imagenets(mean, std, a, b):
    imagenet = normalise_images(PIXELS, IMAGENET_MEAN, IMAGENET_STD)
    scale, shift = torch.tensor(a).view(3, 1, 1), torch.tensor(b).view(3, 1, 1)
    # the constants are printed with six digits; values reach 2.7
    assert torch.allclose(scale * imagenet + shift, normalise_images(PIXELS, mean, std), atol=4e-6)


def test_round_trip():
    out = normalise_images(PIXELS, CLIP_MEAN, CLIP_STD)
    for c in range(3):
        back = out[:, c] * CLIP_STD[c] + CLIP_MEAN[c]
        assert torch.allclose(back, PIXELS[..., c] / 255, atol=1e-6)


def test_wrong_input_is_named():
    with pytest.raises(TypeError, match="expected uint8"):
        normalise_images(PIXELS.float(), CLIP_MEAN, CLIP_STD)
    with pytest.raises(ValueError, match=r"expected \[B, S, S, 3\]"):
        normalise_images(PIXELS.permute(0, 3, 1, 2), CLIP_MEAN, CLIP_STD)
    with pytest.raises(ValueError, match="3 numbers each"):
        normalise_images(PIXELS, (0.5,), CLIP_STD)
