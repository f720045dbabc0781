"""A tiny CMT-MAE step on made-up views, run through any backend; shapes that do not divide."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from cmtmae_scale.backends.fsdp import Fsdp
from cmtmae_scale.backends.initial import initialise_backend
from cmtmae_scale.backends.plain import Plain
from cmtmae_scale.checkpoint import layout
from cmtmae_scale.checkpoint.chunks import load_fragments
from cmtmae_scale.checkpoint.writer import Writer
from cmtmae_scale.config.schema import Config
from cmtmae_scale.method.attention import collaborative_attention
from cmtmae_scale.method.build import build_student
from cmtmae_scale.method.initialisation import initial_values, initialise
from cmtmae_scale.method.masking import choose_masks, token_counts
from cmtmae_scale.method.model import CollaborativeMAE
from cmtmae_scale.method.student import MomentumEncoder
from cmtmae_scale.method.targets import Predictions, TokenLayout, normalise, objective, term_weights
from cmtmae_scale.pretraining.prepare import MicroBatch

GLOBAL, LENGTH, TEACHER_WIDTH, ALPHA = 8, 16, 7, 0.6


def make_config(**changes: Any) -> Config:
    config = Config()
    config.student.arch = "test_vit"
    config.views.image_size = 64
    config.decoder.depth, config.decoder.width, config.decoder.heads = 1, 36, 3
    config.collaboration.alpha_attention = 0.5
    config.collaboration.alpha_target = ALPHA
    config.mask.masks_per_view = 2
    config.mask.salient_fraction = 0.0
    config.optimizer.grad_clip = 0.3
    config.backend.precision = "fp32"
    for key, value in changes.items():
        group, name = key.split("__")
        setattr(getattr(config, group), name, value)
    return config


def make_views(positions: list[int]) -> tuple[torch.Tensor, ...]:
    """Images, teacher attention, teacher features and validity, each a function of the position."""
    images, attention, features = [], [], []
    for position in positions:
        generator = torch.Generator().manual_seed(1000 + position)
        images.append(torch.randn(3, 64, 64, generator=generator))
        attention.append(torch.rand(LENGTH, generator=generator))
        features.append(torch.randn(LENGTH + 1, TEACHER_WIDTH, generator=generator) * 3)
    valid = torch.tensor([position % 7 != 3 for position in positions])
    return torch.stack(images), torch.stack(attention), torch.stack(features), valid


def make_layout(config: Config) -> TokenLayout:
    return TokenLayout.from_config(config, *token_counts(LENGTH, config.mask.ratio))


def make_models(config: Config) -> tuple[CollaborativeMAE, MomentumEncoder]:
    model = CollaborativeMAE(config, {"teacher": TEACHER_WIDTH})
    initialise(model, 0)
    model.set_activation_checkpointing(config.backend.activation_checkpointing)
    momentum = build_student(config, MomentumEncoder)
    momentum.load_state_dict(model.encoder.state_dict())
    return model, momentum.requires_grad_(False).eval()


def make_backend(config: Config, kind: str) -> Any:
    model, momentum = (one.to("meta") for one in make_models(config))
    layout, values = make_layout(config), initial_values(model, 0)

    def compute(predictions: Predictions, batch: MicroBatch) -> Any:
        weights = term_weights(config, batch.alpha_target)
        return objective(predictions, batch.targets, batch.valid, layout, config.loss, weights)

    scale = 1 / (GLOBAL * config.mask.masks_per_view)
    cpu = torch.device("cpu")
    backend: Any
    shared = (model, momentum, compute, config.optimizer, config.backend)
    if kind == "plain":
        backend = Plain(*shared, scale, cpu)
    elif kind.startswith("zero"):
        backend = make_zero(config, model, momentum, compute, scale, kind)
    else:
        local = int(kind.removeprefix("node")) if kind.startswith("node") else 1
        config.backend.sharding = "hybrid" if kind.startswith("node") else kind  # pyright: ignore
        backend = Fsdp(*shared, scale, cpu, local)
    initialise_backend(backend, values)
    return backend


def make_zero(
    config: Config, model: Any, momentum: Any, compute: Any, scale: float, kind: str
) -> Any:
    """``zero1`` to ``zero3``; ``gathered`` anew at each use, or moments ``offloaded``."""
    from cmtmae_scale.backends.deepspeed import Zero
    from cmtmae_scale.config.deepspeed import deepspeed_config

    config.backend.name, config.backend.zero_stage = "deepspeed", int(kind[4])  # pyright: ignore
    if kind.endswith("gathered"):
        config.backend.deepspeed = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    if kind.endswith("offloaded"):
        config.backend.deepspeed = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    tree = deepspeed_config(config, 2)
    return Zero(
        model, momentum, compute, config.optimizer, config.backend, tree, scale, torch.device("cpu")
    )


def make_micro_batch(config: Config, backend: Any, positions: list[int]) -> MicroBatch:
    images, attention, features, valid = make_views(positions)
    momentum_features, momentum_attention = backend.momentum_forward(images)
    mixed = collaborative_attention(attention, momentum_attention, 0.5)
    choice = choose_masks(config.mask, mixed, torch.tensor(positions), 0, 0.0)
    layout = make_layout(config)
    targets = {
        "teacher": layout.gather(normalise(features, "l2"), choice),
        "student": layout.gather(normalise(momentum_features, "ln"), choice),
    }
    rows = valid.repeat_interleave(config.mask.masks_per_view)
    return MicroBatch(images, choice, targets, rows, torch.tensor(ALPHA))


def run_steps(
    backend: Any, config: Config, micro: int, first: int, last: int, poison: int | None = None
) -> list[tuple[float, float, bool]]:
    """Steps ``first`` to ``last`` - 1: loss, gradient norm, applied."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    world = dist.get_world_size() if dist.is_initialized() else 1
    accumulation = GLOBAL // micro // world
    curve = []
    for step in range(first, last):
        report = torch.zeros(1)
        for a in range(accumulation):
            start = step * GLOBAL + (a * world + rank) * micro
            batch = make_micro_batch(config, backend, list(range(start, start + micro)))
            if step == poison and rank == world - 1 and a == 0:
                batch.images[0] = float("nan")
            report += backend.micro(batch, last=a + 1 == accumulation)["total"]
        outcome = backend.step(2e-3 * min(1.0, (step + 1) / 4), report)
        if outcome.applied:
            backend.momentum_update(0.9)
        rows = GLOBAL * config.mask.masks_per_view
        curve.append((outcome.report[0] / rows, outcome.grad_norm, outcome.applied))
    return curve


