"""With ``backend.compile`` a step runs as graphs of static shapes, compiled in its first step.

Dynamo traces as for any compiler; here the compiler of the graphs runs them as they are.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.fx import GraphModule

from cmtmae_scale.config.schema import Config, Schedule
from cmtmae_scale.pretraining.build import build_models, fetch_teacher
from cmtmae_scale.pretraining.prepare import prepare
from cmtmae_scale.pretraining.scalars import scalars_at
from cmtmae_scale.runtime.collectives import process_group
from cmtmae_scale.runtime.launch import World
from cmtmae_scale.teachers.base import TeacherView
from dataloading.stream import Batch

BATCH, STEPS = 2, 10
Change = Callable[[Config], None]


@pytest.fixture
def graphs() -> Iterator[list[GraphModule]]:
    """The graphs that are compiled during a test."""
    found: list[GraphModule] = []

    def keep(graph: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        found.append(graph)
        return graph.forward

    torch.compiler.reset()
    counters.clear()
    with torch.compiler.set_stance("default", force_backend=keep):
        yield found
    torch.compiler.reset()


def tiny_config(change: Change) -> Config:
    config = Config()
    config.student.arch, config.views.image_size = "test_vit", 64
    config.teacher.library, config.teacher.model = "timm", "test_vit"
    config.teacher.weights, config.teacher.feature = "random", "ln_post"
    config.teacher.depth = 1
    config.decoder.depth, config.decoder.width, config.decoder.heads = 2, 32, 2
    config.backend.precision, config.backend.sharding = "fp32", "replicate"
    config.train.global_batch_size = config.train.micro_batch_size = BATCH
    ramp = Schedule(kind="linear", start=0.1, end=0.9)
    config.mask.sampler, config.mask.salient_fraction = "hide_salient_mix", ramp
    config.collaboration.alpha_attention = config.collaboration.alpha_target = ramp
    change(config)
    return config


def take_steps(config: Config, compiled: bool) -> Iterator[list[float]]:
    """Train on random pixels; yields the losses and observations of each step."""
    config.backend.compile = compiled
    world, cpu = World(0, 1, 0, 1, "none"), torch.device("cpu")
    with process_group(world, cpu):
        teacher = fetch_teacher(config, world, cpu)
        models = build_models(config, world, cpu, teacher)
        generator = torch.Generator().manual_seed(0)
        for step in range(STEPS):
            shape = (BATCH, 64, 64, 3)
            views = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
            ids = torch.arange(BATCH) + step * BATCH
            batch = Batch((views,), ids, ids, ids, torch.tensor([True] * (BATCH - 1) + [step < 5]))
            scalars = scalars_at(config, step / STEPS)
            view = TeacherView(None, None) if teacher is None else teacher.forward_batch(batch)
            work, observed = prepare(config, models, batch, view, scalars)
            losses = models.backend.micro(work, last=True)
            assert models.backend.step(1e-3, losses.total[None]).applied
            models.backend.momentum_update(scalars.momentum)
            yield [float(value) for value in (*losses, *observed)]
        models.backend.close()


def require_static(graph: GraphModule) -> None:
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            value = node.meta["example_value"]
            assert isinstance(value, Tensor)
            assert all(type(size) is int for size in value.shape)


def check_graphs(config: Config, graphs: list[GraphModule]) -> None:
    counts = []
    for values in take_steps(config, compiled=True):
        counts.append(len(graphs))
        assert values
    assert not counters["graph_break"]
    assert counts[0] > 0
    assert counts == counts[:1] * STEPS
    for graph in graphs:
        require_static(graph)


def unchanged(config: Config) -> None:
    """Every network and both schedules, MILAN's decoder."""


def test_no_graph_breaks_and_none_is_compiled_again(graphs: list[GraphModule]) -> None:
    check_graphs(tiny_config(unchanged), graphs)
