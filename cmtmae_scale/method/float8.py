"""Linear layers that multiply in float8, for forwards without gradient.

Legend: M rows (tokens of all views), C input channels, O output channels.

Source: FP8 formats (arXiv 2209.05433); one scale per row of both factors, as in torchao's dynamic
per-row recipe, which reaches neither ``nn.MultiheadAttention`` nor weights that change every step.
"""

import logging
from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmtmae_scale.config.schema import Config
from cmtmae_scale.errors import ConfigError
from cmtmae_scale.method.attend import SelfAttention

logger = logging.getLogger(__name__)

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max
SMALLEST_PEAK = 1e-12
"""Rows whose largest magnitude is below this are scaled as if it were this."""
MULTIPLE = 16
"""GPUs multiply float8 matrices only whose sizes are multiples of this."""


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row of ``[M, C]`` to float8, scaled so that its largest magnitude is 448.

    Returns:
        float8 values ``[M, C]`` and their scales, float32 ``[M, 1]``: x = values * scales. A row
        with a value that is not finite holds NaN.
    """
    x = x.float()
    scale = x.abs().amax(dim=-1, keepdim=True).clamp_min(SMALLEST_PEAK) / LARGEST
    return (x / scale).to(FLOAT8), scale


def float8_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Apply a linear layer whose factors are rounded to float8 row by row.

    A GPU accumulates the products in the fast mode of its tensor cores. Where the device has no
    float8 products, the rounded factors are multiplied in float32, more slowly than in bfloat16.

    Args:
        x: ``[..., C]``, bfloat16 on a GPU.
        weight: ``[O, C]``; C and O are multiples of 16, see ``use_float8``.
        bias: ``[O]``, or ``None``.

    Returns:
        ``[..., O]``, in the dtype of ``x``. No gradient, no host synchronisation.
    """
    rows, scales = quantise_rows(x.flatten(0, -2))
    columns, column_scales = quantise_rows(weight)
    if has_float8_products(x.device):
        per_row = F.ScalingType.RowWise  # pyright: ignore[reportAttributeAccessIssue]
        out = F.scaled_mm(
            rows, columns.t(), scales, per_row, column_scales.t(), per_row,
            bias=bias, output_dtype=x.dtype, use_fast_accum=True,
        )  # fmt: skip
    else:
        out = (rows.float() @ columns.float().t()) * scales * column_scales.t()
        out = (out if bias is None else out + bias.float()).to(x.dtype)
    return out.reshape(*x.shape[:-1], weight.shape[0])


@torch.compiler.assume_constant_result  # pyright: ignore[reportUnknownMemberType]
def has_float8_products(device: torch.device) -> bool:
    """Return whether a device multiplies float8: GPUs of compute capability 8.9 and above."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


class Float8Linear(nn.Linear):
    """A linear layer that computes in float8; its weights keep their dtype."""

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return float8_linear(x, self.weight, self.bias)


class Float8SelfAttention(SelfAttention):
    """``SelfAttention`` whose linear layers compute in float8."""

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return float8_linear(x, weight, bias)


def warn_about_emulation(config: Config, device: torch.device) -> None:
    """Warn where float8 layers are slower than those in bfloat16."""
    keys = {"teacher": config.teacher.precision, "momentum": config.momentum.precision}
    keys |= {f"teachers.{one.name}": one.precision for one in config.teachers}
    emulated = [f"{group}.precision" for group, precision in keys.items() if precision == "fp8"]
    if emulated and not has_float8_products(device):
        logger.warning(
            "%s=fp8: %s does not multiply float8, so the products are emulated, far more slowly "
            "than in bf16; use a GPU of compute capability 8.9 or above, or set bf16",
            " and ".join(emulated),
            device,
        )


def use_float8(block: nn.Module, key: str) -> None:
    """Let the linear layers of a frozen transformer block compute in float8.

    Args:
        block: changed in place.
        key: the config's key that requests it, for messages.

    Raises:
        ConfigError: for a layer that no GPU multiplies in float8.
    """
    named = cast(Iterable[tuple[str, nn.Module]], block.named_modules())
    for name, module in named:
        if type(module) is nn.Linear:
            refuse_other_sizes(f"{name}.weight", module.weight, key)
            module.__class__ = Float8Linear
        elif type(module) in (nn.MultiheadAttention, SelfAttention):
            weight = cast(nn.MultiheadAttention, module).in_proj_weight
            refuse_other_sizes(f"{name}.in_proj_weight", weight, key)
            module.__class__ = Float8SelfAttention
        elif hasattr(module, "qkv_bias_separate"):
            cast(Any, module).qkv_bias_separate = True  # Eva then calls its layer, not its weights


def refuse_other_sizes(name: str, weight: Tensor, key: str) -> None:
    """Refuse a matrix that no GPU multiplies in float8.

    Raises:
        ConfigError: naming ``key``, the matrix of a name within its block, and the remedy.
    """
    if any(size % MULTIPLE for size in weight.shape):
        raise ConfigError(
            f"{key}=fp8: {name} of a block is {list(weight.shape)}, and GPUs multiply float8 only "
            f"where sizes are multiples of {MULTIPLE}; set {key}=bf16"
        )
