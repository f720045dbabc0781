"""AdamW with its parameter groups, and its state in place from the start."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from cmtmae_scale.config.trained import AdamWSettings

MOMENTS = ("exp_avg", "exp_avg_sq")

LrScale = Callable[[str], float]
"""Factor of the learning rate of a parameter, by its name."""


def unscaled(name: str) -> float:
    """One learning rate for all parameters."""
    return 1.0


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]],
    weight_decay: float,
    lr_scale: LrScale = unscaled,
) -> list[dict[str, Any]]:
    """Split named parameters by the factor of their learning rate, and by weight decay.

    Vectors, class, register and mask tokens and positional embeddings have no weight decay
    (docs/method.md, section "Optimizer").
    """
    found: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in parameters:
        exempt = parameter.ndim < 2 or name.endswith(("_token", "pos_embed"))
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
    """AdamW over such groups, without state; ``start_state`` belongs to it.

    Args:
        parameters: those that are trained, by name; plain tensors, in the shape that counts for
            weight decay.
        settings: the config's group.
        lr_scale: factor of the learning rate of each parameter.
    """
    groups = parameter_groups(parameters, settings.weight_decay, lr_scale)
    return torch.optim.AdamW(groups, lr=0.0, betas=settings.betas, eps=1e-8, fused=True)


def set_lr(optimizer: Any, lr: float) -> None:
    """Set the learning rate of every group of an optimizer made here, or of what wraps it."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def start_state(optimizer: torch.optim.Optimizer, tensors: Iterable[Tensor]) -> None:
    """Give every tensor that is updated its state, so that saving and loading need no first step.

    Args:
        optimizer: AdamW.
        tensors: what it updates: the parameters, or what stands for them.
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


def trainable(model: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    """Parameters that are trained, by name."""
    return ((name, one) for name, one in model.named_parameters() if one.requires_grad)
