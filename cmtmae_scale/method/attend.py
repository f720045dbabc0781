"""The fused kernel of self-attention, in the dtype that is fastest for device and pass."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_keeps_dtype = False


@contextmanager
def attention_of_a_gpu() -> Generator[None]:
    """Let ``attend`` keep the compute dtype on a CPU too, to count what a GPU would compute."""
    global _keeps_dtype
    before, _keeps_dtype = _keeps_dtype, True
    try:
        yield
    finally:
        _keeps_dtype = before


def attention_dtype(device: str, dtype: torch.dtype, has_backward: bool) -> torch.dtype:
    """Return the dtype in which ``attend`` calls the fused kernel: on a CPU bf16 may become fp32.

    The forward of torch's CPU kernel costs about the same in both; its backward takes 2 to 5 times
    as long in bf16 (docs/performance.md, section "On a CPU").

    Args:
        device: type of the device.
        dtype: compute dtype.
        has_backward: whether a backward follows the forward.
    """
    if device == "cpu" and dtype == torch.bfloat16 and has_backward and not _keeps_dtype:
        return torch.float32
    return dtype


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return ``scaled_dot_product_attention``, in the dtype that is fastest for device and pass.

    Args:
        query: ``[B, H, Q, d]``.
        key: ``[B, H, T, d]``.
        value: same shape as ``key``.

    Returns:
        ``[B, H, Q, d]``, in the dtype of ``query``.
    """
    is_trained = query.requires_grad or key.requires_grad or value.requires_grad
    has_backward = torch.is_grad_enabled() and is_trained
    dtype = attention_dtype(query.device.type, query.dtype, has_backward)
    q, k, v = (x.to(dtype) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v).to(query.dtype)


class SelfAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` of one sequence with itself, without masks, in eval mode.

    Its queries, keys and values are one product. Torch's own module is fused too, but when compiled
    it multiplies the tokens one by one.
    """

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] - no masks, no weights
        self, query: Tensor, key: Tensor, value: Tensor, **unused: Any
    ) -> tuple[Tensor, None]:
        """From ``[B, T, D]``, given three times, to ``[B, T, D]``."""
        batch, length, _ = query.shape
        qkv = self.linear(query, self.in_proj_weight, self.in_proj_bias)
        qkv = qkv.reshape(batch, length, 3, cast(int, self.num_heads), -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, T, d]
        x = attend(q, k, v).transpose(1, 2).flatten(2)
        return self.linear(x, self.out_proj.weight, self.out_proj.bias), None

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)
