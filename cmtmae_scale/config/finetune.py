"""Every setting of a fine-tuning, and how its recipe is read.

The defaults are MAE's for ViT-B/16 on ImageNet-1K. What is fine-tuned is named on the command
line. Notation as in ``schema.py``.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from omegaconf import MISSING, OmegaConf

from cmtmae_scale.config.check import check_backend
from cmtmae_scale.config.guard import Guard
from cmtmae_scale.config.load import check_keys, merge, other_length, parse_override, read_yaml
from cmtmae_scale.config.schema import Backend, Checkpoint, Run, Train
from cmtmae_scale.errors import ConfigError


@dataclass
class LabelledData:
    """Where the labelled photographs are and how they are read."""

    path: str = MISSING
    """Images that are learnt from: a folder whose sub-folders are labels, or tars with ``.cls``
    members."""
    test_path: str = MISSING
    """Images that accuracy is measured on, of the same labels."""
    decode: Literal["auto", "dali", "torch"] = "auto"
    """As ``data.decode`` of pre-training."""
    max_bad_fraction: float = 0.001
    """Share of undecodable draws above which the run stops, in [0, 1]."""
    workers: int = 4
    """Reader and decoder threads a rank, >= 1."""


@dataclass
class Head:
    """What is put on the encoder, and how the whole is regularised within."""

    pool: Literal["mean", "cls"] = "mean"
    """mean: mean of the patch tokens, then a norm of its own; cls: class token after the encoder's
    norm."""
    drop_path: float = 0.1
    """Chance that the last block's branches are left out for a view, in [0, 1); the other blocks'
    grow to it linearly from 0."""


@dataclass
class Augment:
    """What is done to a training view."""

    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Range of the crop's share of the area, within (0, 1]."""
    aspect_ratio: tuple[float, float] = (0.75, 1.3333333333333333)
    """Range of the crop's width / height."""
    hflip: bool = True
    """Mirror half of the views."""
    magnitude: float | None = 9.0
    """RandAugment's strength, in [0, 10]: two of 15 operations a view, each with chance 1/2;
    ``None``: no RandAugment."""
    magnitude_std: float = 0.5
    """Deviation of the strength from operation to operation."""
    erase: float = 0.25
    """Chance that a rectangle of a view is filled with noise, in [0, 1]."""
    mixup: float = 0.8
    """Alpha of mixup's Beta distribution; 0: no mixup."""
    cutmix: float = 1.0
    """Alpha of cutmix's Beta distribution; 0: no cutmix. With both, each micro-batch takes one."""
    smoothing: float = 0.1
    """Share of the target spread evenly over all classes, in [0, 1)."""


@dataclass
class LayeredOptimizer:
    """AdamW with a learning rate a layer; linear warm-up, then a cosine."""

    base_lr: float = 5e-4
    """Learning rate of the head for 256 views; lr = base_lr * global_batch_size / 256."""
    layer_decay: float = 0.65
    """Factor of the learning rate from each layer to the one below it, in (0, 1]."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's betas."""
    weight_decay: float = 0.05
    """Decay of matrices; vectors, tokens and positions have none."""
    grad_clip: float | None = None
    """Largest gradient norm; ``None``: no clipping."""
    warmup_epochs: float = 5.0
    """Passes over the images with rising learning rate; fewer than the run has."""
    min_lr: float = 1e-6
    """Learning rate of the head at the end, before the layers' factors."""


def own_length() -> Train:
    """Length and batch of MAE's recipe."""
    return Train(global_batch_size=1024, micro_batch_size=128)


@dataclass
class TuningLog:
    """What is told, and how often."""

    every: int = 10
    """Steps between log entries."""


@dataclass
class Finetune:
    """A whole fine-tuning."""

    run: Run = field(default_factory=Run)
    """Identity."""
    data: LabelledData = field(default_factory=LabelledData)
    """Labelled photographs."""
    head: Head = field(default_factory=Head)
    """Classifier."""
    augment: Augment = field(default_factory=Augment)
    """Views."""
    optimizer: LayeredOptimizer = field(default_factory=LayeredOptimizer)
    """Optimizer."""
    train: Train = field(default_factory=own_length)
    """Length and batch."""
    backend: Backend = field(default_factory=Backend)
    """Sharding and precision."""
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    """Saved states."""
    log: TuningLog = field(default_factory=TuningLog)
    """Logs."""
    guard: Guard = field(default_factory=Guard)
    """Skipped steps, ranks that hang."""


