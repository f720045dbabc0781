"""The number of host calls in a step does not grow with the number of parameters."""

from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from tests.backends import backend_case as case
from tests.processes import run_ranks

pytestmark = pytest.mark.gloo
MOST_CALLS = 40
"""Calls over lists of tensors; the model has twice as many parameters."""


class Calls(TorchDispatchMode):
    """Notes the names of operators."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def count_calls(kind: str) -> dict[str, Any]:
    """Operators of the last micro-step, of a step with its EMA update, and of the forward of the
    momentum encoder.
    """
    config = case.make_config(backend__precision="bf16")
    backend = case.make_backend(config, kind)
    case.run_steps(backend, config, 4, 0, 1)  # the first forward prepares FSDP2
    batch = case.make_micro_batch(config, backend, [0, 1, 2, 3])
    backend.micro(batch, last=False)
    with Calls() as last_micro:
        report = backend.micro(batch, last=True)["total"][None]
    with Calls() as step:
        assert backend.step(1e-3, report).applied
        backend.momentum_update(0.9)
    with Calls() as forward:
        backend.momentum_forward(batch.images)
    parameters = len(list(backend.model.parameters()))
    names = {"last micro-step": last_micro, "step": step, "forward": forward}
    return {"parameters": parameters} | {kind: calls.names for kind, calls in names.items()}


def collectives(names: list[str]) -> list[str]:
    return [name for name in names if "c10d" in name]


@pytest.mark.parametrize(("world_size", "kind"), [(1, "plain"), (2, "replicate"), (2, "node2")])
def test_the_calls_of_a_step_do_not_grow_with_the_parameters(world_size: int, kind: str) -> None:
    """One collective sums the report; another gathers EMA weights that are sharded. The weights of
    the student are gathered in the first micro-step.
    """
    for found in run_ranks(world_size, count_calls, kind):
        assert found["parameters"] > MOST_CALLS
        assert len(found["step"]) <= MOST_CALLS, found["step"]
        assert len(collectives(found["step"])) == (kind != "plain") + (kind == "node2")
        assert collectives(found["forward"]) == []
        assert not any("gather" in name for name in collectives(found["last micro-step"]))
