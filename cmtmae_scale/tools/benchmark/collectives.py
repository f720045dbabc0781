"""Collectives of a training step and their bytes, counted at any number of ranks on one CPU.

Rank 0 of a ``fake`` process group builds the run's real backend on fake tensors and takes one step:
every collective is issued with its real shapes, and nothing is computed or sent.
"""

import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from importlib import import_module
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode, is_fake
from torch.utils._python_dispatch import TorchDispatchMode

from cmtmae_scale.backends.base import Backend
from cmtmae_scale.backends.build import make_backend
from cmtmae_scale.backends.initial import initialise_backend
from cmtmae_scale.backends.traffic import HOP_S, Traffic, zero_traffic
from cmtmae_scale.config.load import load_config
from cmtmae_scale.config.schema import Config
from cmtmae_scale.method.initialisation import initial_values
from cmtmae_scale.runtime.launch import World
from cmtmae_scale.tools.benchmark.table import markdown_table
from cmtmae_scale.tools.estimate import (
    MetaNetworks,
    SyntheticWork,
    build_meta_networks,
    make_synthetic_work,
)

RANKS_PER_NODE = 8
REPORT = 12
"""Entries of the engine's vector."""
KINDS = {
    "allgather_": "all-gather",
    "_allgather_base_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_": "reduce-scatter",
    "allreduce_": "all-reduce",
    "broadcast_": "broadcast",
    "reduce_": "reduce",
}
"""Operators of ``torch.ops.c10d`` -> names of the collectives."""


class CountCollectives(TorchDispatchMode):
    """Counts collectives and their bytes by kind and size of the group.

    Bytes are those of the whole tensor that is gathered, scattered or reduced. A host read returns
    1, because fake tensors have no values.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[tuple[str, int]] = Counter()
        self.payloads: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and is_fake(args[0]):
            return 1.0 if args[0].is_floating_point() else 1
        if func.namespace == "c10d":
            self.record(func, args)
        return func(*args, **(kwargs or {}))

    def record(self, func: Any, args: Sequence[Any]) -> None:
        """Count a collective."""
        kind = KINDS[func.overloadpacket.__name__]
        is_first = kind in ("all-reduce", "broadcast", "reduce")
        group = dist.ProcessGroup.unbox(args[1 if is_first else 2])
        whole = args[1] if kind == "reduce-scatter" else args[0]
        key = (kind, group.size())
        self.calls[key] += 1
        self.payloads[key] += sum(one.numel() * one.itemsize for one in walk(whole))

    def traffic(self) -> list[Traffic]:
        """Return the counts of groups of several ranks."""
        return [
            Traffic(kind, size, calls, self.payloads[kind, size])
            for (kind, size), calls in sorted(self.calls.items())
            if size > 1
        ]


def walk(tree: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of a tensor or of nested lists of tensors."""
    if isinstance(tree, torch.Tensor):
        yield tree
    else:
        for one in tree:
            yield from walk(one)


def set_data(old: torch.Tensor, new: torch.Tensor) -> None:
    """Convert a fake parameter in place; torch would swap it, which its weak references forbid."""
    old.data = new.data


@contextmanager
def fake_group(world_size: int) -> Iterator[None]:
    """Open a process group in which this process is rank 0 and no data is sent."""
    import_module("torch.distributed._tools.fake_collectives")  # collectives on fake tensors
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def count_collectives(
    config: Config, world_size: int, networks: MetaNetworks | None = None, is_real: bool = False
) -> list[Traffic]:
    """Count the collectives of one optimizer step of one micro-step, from rank 0's side.

    Args:
        config: checked settings; the step is not compiled.
        world_size: number of ranks, 8 per node.
        networks: of the config, on the meta device; ``None``: they are built.
        is_real: use real tensors, whose values DeepSpeed reads; for small models.
    """
    train = replace(config.train, global_batch_size=world_size, micro_batch_size=1)
    config = replace(config, backend=replace(config.backend, compile=False), train=train)
    networks = copy.deepcopy(networks) if networks else build_meta_networks(config)
    world = World(0, world_size, 0, min(RANKS_PER_NODE, world_size), "fake")
    fake = nullcontext() if is_real else FakeTensorMode(allow_non_fake_inputs=True)
    with fake_group(world_size):
        with fake:
            model, momentum = networks.model, networks.momentum
            if not is_real:  # of a fake tensor ``materialise`` makes a fake tensor
                for network in filter(None, (model, momentum)):
                    network.to_empty(device="cpu")
            values = initial_values(model, config.run.seed)
            work, objective = make_synthetic_work(config, model, views=1)
        cpu = torch.device("cpu")
        with patch.object(torch.utils, "swap_tensors", set_data):
            backend = make_backend(config, world, cpu, model, momentum, objective, rows=1)
        if is_real:
            initialise_backend(backend, values)
        with fake, CountCollectives() as counted:
            take_step(backend, work)
    return counted.traffic()


def take_step(backend: Backend, work: SyntheticWork) -> None:
    """Run the parts of a step that communicate: everything but the teacher."""
    backend.momentum_forward(work.inputs[0])
    backend.micro(work, last=True)
    backend.step(1e-3, torch.zeros(REPORT))
    backend.momentum_update(0.99)


class Counted(NamedTuple):
    """Collectives of a step under one setting at one number of ranks."""

    setting: str
    world_size: int
    traffic: list[Traffic]


def count_settings(
    recipe: str, overrides: Sequence[str], world_sizes: Sequence[int]
) -> list[Counted]:
    """Count the collectives of a recipe under every sharding; those of ZeRO follow by formula.

    Args:
        recipe: file of a recipe.
        overrides: overrides of the recipe.
        world_sizes: numbers of ranks, 8 per node.
    """
    found: list[Counted] = []
    networks = build_meta_networks(load_config(recipe, overrides))
    for sharding in ("replicate", "hybrid", "full"):
        setting = ["backend.name=fsdp", f"backend.sharding={sharding}"]
        config = load_config(recipe, [*overrides, *setting])
        for world_size in world_sizes:
            traffic = count_collectives(config, world_size, networks)
            found.append(Counted(f"{sharding}, counted", world_size, traffic))
    for stage in (1, 2, 3):
        setting = ["backend.name=deepspeed", "backend.compile=false", f"backend.zero_stage={stage}"]
        config = load_config(recipe, [*overrides, *setting])
        for world_size in world_sizes:
            traffic = zero_traffic(config, networks.model, networks.momentum, world_size)
            found.append(Counted(f"ZeRO-{stage}, by formula", world_size, traffic))
    return found


def collectives_table(found: Sequence[Counted]) -> str:
    """Return calls and bytes by kind, bytes sent per rank, and the latency of rings, as a table."""
    kinds = sorted({one.kind for counted in found for one in counted.traffic})
    rows: list[list[str]] = []
    for setting, world_size, traffic in found:
        row = [setting, str(world_size)]
        for kind in kinds:
            own = [one for one in traffic if one.kind == kind]
            calls, payload = sum(one.calls for one in own), sum(one.payload for one in own)
            row.append(f"{calls}, {payload / 1e9:.3g} GB" if own else "-")
        sent_bytes = sum(one.sent_bytes for one in traffic)
        latency_s = sum(one.latency_s for one in traffic)
        rows.append([*row, f"{sent_bytes / 1e9:.2f} GB", f"{1e3 * latency_s:.1f} ms"])
    header = ["setting", "ranks", *kinds, "sent per rank", f"hops at {1e6 * HOP_S:g} us, modelled"]
    return markdown_table(header, rows)
