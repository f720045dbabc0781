"""FLOPs and memory of a run, counted on meta tensors and fake tensors.

Source: matrix products and attention by torch's counter, 2 FLOPs per multiply-add; activations are
the tensors that autograd saves.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from cmtmae_scale.backends.base import Objective, Terms
from cmtmae_scale.backends.traffic import BUCKET
from cmtmae_scale.config.batch import batch_plan
from cmtmae_scale.config.deepspeed import extra_keys
from cmtmae_scale.config.needs import needs
from cmtmae_scale.config.schema import Config
from cmtmae_scale.config.teachers import builds_teacher, online_fraction, teacher_configs
from cmtmae_scale.errors import CmtMaeError, ConfigError
from cmtmae_scale.method.attend import attention_of_a_gpu
from cmtmae_scale.method.build import build_student
from cmtmae_scale.method.masking import PatchChoice, grid_counts
from cmtmae_scale.method.model import CollaborativeMAE
from cmtmae_scale.method.student import MomentumEncoder
from cmtmae_scale.method.targets import Predictions, TokenLayout
from cmtmae_scale.pretraining.build import make_objective
from cmtmae_scale.pretraining.prepare import MicroBatch
from cmtmae_scale.teachers.base import feature_widths
from cmtmae_scale.teachers.build import build_skeletons, compute_dtype
from cmtmae_scale.teachers.online import OnlineTeacher
from dataloading.stream import LOOK_AHEAD

logger = logging.getLogger(__name__)

DECODED_BYTES = 3 * 500 * 400
"""Bytes of a decoded image; assumed, about the mean of ImageNet-1K."""


class MetaNetworks(NamedTuple):
    """Networks of a run, on the meta device."""

    model: CollaborativeMAE
    momentum: MomentumEncoder | None
    teachers: dict[str, OnlineTeacher]
    """By name; a run with a cache may not hold them."""


def list_teachers(
    config: Config, teachers: Mapping[str, OnlineTeacher]
) -> list[tuple[str, Config, OnlineTeacher]]:
    """Return name and network of each teacher, with the config of a run that has no other."""
    configs = teacher_configs(config)
    return [(name, configs[name], one) for name, one in teachers.items()]


def build_meta_networks(config: Config) -> MetaNetworks:
    """Build the networks that a run uses, without memory."""
    with torch.device("meta"):
        teachers = build_skeletons(config)
        model = CollaborativeMAE(config, feature_widths(teachers))
        momentum = build_student(config, MomentumEncoder) if needs(config).momentum else None
    return MetaNetworks(model, momentum, teachers)


class ViewFlops(NamedTuple):
    """FLOPs per view."""

    student: float
    momentum: float
    teacher: float
    """With a cache: FLOPs of spot checks."""


def count_flops(config: Config, networks: MetaNetworks) -> ViewFlops:
    """Count FLOPs per view on meta tensors; the backward is twice the forward."""
    model, momentum, _ = networks
    size = config.views.image_size
    height, width = model.encoder.grid
    counts = grid_counts(config.mask, height * width)
    rows = config.mask.masks_per_view
    choice = PatchChoice(*(torch.zeros(rows, n, dtype=torch.int64, device="meta") for n in counts))
    images = torch.empty(1, 3, size, size, device="meta")
    student = 3.0 * forward_flops(lambda: model(images, choice))
    momentum_flops = forward_flops(lambda: momentum(images)) if momentum is not None else 0.0
    teacher_flops = 0.0
    for _, alone, teacher in list_teachers(config, networks.teachers):
        side = teacher.image_size
        pixels = torch.zeros(1, side, side, 3, dtype=torch.uint8, device="meta")
        teacher_flops += online_fraction(alone) * forward_flops(partial(teacher, pixels))
    return ViewFlops(student, momentum_flops, teacher_flops)


def forward_flops(call: Callable[[], object]) -> float:
    """Count the FLOPs of a call."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


class Shards(NamedTuple):
    """Number of ranks that share one copy of each kind of state."""

    states: int
    """Float32 weights, moments, EMA weights."""
    gradients: int
    """Between two micro-steps, where a step has several."""
    gathered: int
    """Copies in the compute dtype."""


