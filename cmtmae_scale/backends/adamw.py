"""AdamW with its parameter groups, and its state in place from the start."""

from collections.abc import Iterable

import torch
from torch import nn

from cmtmae_scale.config.schema import Optimizer

MOMENTS = ("exp_avg", "exp_avg_sq")


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float
) -> list[dict[str, object]]:
    """Split named parameters into those with weight decay and those without.

    No decay for vectors, class, register and mask tokens, and position tables (method.md 7.5).
    """
    decay: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in parameters:
        exempt = parameter.ndim < 2 or name.endswith(("_token", "pos_embed"))
        (plain if exempt else decay).append(parameter)
    return [
        {"params": decay, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]


def make_adamw(
    parameters: Iterable[tuple[str, nn.Parameter]], settings: Optimizer, device: torch.device
) -> torch.optim.AdamW:
    """AdamW with its state in place, so that ``fragments()`` and loading need no first step.

    Args:
        parameters: those that are trained, by name; plain tensors, in the shape that counts for
            weight decay.
        settings: the config's group.
        device: where the parameters are.
    """
    groups = parameter_groups(parameters, settings.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=settings.betas, eps=1e-8, fused=True)
    for parameter in trained(optimizer):
        optimizer.state[parameter] = {
            "step": torch.zeros((), device=device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def trained(optimizer: torch.optim.Optimizer) -> Iterable[nn.Parameter]:
    """Every parameter of an optimizer."""
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def set_step(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Set AdamW's counter of applied steps."""
    for parameter in trained(optimizer):
        optimizer.state[parameter]["step"].fill_(float(step))


def trainable(model: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    """Parameters that are trained, by name."""
    return ((name, one) for name, one in model.named_parameters() if one.requires_grad)
