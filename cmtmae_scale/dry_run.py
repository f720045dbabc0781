"""What a run would be, without running it: batch, parameters, operations, memory, resumption.

Counts come from meta tensors; nothing is allocated and no image is read.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cmtmae_scale.checkpoint import layout as checkpoints
from cmtmae_scale.config.derive import batch_plan, needs, peak_lr, total_steps
from cmtmae_scale.config.load import config_to_dict
from cmtmae_scale.config.schema import Config
from cmtmae_scale.errors import ConfigError
from cmtmae_scale.method.masking import PatchChoice, token_counts
from cmtmae_scale.method.model import CollaborativeMAE
from cmtmae_scale.method.student import MomentumStudent, build_student
from cmtmae_scale.teachers.build import build_teacher_skeleton
from cmtmae_scale.teachers.live import LiveTeacher
from cmtmae_scale.training.resume import compare
from dataloading.index import load_or_build

GIB = 2**30


class Work(NamedTuple):
    """Operations for one view."""

    student: float
    momentum: float
    teacher: float


def describe(config: Config, world_size: int) -> str:
    """Text of ``--dry-run``.

    Raises:
        ConfigError: settings that cannot work.
    """
    plan = batch_plan(config, world_size)
    images, origin = count_images(config)
    with torch.device("meta"):
        teacher = build_teacher_skeleton(config) if needs(config).teacher else None
        model = CollaborativeMAE(config, teacher.width if teacher else None)
        momentum = build_student(config, MomentumStudent) if needs(config).momentum else None
    work = count_operations(config, model, momentum, teacher)
    lines = [yaml.safe_dump(config_to_dict(config), sort_keys=False)]
    lines.append(f"images          {images if images is not None else 'unknown'} ({origin})")
    if images is not None or config.train.steps is not None:
        lines.append(f"steps           {total_steps(config, images or 1)}")
    lines.append(f"batch           {plan}")
    lines.append(
        f"learning rate   {peak_lr(config):.3g} = {config.optimizer.base_lr:g} base x "
        f"{config.train.global_batch} views / 256"
    )
    lines.append(f"encoder         {millions(model.encoder)} parameters")
    lines.append(f"decoder         {millions(model.decoder)} parameters")
    lines.append(f"heads           {millions(model.heads)} parameters")
    if teacher is not None:
        lines.append(f"teacher         {millions(teacher.model)} parameters, frozen")
    lines.append(
        f"GFLOP a view    student {work.student / 1e9:.1f} (forward and backward), "
        f"momentum {work.momentum / 1e9:.1f}, teacher {work.teacher / 1e9:.1f}; 2 a multiply-add"
    )
    lines += memory_lines(config, world_size, model, momentum, teacher)
    lines.append(f"would resume    {resumable(config)}")
    return "\n".join(lines)


def count_images(config: Config) -> tuple[int | None, str]:
    """Number of images from an existing index, or as the recipe expects."""
    folder = Path(config.data.index) if config.data.index else Path(config.run.dir) / "index"
    if Path(config.data.path).is_dir() and folder.is_dir():
        index = load_or_build(
            config.data.path, folder, source=config.data.source, max_pixels=config.data.max_pixels
        )
        return len(index), f"counted in {config.data.path}"
    if config.data.expected_images is not None:
        return config.data.expected_images, "data.expected_images; not counted"
    return None, f"{config.data.path} has no index yet and data.expected_images is not given"


def count_operations(
    config: Config,
    model: CollaborativeMAE,
    momentum: nn.Module | None,
    teacher: LiveTeacher | None,
) -> Work:
    """Count with torch's counter on meta tensors, one view; the backward is twice the forward."""
    size = config.views.size
    height, width = model.encoder.grid
    counts = token_counts(height * width, config.mask.ratio, config.mask.throw_ratio)
    rows = config.mask.masks_per_view
    choice = PatchChoice(*(torch.zeros(rows, n, dtype=torch.int64, device="meta") for n in counts))
    images = torch.empty(1, 3, size, size, device="meta")
    student = 3.0 * flops(lambda: model(images, choice))
    average = flops(lambda: momentum(images)) if momentum is not None else 0.0
    frozen = 0.0
    if teacher is not None:
        side = teacher.image_size
        pixels = torch.zeros(1, side, side, 3, dtype=torch.uint8, device="meta")
        frozen = flops(lambda: teacher(pixels))
    return Work(student, average, frozen)


def flops(call: Callable[[], object]) -> float:
    """Operations of a call."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


def memory_lines(
    config: Config,
    world_size: int,
    model: nn.Module,
    momentum: nn.Module | None,
    teacher: LiveTeacher | None,
) -> list[str]:
    """Bytes a GPU by part; states are exact, activations a model."""
    shards = {"none": 1, "node": min(8, world_size), "full": world_size}[config.backend.shard]
    compute = 2 if config.backend.precision == "bf16" else 4
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    average = sum(p.numel() for p in momentum.parameters()) if momentum is not None else 0
    frozen = 0
    if teacher is not None:
        frozen = sum(p.numel() for p in teacher.model.parameters())
    parts = {
        "weights, moments": trained * 12 / shards,
        "gradients": trained * 4 / shards + trained * compute,
        "momentum": average * 4 / shards,
        "gathered copies": (trained + average) * compute,
        "teacher": frozen * compute,
    }
    lines = [f"memory a GPU    {name:<17}{value / GIB:8.2f} GiB" for name, value in parts.items()]
    total = sum(parts.values()) / GIB
    lines.append(
        f"memory a GPU    {'states':<17}{total:8.2f} GiB (modelled: {shards} shards; "
        "activations come on top)"
    )
    return lines


def resumable(config: Config) -> str:
    """The checkpoint that the run would continue from, or why it would not.

    Files are compared by size only here, and images are not compared.
    """
    for folder in checkpoints.candidates(Path(config.run.dir) / "checkpoints"):
        if checkpoints.fault(folder, (-1, 1)) is None:
            state = checkpoints.read_state(folder)
            name = f"{folder} (step {state['progress']['step']})"
            try:
                compare(state["config"], config_to_dict(config), config.run.allow_change, ("", ""))
            except ConfigError as error:
                return f"nothing: {name} would be refused: {error}"
            return name
    return "nothing: a new run"


def millions(module: nn.Module) -> str:
    """Number of parameters, in millions."""
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.2f} M"
