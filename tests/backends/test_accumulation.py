"""Gradients between micro-steps: held whole, or reduced to shards at every micro-step."""

import time
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from cmtmae_scale.tools.benchmark.collectives import CountCollectives
from tests.backends import backend_case as case
from tests.processes import run_ranks
from tests.tools.plan.live_bytes import LiveBytes

MICRO_STEPS = 4


def accumulate(always: bool) -> dict[str, Any]:
    """Four micro-steps of one view on each of two ranks of a node."""
    config = case.make_config(backend__reduce_every_micro_step=always)
    backend = case.make_backend(config, "node2")
    rank, held = dist.get_rank(), [*backend.model.parameters()]
    kinds: Counter[str] = Counter()
    between = 0
    with LiveBytes([]) as live:
        for step in range(MICRO_STEPS):
            batch = case.make_micro_batch(config, backend, [2 * step + rank])
            with CountCollectives() as counted:
                backend.micro(batch, last=step + 1 == MICRO_STEPS)
            kinds.update({one.kind: one.calls for one in counted.traffic()})
            del batch
            if step == MICRO_STEPS - 2:
                dist.barrier()
                time.sleep(0.5)  # gloo's threads drop the buffers of finished work
                between = live.live
    grads = [one.grad.to_local().numpy() for one in held if one.grad is not None]
    trained = sum(one.numel() for one in held if one.requires_grad)
    local = {"between": between, "bytes": 4 * trained}
    return local | {"kinds": dict(kinds), "grads": grads}


def run_both() -> list[dict[str, Any]]:
    torch.manual_seed(0)
    return [accumulate(False), accumulate(True)]


@pytest.mark.gloo
def test_reducing_at_every_micro_step_keeps_shards_only() -> None:
    for waits, always in run_ranks(2, run_both):
        for one, other in zip(waits["grads"], always["grads"], strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
        half = waits["bytes"] / 2
        assert waits["between"] - always["between"] == pytest.approx(half, rel=0.05)
        units = waits["kinds"]["reduce-scatter"]
        assert always["kinds"]["reduce-scatter"] == MICRO_STEPS * units
        rest = [one | {"reduce-scatter": 0} for one in (waits["kinds"], always["kinds"])]
        assert rest[0] == rest[1]
