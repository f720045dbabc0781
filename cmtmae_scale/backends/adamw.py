"""AdamW with its parameter groups, and its state in place from the start."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

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
    parameters: Iterable[tuple[str, nn.Parameter]], settings: Optimizer
) -> torch.optim.AdamW:
    """AdamW over two groups, without state; ``start_state`` belongs to it.

    Args:
        parameters: those that are trained, by name; plain tensors, in the shape that counts for
            weight decay.
        settings: the config's group.
    """
    groups = parameter_groups(parameters, settings.weight_decay)
    return torch.optim.AdamW(groups, lr=0.0, betas=settings.betas, eps=1e-8, fused=True)


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