def load_finetune(path: str | Path, overrides: Sequence[str] = ()) -> Finetune:
    """Read a recipe, apply overrides and check the whole.

    Args:
        path: a YAML file with the groups of ``Finetune``.
        overrides: ``group.key=value``, values in YAML's notation; ``null`` means off.

    Returns:
        Plain dataclasses, every field set.

    Raises:
        ConfigError: names the file or override, the key, what was found and what would do.
    """
    tree = read_yaml(Path(path))
    check_keys(tree, Finetune, str(path))
    config: Any = merge(OmegaConf.structured(Finetune), tree, str(path))
    for override in overrides:
        update = parse_override(override)
        check_keys(update, Finetune, override)
        config = merge(config, update, override)
        cleared = other_length(update)
        if cleared:
            config = merge(config, {"train": {cleared: None}}, override)
    absent = sorted(OmegaConf.missing_keys(config))
    if absent:
        raise ConfigError(f"{path}: {', '.join(absent)} must be given")
    found = cast(Finetune, OmegaConf.to_object(config))
    for problem in problems(found):
        raise ConfigError(f"{path}: {problem}")
    return found


def problems(config: Finetune) -> Iterator[str]:
    """Yield every problem of a config, most basic first."""
    yield from check_ranges(config)
    yield from check_length(config)
    yield from check_augment(config)
    yield from check_backend(config.backend)


def check_ranges(config: Finetune) -> Iterator[str]:
    """Numbers within their range."""
    optimizer, train = config.optimizer, config.train
    above_zero = {
        "train.global_batch_size": train.global_batch_size,
        "train.micro_batch_size": train.micro_batch_size,
        "train.epochs": train.epochs,
        "train.steps": train.steps,
        "train.stop_after": train.stop_after,
        "data.workers": config.data.workers,
        "checkpoint.every": config.checkpoint.every,
        "checkpoint.keep": config.checkpoint.keep,
        "log.every": config.log.every,
        "optimizer.grad_clip": optimizer.grad_clip,
        "optimizer.layer_decay": optimizer.layer_decay,
    }
    for key, value in above_zero.items():
        if value is not None and not value > 0:
            yield f"{key}={value} must be above 0"
    not_negative = {
        "optimizer.base_lr": optimizer.base_lr,
        "optimizer.min_lr": optimizer.min_lr,
        "optimizer.weight_decay": optimizer.weight_decay,
        "optimizer.warmup_epochs": optimizer.warmup_epochs,
        "augment.mixup": config.augment.mixup,
        "augment.cutmix": config.augment.cutmix,
        "augment.magnitude_std": config.augment.magnitude_std,
    }
    for key, value in not_negative.items():
        if not value >= 0:
            yield f"{key}={value} must not be negative"
    for key, value in (
        ("data.max_bad_fraction", config.data.max_bad_fraction),
        ("augment.erase", config.augment.erase),
    ):
        if not 0 <= value <= 1:
            yield f"{key}={value} must lie in [0, 1]"
    below_one = {
        "head.drop_path": config.head.drop_path,
        "augment.smoothing": config.augment.smoothing,
    }
    for key, value in below_one.items():
        if not 0 <= value < 1:
            yield f"{key}={value} must lie in [0, 1)"
    if optimizer.layer_decay > 1:
        yield f"optimizer.layer_decay={optimizer.layer_decay} must not be above 1"
    if not all(0 <= beta < 1 for beta in optimizer.betas):
        yield f"optimizer.betas={optimizer.betas} must lie in [0, 1)"
    if not config.run.output_dir:
        yield "run.output_dir is empty; name a folder"


def check_length(config: Finetune) -> Iterator[str]:
    """Exactly one length, and a warm-up that ends."""
    epochs, steps = config.train.epochs, config.train.steps
    if (epochs is None) == (steps is None):
        found = "neither" if epochs is None else f"epochs={epochs} and steps={steps}"
        yield f"train: give epochs or steps, exactly one of them; found {found}"
    warmup = config.optimizer.warmup_epochs
    if epochs is not None and warmup >= epochs:
        yield f"optimizer.warmup_epochs={warmup} must be below train.epochs={epochs}"


def check_augment(config: Finetune) -> Iterator[str]:
    """Crops that exist, and pairs to mix."""
    augment = config.augment
    low, high = augment.crop_scale
    if not 0 < low <= high <= 1:
        yield f"augment.crop_scale={augment.crop_scale} must satisfy 0 < low <= high <= 1"
    low, high = augment.aspect_ratio
    if not 0 < low <= high:
        yield f"augment.aspect_ratio={augment.aspect_ratio} must satisfy 0 < low <= high"
    if augment.magnitude is not None and not 0 <= augment.magnitude <= 10:
        yield f"augment.magnitude={augment.magnitude} must lie in [0, 10]"
    if (augment.mixup or augment.cutmix) and config.train.micro_batch_size % 2:
        yield (
            f"train.micro_batch_size={config.train.micro_batch_size}: mixup and cutmix pair the views of a "
            "micro-batch; use an even number, or set augment.mixup=0 and augment.cutmix=0"
        )