def snapshot(backend: Any) -> dict[str, tuple[int, tuple[int, ...], Any]]:
    return {
        key: (part.offset, part.shape, part.local.numpy().copy())
        for key, part in backend.fragments().items()
    }


def assemble(parts: list[dict[str, tuple[int, tuple[int, ...], Any]]]) -> dict[str, Any]:
    """Whole tensors from every rank's fragments."""
    whole = {}
    for key, (_, shape, _) in parts[0].items():
        flat = np.full(int(np.prod(shape)), np.nan, np.float32)
        for part in parts:
            offset, _, local = part[key]
            flat[offset : offset + len(local)] = local
        assert not np.isnan(flat).any(), key
        whole[key] = flat.reshape(shape)
    return whole


def run_case(kind: str, micro: int, steps: int, changes: dict[str, Any]) -> Any:
    """On one rank: a whole run; returns its curve and this rank's fragments."""
    config = make_config(**changes)
    backend = make_backend(config, kind)
    curve = run_steps(backend, config, micro, 0, steps)
    return curve, snapshot(backend)


def run_poisoned(kind: str, micro: int) -> Any:
    """Two good steps, then one whose last rank sees a NaN; before, after, and on."""
    config = make_config()
    backend = make_backend(config, kind)
    run_steps(backend, config, micro, 0, 2)
    before = snapshot(backend)
    (bad,) = run_steps(backend, config, micro, 2, 3, poison=2)
    after = snapshot(backend)
    (good,) = run_steps(backend, config, micro, 2, 3)
    return before, after, bad, good


def run_gradient(micro: int) -> Any:
    """Loss and full gradient of one step before clipping, by name, through FSDP2 or plain."""
    config = make_config(optimizer__clip=None, optimizer__base_lr=0.0)
    backend = make_backend(config, "full" if dist.is_initialized() else "plain")
    curve = run_steps(backend, config, micro, 0, 1)
    # After one AdamW step exp_avg is 0.1 of the gradient.
    moments = {k: v for k, v in snapshot(backend).items() if k.startswith("exp_avg.")}
    return curve, moments