def count_shards(config: Config, world_size: int, node_size: int) -> Shards:
    """Return the backend's sharding, for ``node_size`` ranks per node."""
    if config.backend.name == "deepspeed":
        stage = config.backend.zero_stage
        return Shards(world_size, world_size if stage >= 2 else 1, world_size if stage >= 3 else 1)
    counts = {"replicate": 1, "hybrid": min(node_size, world_size), "full": world_size}
    count = counts[config.backend.sharding]
    # FSDP2 adds up whole float32 gradients until the micro-step that reduces them.
    waits = accumulation(config, world_size) > 1 and not config.backend.reduce_every_micro_step
    return Shards(count, 1 if waits else count, count if config.backend.sharding == "full" else 1)


def memory_bytes(
    config: Config, world_size: int, networks: MetaNetworks, node_size: int = 8
) -> dict[str, float]:
    """Return bytes per GPU by kind at the peak, the end of a forward, for ``node_size`` per node.

    CUDA's context, NCCL's buffers and fragmentation are not included; see ``RESERVE``.
    """
    views = views_per_forward(config, world_size)
    return state_bytes(config, world_size, networks, node_size) | {
        "input images": input_bytes(config, networks.teachers) * views,
        "activations": saved_bytes(config, networks.teachers) * views,
    }


def state_bytes(
    config: Config, world_size: int, networks: MetaNetworks, node_size: int = 8
) -> dict[str, float]:
    """Return the bytes per GPU, by kind, that do not depend on the micro-batch size."""
    model, momentum, _ = networks
    shards = count_shards(config, world_size, node_size)
    compute = compute_dtype(config).itemsize
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    average = sum(p.numel() for p in momentum.parameters()) if momentum is not None else 0
    teachers = list_teachers(config, networks.teachers)
    built = [one for _, alone, one in teachers if builds_teacher(alone)]
    frozen = sum(p.numel() for one in built for p in one.model.parameters())
    copied = compute < 4 or shards.states > 1
    # A gathered momentum encoder is a copy of the float32 EMA weights also in float32; ZeRO-3 casts
    # its shards whenever it gathers a block.
    copies = copied * trained / shards.gathered
    if config.backend.name == "fsdp" or shards.gathered == 1:
        copies += average / shards.gathered
    found = {
        "weights, moments": trained * 12 / shards.states,
        "gradients": trained * 4 / shards.gradients,
        "momentum": average * 4 / shards.states,
        "gathered copies": compute * copies,
        "teacher": frozen * compute,
    }
    if shards.gathered > 1:
        found["gathered blocks"] = compute * gathered_values(config, model)
    bucket = bucket_bytes(config)
    if bucket and shards.states > 1:
        found["reduction bucket"] = bucket
    return found


def bucket_bytes(config: Config) -> float:
    """Return the bytes of the buffers in which DeepSpeed gathers gradients before it reduces them.

    Source: ``DeepSpeedZeroOptimizer.setup_buckets`` and ``DeepSpeedZeroOptimizer_Stage3`` of
    DeepSpeed 0.19; stage 1 in bf16 is ``BF16_Optimizer``, which has none.
    """
    if config.backend.name != "deepspeed":
        return 0.0
    stage, is_bf16 = config.backend.zero_stage, config.backend.precision == "bf16"
    size = float(zero_key(config, "reduce_bucket_size", BUCKET))
    if stage == 3:
        return 4 * size
    if (stage == 1 and is_bf16) or not zero_key(config, "contiguous_gradients", True):
        return 0.0
    return (2 if is_bf16 else 4) * size * (2 if zero_key(config, "overlap_comm", False) else 1)


def gathered_values(config: Config, model: CollaborativeMAE) -> int:
    """Return the number of values gathered at a time where copies of weights are sharded.

    FSDP2 gathers the weights outside of blocks, one block, and the next block in advance. ZeRO-3
    keeps up to 1e9 values, unless the DeepSpeed config sets ``stage3_max_live_parameters``.
    """

    def count(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters() if p.requires_grad)

    if config.backend.name == "deepspeed":
        return min(count(model), int(zero_key(config, "stage3_max_live_parameters", 1e9)))
    blocks = sorted(map(count, model.transformer_blocks()))
    return count(model) - sum(blocks[:-2])


def zero_key(config: Config, key: str, default: float) -> Any:
    """Return a key of ``zero_optimization``, or DeepSpeed's default where the config has none."""
    return extra_keys(config.backend.deepspeed).get("zero_optimization", {}).get(key, default)


