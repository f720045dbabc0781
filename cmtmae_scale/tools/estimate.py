"""Operations and memory of a run, counted on tensors that hold nothing.

Source: matrix products and attention by torch's counter, 2 operations a multiply-add; activations
by what autograd would save.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from cmtmae_scale.config.derive import builds_teacher, online_fraction
from cmtmae_scale.config.schema import Config
from cmtmae_scale.method.masking import PatchChoice, token_counts
from cmtmae_scale.method.model import CollaborativeMAE
from cmtmae_scale.method.targets import Predictions, TokenLayout, objective
from cmtmae_scale.teachers.build import compute_dtype
from cmtmae_scale.teachers.online import OnlineTeacher


class Work(NamedTuple):
    """Operations for one view."""

    student: float
    momentum: float
    teacher: float
    """With a cache, those of spot checks."""


def count_operations(
    config: Config,
    model: CollaborativeMAE,
    momentum: nn.Module | None,
    teacher: OnlineTeacher | None,
) -> Work:
    """Count with torch's counter on meta tensors, one view; the backward is twice the forward."""
    size = config.views.image_size
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
        frozen = online_fraction(config) * flops(lambda: teacher(pixels))
    return Work(student, average, frozen)


def flops(call: Callable[[], object]) -> float:
    """Operations of a call."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


class Shards(NamedTuple):
    """Ranks that share one copy of each kind of state."""

    states: int
    """Float32 weights, moments, momentum weights."""
    gradients: int
    gathered: int
    """Copies in the compute type."""


def count_shards(config: Config, world_size: int) -> Shards:
    """What the backend shards; a node is taken to have 8 ranks."""
    if config.backend.name == "deepspeed":
        stage = config.backend.zero_stage
        return Shards(world_size, world_size if stage >= 2 else 1, world_size if stage >= 3 else 1)
    count = {"replicate": 1, "hybrid": min(8, world_size), "full": world_size}[
        config.backend.sharding
    ]
    return Shards(count, count, count if config.backend.sharding == "full" else 1)


def memory_bytes(
    config: Config,
    world_size: int,
    model: CollaborativeMAE,
    momentum: nn.Module | None,
    teacher: OnlineTeacher | None,
) -> dict[str, float]:
    """Bytes a GPU by part, all of them held at the peak, the end of a forward.

    Args:
        config: checked settings.
        world_size: number of ranks.
        model: on the meta device, as the two that follow.
        momentum: the momentum student, if any.
        teacher: the teacher, if any; with a cache it may not be held.
    """
    shards = count_shards(config, world_size)
    compute = compute_dtype(config).itemsize
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    average = sum(p.numel() for p in momentum.parameters()) if momentum is not None else 0
    frozen = 0
    if teacher is not None and builds_teacher(config):
        frozen = sum(p.numel() for p in teacher.model.parameters())
    copied = compute < 4 or shards.states > 1
    # ZeRO's momentum student is whole on every rank, at every stage.
    averages = 1 if config.backend.name == "deepspeed" else shards.gathered
    return {
        "weights, moments": trained * 12 / shards.states,
        "gradients": trained * 4 / shards.gradients,
        "momentum": average * 4 / shards.states,
        "gathered copies": copied * compute * (trained / shards.gathered + average / averages),
        "teacher": frozen * compute,
        "activations": saved_bytes(config, teacher) * config.train.micro_batch_size,
    }


def saved_bytes(config: Config, teacher: OnlineTeacher | None, views: int = 2) -> float:
    """What autograd keeps of the student's forward and loss, bytes a view.

    Args:
        config: checked settings.
        teacher: for its width and class token.
        views: number of views that is counted and divided by.
    """
    with torch.device("meta"):
        model = CollaborativeMAE(config, teacher.width if teacher else None)
    model.to(compute_dtype(config))
    model.set_activation_checkpointing(config.backend.activation_checkpointing)
    # On fake CPU tensors attention takes the fused kernel's path, which meta tensors do not.
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        return count_saved(model, lambda: forward(config, model, views)) / views


def forward(config: Config, model: CollaborativeMAE, views: int) -> Tensor:
    """A forward and its loss over made-up views and targets."""
    size, (height, width) = config.views.image_size, model.encoder.grid
    counts = token_counts(height * width, config.mask.ratio, config.mask.throw_ratio)
    rows = views * config.mask.masks_per_view
    choice = PatchChoice(*(torch.zeros(rows, n, dtype=torch.int64) for n in counts))
    predictions = model(torch.zeros(views, 3, size, size, dtype=compute_dtype(config)), choice)
    targets = Predictions(*(None if one is None else torch.zeros(one.shape) for one in predictions))
    layout = TokenLayout.from_config(config, *counts)
    valid = torch.ones(rows, dtype=torch.bool)
    return objective(predictions, targets, valid, layout, config.loss, torch.tensor(0.5)).total


def count_saved(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes of all storages that autograd saves in a forward, parameters and repeats left out."""
    known = {storage_key(p) for p in model.parameters()}
    kept: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        if storage_key(tensor) not in known:
            kept[storage_key(tensor)] = tensor.untyped_storage()  # held, so that keys stay unique
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for storage in kept.values())


def storage_key(tensor: Tensor) -> int:
    """Identity of a tensor's memory, fake or real."""
    return tensor.untyped_storage()._cdata
