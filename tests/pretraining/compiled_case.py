"""Ten steps of a tiny run with every schedule changing, and the graphs that they are compiled to.

Dynamo traces as for any compiler; here the compiler of the graphs runs them as they are.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import timm
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.utils import counters
from torch.fx import GraphModule

from cmtmae_scale.backends.build import make_backend
from cmtmae_scale.backends.initial import initialise_backend
from cmtmae_scale.config.schema import Config, Schedule
from cmtmae_scale.config.schema import Student as StudentConfig
from cmtmae_scale.finetuning.augment import Examples, cross_entropy
from cmtmae_scale.finetuning.classifier import build_classifier, classifier_values
from cmtmae_scale.pretraining.build import build_models
from cmtmae_scale.pretraining.prepare import prepare
from cmtmae_scale.pretraining.scalars import scalars_at
from cmtmae_scale.runtime.launch import World
from cmtmae_scale.teachers.base import forward_all, view_sizes
from cmtmae_scale.tools.benchmark.rig import open_synthetic
from dataloading.stream import Batch

BATCH, STEPS, SIZE = 2, 10, 64
CPU = torch.device("cpu")


class Seen(NamedTuple):
    """What was compiled, and the results of the steps."""

    counts: list[int]
    """Graphs compiled until the end of each step."""
    breaks: dict[str, int]
    """Graph breaks by their reason."""
    inputs: list[str]
    """Inputs of graphs that are numbers, or tensors with a dynamic size."""
    results: list[list[float]]
    """Losses and observations of each step."""


def make_config(**changes: Any) -> Config:
    config = Config()
    config.student.arch, config.views.image_size = "test_vit", SIZE
    config.teacher.library, config.teacher.model, config.teacher.depth = "timm", "test_vit", 1
    config.teacher.weights, config.teacher.feature = "random", "ln_post"
    config.decoder.depth, config.decoder.width, config.decoder.heads = 2, 32, 2
    config.backend.precision, config.backend.compile = "fp32", True
    config.train.global_batch_size = config.train.micro_batch_size = BATCH
    ramp = Schedule(kind="linear", start=0.1, end=0.9)
    config.mask.sampler, config.mask.salient_fraction = "hide_salient_mix", ramp
    config.collaboration.alpha_attention = config.collaboration.alpha_target = ramp
    for key, value in changes.items():
        group, _, name = key.partition("__")
        setattr(getattr(config, group) if name else config, name or group, value)
    return config


def find_world() -> World:
    return World(dist.get_rank(), dist.get_world_size(), 0, 1, "none")


def pretrain(config: Config) -> Iterator[list[float]]:
    """Train on random pixels; yields losses and observations."""
    world = find_world()
    teachers = open_synthetic(config, BATCH, world, CPU)
    models = build_models(config, world, CPU, teachers)
    generator = torch.Generator().manual_seed(world.rank)
    for step in range(STEPS):
        shapes = [(BATCH, size, size, 3) for size in view_sizes(SIZE, teachers)]
        views = tuple(
            torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator) for shape in shapes
        )
        ids = torch.arange(BATCH) + step * BATCH
        batch = Batch(views, ids, ids, ids, torch.tensor([True] * (BATCH - 1) + [step < 5]))
        scalars = scalars_at(config, step / STEPS)
        work, observed = prepare(config, models, batch, forward_all(teachers, batch), scalars)
        losses = models.backend.micro(work, last=True)
        assert models.backend.step(1e-3, losses["total"][None]).applied
        models.backend.momentum_update(scalars.momentum or 0.0)
        yield [float(value) for value in (*losses.values(), *observed) if value is not None]
    models.backend.close()


def finetune(config: Config) -> Iterator[list[float]]:
    """Train a classifier with drop path on random pixels; yields losses."""
    student = StudentConfig("test_vit", 16)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        weights = timm.create_model("test_vit", num_classes=0, img_size=SIZE).state_dict()
    with torch.device("meta"):
        model = build_classifier(student, SIZE, classes=3, pool="mean")
    values, depth = classifier_values(model, weights, "random", 0), len(model.encoder.blocks)
    backend = make_backend(config, find_world(), CPU, model, None, cross_entropy, rows=BATCH)
    initialise_backend(backend, values)
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        images = torch.randn(BATCH, 3, SIZE, SIZE, generator=generator)
        keep = torch.rand(BATCH, depth, 2, generator=generator).round()
        targets = torch.full((BATCH, 3), 1 / 3)
        examples = Examples(images, keep, targets, torch.ones(BATCH, dtype=torch.bool))
        losses = backend.micro(examples, last=True)
        assert backend.step(1e-3, losses["total"][None]).applied
        yield [float(losses["total"])]
    backend.close()


def watch(task: str, changes: dict[str, Any]) -> Seen:
    """Run ``pretrain`` or ``finetune``, and note what is compiled; within a process group."""
    graphs: list[GraphModule] = []

    def keep(graph: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    config = make_config(**changes)
    torch.compiler.reset()
    counters.clear()
    counts, results = [], []
    with torch.compiler.set_stance("default", force_backend=keep):
        for values in {"pretrain": pretrain, "finetune": finetune}[task](config):
            counts.append(len(graphs))
            results.append(values)
    torch.compiler.reset()
    return Seen(counts, dict(counters["graph_break"]), list(find_dynamic(graphs)), results)


def find_dynamic(graphs: list[GraphModule]) -> Iterator[str]:
    """Name the inputs of graphs whose shapes or values are not known when they are compiled."""
    for graph in graphs:
        for node in graph.graph.nodes:
            if node.op == "placeholder":
                value = node.meta["example_value"]
                if not isinstance(value, Tensor) or any(type(n) is not int for n in value.shape):
                    yield f"{node.name}: {value}"
