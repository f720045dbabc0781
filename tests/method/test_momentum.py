import pytest
import torch

from cmtmae_scale.method.momentum import update_momentum


def test_three_steps_at_0_9_by_hand() -> None:
    average, weights = [torch.zeros(3)], [torch.ones(3)]
    for _ in range(3):
        update_momentum(average, weights, 0.9)
    torch.testing.assert_close(average[0], torch.full((3,), 0.271))


def test_200_steps_at_0_9999_follow_a_float64_reference() -> None:
    generator = torch.Generator().manual_seed(0)
    average = [torch.randn(7, 5, generator=generator), torch.randn(11, generator=generator)]
    reference = [tensor.double() for tensor in average]
    start = [tensor.clone() for tensor in average]
    for _ in range(200):
        weights = [torch.randn(tensor.shape, generator=generator) + 1 for tensor in average]
        update_momentum(average, weights, 0.9999)
        reference = [
            0.9999 * a + (1 - 0.9999) * w.double() for a, w in zip(reference, weights, strict=True)
        ]
    for found, expected, before in zip(average, reference, start, strict=True):
        # float32 rounds each of 200 updates by up to 1.2e-7 of a weight of order 1.
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=5e-6)
        assert (found - before).abs().max() > 1e-3


def test_an_average_below_float32_is_refused() -> None:
    with pytest.raises(TypeError, match="float32"):
        update_momentum([torch.zeros(2, dtype=torch.bfloat16)], [torch.ones(2)], 0.999)


def test_lists_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="1 EMA tensors, but 0 weights"):
        update_momentum([torch.zeros(2)], [], 0.9)
