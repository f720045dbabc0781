"""Collectives of DeepSpeed ZeRO, counted in a process of their own."""

import importlib
from collections.abc import Callable
from typing import Any

from tests.processes import CONTEXT


def count_zero(results: Any, recipe: str, changes: list[str], cases: list[tuple[int, int]]) -> None:
    """Count at (stage, ranks); DeepSpeed forgets the groups of the case before."""
    import deepspeed
    import deepspeed.utils.groups
    import torch

    from cmtmae_scale.config.load import load_config
    from cmtmae_scale.tools.benchmark.collectives import count_collectives

    torch.set_num_threads(1)
    found = []
    for stage, ranks in cases:
        importlib.reload(deepspeed.utils.groups)
        deepspeed.comm.comm.cdb = None
        config = load_config(recipe, [*changes, f"backend.zero_stage={stage}"])
        config.backend.deepspeed = {
            "zero_optimization": {"stage3_param_persistence_threshold": 0}
        }  # otherwise small parameters are sometimes gathered
        found.append(count_collectives(config, ranks, is_real=True))
    results.put(found)


def run_alone(function: Callable[..., None], *arguments: Any) -> Any:
    """Call a function in a process without a process group; returns what it puts."""
    results = CONTEXT.Queue()
    child = CONTEXT.Process(target=function, args=(results, *arguments), daemon=True)
    child.start()
    found = results.get(timeout=100)
    child.join()
    return found
