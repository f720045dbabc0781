"""``torch.compile`` with static shapes, for the functions of a step."""

from collections.abc import Callable
from functools import cache
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


@cache
def compiled(function: Callable[P, R], enabled: bool) -> Callable[P, R]:
    """Return the compiled form of a module's function, the same one at every call.

    A run's shapes follow from its config, so no shape is dynamic. Numbers that change between steps
    are passed as 0-dim tensors, because each value of a Python number causes a recompilation.
    """
    return torch.compile(function, dynamic=False) if enabled else function
