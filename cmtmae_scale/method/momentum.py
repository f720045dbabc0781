"""Update the momentum encoder: float32 EMA weights of the student's encoder."""

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def update_momentum(average: Sequence[Tensor], weights: Sequence[Tensor], momentum: float) -> None:
    """Update EMA weights in place: ``momentum * average + (1 - momentum) * weights``.

    Args:
        average: float32 tensors, or local shards of them; changed in place by one fused call.
        weights: tensors of the same shapes, in the same order.
        momentum: m, in [0, 1].

    Raises:
        TypeError: if an EMA tensor is not float32; bfloat16 never changes at m = 0.999.
        ValueError: if the lists differ in length.

    Source: docs/method.md, section "Momentum encoder".
    """
    if any(tensor.dtype != torch.float32 for tensor in average):
        raise TypeError("EMA weights must be float32")
    if len(average) != len(weights):
        raise ValueError(f"{len(average)} EMA tensors, but {len(weights)} weights")
    # The fused form has no public name in torch.
    torch._foreach_lerp_(list(average), list(weights), 1.0 - momentum)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