def trained(key: str, value: Any) -> Any:
    """Exclude biases of keys: softmax ignores them, so their gradient is rounding noise, which
    AdamW amplifies to full size.
    """
    return (
        np.delete(value, np.s_[len(value) // 3 : 2 * len(value) // 3])
        if key.endswith("qkv.bias")
        else value
    )


def run_average(kind: str, momentum: float) -> Any:
    """In bf16: fragments at the start, and after a step and one update of the average."""
    config = make_config(backend__precision="bf16")
    backend = make_backend(config, kind)
    before = snapshot(backend)
    report = torch.zeros(1)
    for a in range(2):
        start = (a * dist.get_world_size() + dist.get_rank()) * 2
        batch = make_micro_batch(config, backend, [start, start + 1])
        report += backend.micro(batch, last=a == 1)["total"]
    assert backend.step(2e-3, report).applied
    backend.momentum_update(momentum)
    return before, snapshot(backend)


def run_refusals(kind: str, micro: int, changes: dict[str, Any]) -> Any:
    """Two good steps, three that must not be applied, each for another reason, and a good one."""
    config = make_config(**changes)
    backend = make_backend(config, kind)
    run_steps(backend, config, micro, 0, 2)
    before = snapshot(backend)
    outcomes = run_steps(backend, config, micro, 2, 3, poison=2)
    for scale, report in ((float("inf"), 0.0), (1.0, float("inf"))):
        world, rank = dist.get_world_size(), dist.get_rank()
        usual = backend.loss_scale
        for a in range(GLOBAL // micro // world):
            start = 2 * GLOBAL + (a * world + rank) * micro
            batch = make_micro_batch(config, backend, list(range(start, start + micro)))
            last = a + 1 == GLOBAL // micro // world
            backend.loss_scale = usual * (scale if rank == world - 1 else 1.0)
            backend.micro(batch, last)
        backend.loss_scale = usual
        mine = report if rank == 0 else 0.0
        outcome = backend.step(1e-3, torch.tensor([mine]))
        outcomes.append((outcome.report[0], outcome.grad_norm, outcome.applied))
    after = snapshot(backend)
    return before, after, [*outcomes, *run_steps(backend, config, micro, 2, 3)]


def run_overwritten(kind: str, micro: int) -> Any:
    """Two steps, other values in every fragment, two steps: losses, live weights, saved."""
    config = make_config()
    backend = make_backend(config, kind)
    run_steps(backend, config, micro, 0, 2)
    for part in backend.fragments().values():
        part.local.mul_(1.25)
    backend.after_load(7)
    losses = [loss for loss, _, _ in run_steps(backend, config, micro, 2, 4)]
    live = live_weights(backend)
    fragment = backend.fragments()["model.encoder.cls_token"]
    whole = fragment.local.numel() == int(np.prod(fragment.shape))
    saved = fragment.local.numpy().reshape(fragment.shape).copy() if whole else None
    return losses, live, saved


def live_weights(backend: Any) -> dict[str, Any]:
    """The whole weights of the forward, and those of the momentum encoder."""
    from torch.distributed.tensor import DTensor

    found = {}
    for name, parameter in backend.model.named_parameters():
        if isinstance(parameter, DTensor):
            found[name] = parameter.full_tensor().detach().numpy()
        elif hasattr(parameter, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter]):
                found[name] = parameter.detach().float().numpy().copy()
        else:
            found[name] = parameter.detach().float().numpy().copy()
    parts = getattr(backend.momentum, "parts", [])  # of an encoder that is gathered by block
    for number in range(len(parts)):
        backend.momentum.fetch(number)
    for name, parameter in backend.momentum.module.named_parameters():
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        found[f"momentum.{name}"] = whole.detach().float().numpy().copy()
    return found


def read_bucket_size() -> int:
    """Return the bucket size that DeepSpeed read from ``backend.deepspeed``."""
    config = make_config()
    config.backend.name = "deepspeed"
    config.backend.deepspeed = {"zero_optimization": {"reduce_bucket_size": 12345}}
    backend = make_zero(config, *make_models(config), None, 1.0, "zero2")
    return backend.engine.zero_reduce_bucket_size()


def save_after_two_steps(kind: str, micro: int, folder: Path) -> float:
    """A run of two steps, saved; returns the loss of the third."""
    config = make_config()
    backend = make_backend(config, kind)
    run_steps(backend, config, micro, 0, 2)
    folder.mkdir(parents=True, exist_ok=True)
    distributed = dist.is_initialized()
    rank, size = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    writer = Writer(folder, rank, size, keep=1, background=False, token=1)
    writer.finish(2, backend.fragments(), {})
    return run_steps(backend, config, micro, 2, 3)[0][0]


def load_each(kind: str, micro: int, folders: list[Path]) -> list[Any]:
    """Load saved states one after another; returns the loaded values and the next loss."""
    found = []
    for folder in folders:
        config = make_config()
        backend = make_backend(config, kind)
        load_fragments(layout.folder_of(folder, 2), backend.fragments())
        backend.after_load(2)
        held = snapshot(backend)
        found.append((held, run_steps(backend, config, micro, 2, 3)[0][0]))
    return found
