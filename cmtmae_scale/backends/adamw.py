"""AdamW with its parameter groups, its state before the first step, and the step itself."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cmtmae_scale.backends.base import Accept, Meanwhile, Outcome, acceptable, start_read
from cmtmae_scale.config.schema import AdamWSettings
from cmtmae_scale.runtime.collectives import ranks

MOMENTS = ("exp_avg", "exp_avg_sq")

LrScale = Callable[[str], float]
"""Maps a parameter's name to the factor of its learning rate."""


def unscaled(name: str) -> float:
    """Return 1: all parameters have the same learning rate."""
    return 1.0


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]],
    weight_decay: float,
    lr_scale: LrScale = unscaled,
) -> list[dict[str, Any]]:
    """Group named parameters by learning rate factor and weight decay.

    Vectors, class, register and mask tokens, positional embeddings and rotary frequencies have no
    weight decay (docs/method.md, section "Optimizer").
    """
    found: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in parameters:
        shape = getattr(parameter, "ds_shape", parameter.shape)  # ds_shape: whole shape in ZeRO-3
        exempt = len(shape) < 2 or name.endswith(("_token", "pos_embed", "freqs"))
        found.setdefault((lr_scale(name), exempt), []).append(parameter)
    return [
        {
            "params": found[scale, exempt],
            "lr_scale": scale,
            "weight_decay": 0.0 if exempt else weight_decay,
        }
        for scale, exempt in sorted(found)
    ]


def make_adamw(
    parameters: Iterable[tuple[str, nn.Parameter]],
    settings: AdamWSettings,
    lr_scale: LrScale = unscaled,
) -> torch.optim.AdamW:
    """Return AdamW over ``parameter_groups``; ``start_state`` creates its state.

    Args:
        parameters: trained parameters by name; the number of dimensions decides on weight decay.
        settings: the config's group.
        lr_scale: factor of the learning rate of each parameter.
    """
    groups = parameter_groups(parameters, settings.weight_decay, lr_scale)
    return torch.optim.AdamW(groups, lr=0.0, betas=settings.betas, eps=1e-8, fused=True)


def set_lr(optimizer: Any, lr: float) -> None:
    """Set the learning rate of every group of this AdamW, or of an optimizer that wraps it."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def start_state(optimizer: torch.optim.Optimizer, tensors: Iterable[Tensor]) -> None:
    """Create the state of every updated tensor, so that saving and loading need no first step.

    Args:
        optimizer: AdamW.
        tensors: the tensors that it updates.
    """
    optimizer.state.clear()
    for tensor in tensors:
        optimizer.state[tensor] = {
            "step": torch.zeros((), device=tensor.device),
            "exp_avg": torch.zeros_like(tensor, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(tensor, requires_grad=False),
        }


def set_step(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Set AdamW's counter of applied steps."""
    for state in optimizer.state.values():
        state["step"].fill_(float(step))


def take_step(
    optimizer: torch.optim.AdamW,
    parameters: list[nn.Parameter],
    clip: float | None,
    lr: float,
    report: Tensor,
    accept: Accept | None,
    meanwhile: Meanwhile | None,
    num_copies: int = 1,
) -> Outcome:
    """Clip, test and apply the gradients: one collective and one host read.

    Args:
        optimizer: AdamW over ``parameters``.
        parameters: this rank's float32 weights with their reduced gradients.
        clip: largest norm, or ``None``.
        lr: see ``Backend.step``.
        report: see ``Backend.step``.
        accept: see ``Backend.step``.
        meanwhile: see ``Backend.step``.
        num_copies: number of ranks that hold the same weights; the norm counts each weight once.
    """
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    packed = torch.cat([report, norm.square().reshape(1) / num_copies])
    if ranks() > 1:
        dist.all_reduce(packed)
    read_sums = start_read(packed)
    if meanwhile is not None:
        meanwhile()
    *values, squared = read_sums()
    grad_norm = squared**0.5
    applied = acceptable(grad_norm, values, accept)
    if applied:
        if clip is not None:
            nn.utils.clip_grads_with_norm_(parameters, clip, packed[-1].sqrt())
        set_lr(optimizer, lr)
        optimizer.step()
    return Outcome(grad_norm, applied, values)


def trainable(model: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    """Return the trained parameters by name."""
    return ((name, one) for name, one in model.named_parameters() if one.requires_grad)