def input_bytes(config: Config, teachers: Mapping[str, OnlineTeacher]) -> float:
    """Return the bytes per view of images before they are normalised.

    These are two micro-batches of uint8 views, the present one and the next. Where DALI may decode
    on the GPU, the batches that it has prepared and the decoded images of one batch are added.
    """
    sides = {config.views.image_size}
    pairs = list_teachers(config, teachers)
    sides |= {one.image_size for _, alone, one in pairs if builds_teacher(alone)}
    view = 3 * sum(side * side for side in sides)
    if config.data.decode == "torch" or config.data.resident:
        return 2 * view
    return (2 + LOOK_AHEAD) * view + DECODED_BYTES


def peak_bytes(config: Config, world_size: int, node_size: int) -> float | None:
    """Return the sum of ``memory_bytes``; ``None`` for networks that cannot be built."""
    teachers = logging.getLogger("cmtmae_scale.teachers")
    level = teachers.level
    teachers.setLevel(logging.WARNING)  # the teacher is named when it is built
    try:
        networks = build_meta_networks(config)
        return sum(memory_bytes(config, world_size, networks, node_size).values())
    except CmtMaeError:
        return None  # build_run names the error on every rank
    except (RuntimeError, ValueError, TypeError) as error:
        logger.warning("the memory of the run could not be modelled (%s)", error)
        return None
    finally:
        teachers.setLevel(level)


def views_per_forward(config: Config, world_size: int) -> int:
    """Return the micro-batch size; the configured limit where the ranks cannot share the batch."""
    try:
        return batch_plan(config, world_size).micro_batch_size
    except ConfigError:
        return config.train.micro_batch_size


def accumulation(config: Config, world_size: int) -> int:
    """Return the micro-steps per step, at least; also where the ranks cannot share the batch."""
    views = views_per_forward(config, world_size)
    return max(1, config.train.global_batch_size // (views * world_size))


def saved_bytes(config: Config, teachers: Mapping[str, OnlineTeacher], views: int = 2) -> float:
    """Return the bytes per view that autograd keeps of the student's forward and loss."""
    with torch.device("meta"):
        model = CollaborativeMAE(config, feature_widths(teachers))
    model.to(compute_dtype(config))
    model.set_activation_checkpointing(config.backend.activation_checkpointing)
    # Fake CPU tensors take the fused attention kernel, meta tensors do not.
    with FakeTensorMode(allow_non_fake_inputs=True), attention_of_a_gpu():
        model.to_empty(device="cpu")
        return count_saved_bytes(model, lambda: forward_with_loss(config, model, views)) / views


def forward_with_loss(config: Config, model: CollaborativeMAE, views: int) -> Tensor:
    """Compute a forward and its loss over synthetic views and targets."""
    work, compute_loss = make_synthetic_work(config, model, views)
    return compute_loss(model(*work.inputs), work)["total"]


class SyntheticWork(NamedTuple):
    """Inputs of a forward, see ``Work``."""

    inputs: tuple[Tensor, PatchChoice]
    valid: Tensor


def make_synthetic_work(
    config: Config, model: CollaborativeMAE, views: int
) -> tuple[SyntheticWork, Objective]:
    """Return views of zeros on the CPU, and the loss against targets of ones."""
    size, (height, width) = config.views.image_size, model.encoder.grid
    counts = grid_counts(config.mask, height * width)
    rows = views * config.mask.masks_per_view
    choice = PatchChoice(*(torch.zeros(rows, n, dtype=torch.int64) for n in counts))
    images = torch.zeros(views, 3, size, size, dtype=compute_dtype(config))
    layout = TokenLayout.from_config(config, *counts)
    eager = replace(config, backend=replace(config.backend, compile=False))
    score = make_objective(eager, layout)

    def compute_loss(predictions: Predictions, work: SyntheticWork) -> Terms:
        targets = {name: torch.ones(one.shape) for name, one in predictions.items()}
        batch = MicroBatch(images, choice, targets, work.valid, torch.tensor(0.5))
        return score(predictions, batch)

    return SyntheticWork((images, choice), torch.ones(rows, dtype=torch.bool)), compute_loss


def count_saved_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Count the bytes of storages that autograd saves, each once and without parameters."""
    known = {storage_key(p) for p in model.parameters()}
    kept: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        if storage_key(tensor) not in known:
            # A storage that is kept stays alive, so that keys stay unique.
            kept[storage_key(tensor)] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for storage in kept.values())


def storage_key(tensor: Tensor) -> int:
    """Return the identity of a tensor's storage, fake or real."""
    return tensor.untyped_storage()._cdata
