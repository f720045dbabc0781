"""Linear layers in float8 against a plain computation, and their place in a network."""

import pytest
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from cmtmae_scale.errors import ConfigError
from cmtmae_scale.method import float8
from cmtmae_scale.method.attend import SelfAttention
from cmtmae_scale.method.float8 import (
    Float8Linear,
    Float8SelfAttention,
    float8_linear,
    quantise_rows,
    use_float8,
)


def representable(value: float) -> float:
    """The nearest number of 4 exponent and 3 mantissa bits, by trying all of them."""
    exact = [m * 2.0**e for e in range(-9, 6) for m in range(8, 16)] + [m / 512 for m in range(8)]
    return min((abs(abs(value) - one), one) for one in exact if one <= 448)[1]


def test_each_row_is_scaled_by_its_own_peak() -> None:
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [[1e-6], [1.0], [1e6]]
    )
    values, scales = quantise_rows(x)
    for row, rounded, scale in zip(x.tolist(), values.float().tolist(), scales[:, 0], strict=True):
        assert float(scale) == pytest.approx(max(map(abs, row)) / 448)
        wanted = [representable(one / float(scale)) for one in row]
        assert [abs(one) for one in rounded] == pytest.approx(wanted, rel=0.07)
        assert max(map(abs, rounded)) == 448


def test_the_products_are_those_of_the_rounded_factors() -> None:
    generator = torch.Generator().manual_seed(1)
    x, weight, bias = (
        torch.randn(shape, generator=generator) for shape in [(2, 5, 32), (16, 32), (16,)]
    )
    (a, a_scale), (b, b_scale) = quantise_rows(x.reshape(10, 32)), quantise_rows(weight)
    rounded_x, rounded_w = (q.double() * s.double() for q, s in [(a, a_scale), (b, b_scale)])
    wanted = (rounded_x @ rounded_w.t() + bias.double()).reshape(2, 5, 16)
    torch.testing.assert_close(
        float8_linear(x, weight, bias).double(), wanted, rtol=1e-5, atol=1e-5
    )
    exact = nn.functional.linear(x, weight, bias)
    error = (wanted.float() - exact).norm() / exact.norm()
    assert 0.005 < error < 0.05


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_is_not_hidden(bad: float) -> None:
    x = torch.ones(2, 16)
    x[0, 3] = bad
    found = float8_linear(x, torch.ones(16, 16), None)
    assert not found[0].isfinite().any()
    assert found[1].isfinite().all()


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def test_attention_keeps_its_numbers_but_for_rounding() -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(32, 4, batch_first=True).eval()
    nn.init.normal_(attention.in_proj_bias)
    x = torch.randn(2, 7, 32)
    with torch.no_grad():
        wanted, _ = attention(x, x, x, need_weights=False)
        attention.__class__ = SelfAttention
        found, _ = attention(x, x, x, need_weights=False)
        torch.testing.assert_close(found, wanted)
        use_float8(attention, "teacher.precision")
        assert type(attention) is Float8SelfAttention
        found, _ = attention(x, x, x, need_weights=False, attn_mask=None)
    assert 0.001 < relative_error(found, wanted) < 0.08


def test_only_linear_layers_of_a_block_change() -> None:
    torch.manual_seed(0)
    block = Block(32, 2, qkv_bias=True).eval()
    before = {name: one.clone() for name, one in block.state_dict().items()}
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        wanted = block(x)
        use_float8(block, "teacher.precision")
        found = block(x)
    layers = {name for name, one in block.named_modules() if isinstance(one, Float8Linear)}
    assert layers == {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"}
    assert 1e-4 < relative_error(found, wanted) < 0.05
    assert all(torch.equal(one, before[name]) for name, one in block.state_dict().items())


def test_layers_that_no_gpu_multiplies_are_refused_before_the_first_step() -> None:
    """Such as those of EVA-02 L, whose hidden layer has 2,730 channels."""
    wanted = r"fp8: mlp.fc1.weight of a block is \[40, 32\].* of 16; set momentum.precision=bf16"
    with pytest.raises(ConfigError, match=wanted):
        use_float8(Block(32, 2, mlp_ratio=1.25), "momentum.precision")
    attention = nn.MultiheadAttention(24, 4)
    with pytest.raises(ConfigError, match=r"in_proj_weight of a block is \[72, 24\]"):
        use_float8(attention, "teacher.precision")


def test_a_gpu_takes_the_rounded_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch checks shapes, strides and scales of a GPU's product without a GPU."""
    monkeypatch.setattr(float8, "has_float8_products", lambda device: True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        x, weight = (
            torch.empty(s, dtype=torch.bfloat16, device="cuda") for s in [(2, 5, 32), (48, 32)]
        )
        found = float8_linear(x, weight, weight[:, 0])
    assert (found.shape, found.dtype, found.device.type) == ((2, 5, 48), torch.bfloat16, "cuda")
