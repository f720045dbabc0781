"""Every setting of fine-tuning, in the notation of ``schema.py``.

The defaults are MAE's for ViT-B/16 on ImageNet-1K. The command line names the encoder that is
fine-tuned.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cmtmae_scale.config.batch import pairs_views, refuse_single_views
from cmtmae_scale.config.check import check_backend, check_length, check_log, check_ranges
from cmtmae_scale.config.deepspeed import extra_keys
from cmtmae_scale.config.load import load_recipe
from cmtmae_scale.config.ranges import bounded, fraction, non_negative, positive, step_range
from cmtmae_scale.config.schema import MISSING, Backend, Checkpoint, Guard, Run, Train


@dataclass
class LabelledData:
    """Where the labelled images are and how they are read."""

    path: str = MISSING
    """Training images: a folder whose sub-folders are labels, tars with ``.cls`` members, or
    Parquet files with a column of labels."""
    test_path: str = MISSING
    """Test images, of the same labels."""
    decode: Literal["auto", "dali", "torch"] = "auto"
    """As ``data.decode`` of pre-training."""
    verify_index: Literal["never", "changed", "always"] = "changed"
    """As ``data.verify_index`` of pre-training; for the test images too."""
    exif_orientation: bool = True
    """As ``data.exif_orientation`` of pre-training; for the test images too."""
    max_bad_fraction: float = fraction(0.001)
    """As ``data.max_bad_fraction`` of pre-training."""
    workers: int = positive(4)
    """Readers and decoders per rank, threads or processes; each uses one core."""
    worker_type: Literal["auto", "thread", "process"] = "auto"
    """As ``data.worker_type`` of pre-training."""


@dataclass
class Head:
    """The classifier's head, and stochastic depth."""

    pool: Literal["mean", "cls"] = "mean"
    """mean: mean of the patch tokens, then a norm of its own; cls: class token after the encoder's
    norm."""
    drop_path: float = bounded(0.1, at_least=0, below=1)
    """Probability that the last block's branches are dropped for a view; it grows linearly from 0
    in the first block."""


@dataclass
class Augment:
    """How a training view is augmented."""

    crop_scale: tuple[float, float] = bounded((0.08, 1.0), above=0, at_most=1, ascending=True)
    """Range of the crop's share of the image's area."""
    aspect_ratio: tuple[float, float] = bounded((0.75, 4 / 3), above=0, ascending=True)
    """Range of the crop's width / height."""
    hflip: bool = True
    """Flip half of the views horizontally."""
    magnitude: float | None = bounded(9.0, at_least=0, at_most=10)
    """RandAugment's magnitude: two of 15 operations per view, each with probability 1/2; ``None``:
    no RandAugment."""
    magnitude_std: float = non_negative(0.5)
    """Standard deviation of the magnitude over operations."""
    erase: float = fraction(0.25)
    """Probability that a rectangle of a view is filled with noise."""
    mixup: float = non_negative(0.8)
    """Alpha of mixup's Beta distribution; 0: no mixup."""
    cutmix: float = non_negative(1.0)
    """Alpha of cutmix's Beta distribution; 0: no cutmix. With both, each micro-batch gets one of
    them."""
    smoothing: float = bounded(0.1, at_least=0, below=1)
    """Share of the target spread evenly over all classes."""


@dataclass
class LayeredOptimizer:
    """AdamW with one learning rate per layer; linear warm-up, then a cosine."""

    base_lr: float = non_negative(5e-4)
    """Learning rate of the head for 256 views; lr = base_lr * global_batch_size / 256."""
    layer_decay: float = bounded(0.65, above=0, at_most=1)
    """Factor of the learning rate from each layer to the layer below."""
    betas: tuple[float, float] = bounded((0.9, 0.999), at_least=0, below=1)
    """AdamW's betas."""
    weight_decay: float = non_negative(0.05)
    """Decay of matrices; vectors, tokens and positional embeddings have none."""
    grad_clip: float | None = positive(None)
    """Largest gradient norm; ``None``: no clipping."""
    warmup_epochs: float = non_negative(5.0)
    """Passes over the images with rising learning rate; fewer than the run has."""
    min_lr: float = non_negative(1e-6)
    """Learning rate of the head at the end, before the layers' factors."""


@dataclass
class TuningLog:
    """How often progress is reported."""

    every: int = positive(10)
    """Steps between log entries."""
    trackers: list[str] = field(default_factory=list[str])
    """As ``log.trackers`` of pre-training."""
    profile_steps: list[int] = step_range()
    """As ``log.profile_steps`` of pre-training."""


@dataclass
class Finetune:
    """The settings of a fine-tuning."""

    run: Run = field(default_factory=Run)
    """Identity."""
    data: LabelledData = field(default_factory=LabelledData)
    """Labelled images."""
    head: Head = field(default_factory=Head)
    """Classifier."""
    augment: Augment = field(default_factory=Augment)
    """Views."""
    optimizer: LayeredOptimizer = field(default_factory=LayeredOptimizer)
    """Optimizer."""
    train: Train = field(
        default_factory=lambda: Train(global_batch_size=1024, micro_batch_size=128)
    )
    """Length and batch size."""
    backend: Backend = field(default_factory=Backend)
    """Sharding and precision."""
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    """Saved states."""
    log: TuningLog = field(default_factory=TuningLog)
    """Logs."""
    guard: Guard = field(default_factory=Guard)
    """Skipped steps, ranks that hang."""


def load_finetune(path: str | Path, overrides: Sequence[str] = ()) -> Finetune:
    """Read a recipe of fine-tuning, apply overrides and check the whole; see ``load_recipe``."""
    config = load_recipe(Finetune, find_finetune_problems, path, overrides)
    extra_keys(config.backend.deepspeed)
    return config


def find_finetune_problems(config: Finetune) -> Iterator[str]:
    """Yield every problem of a fine-tuning config, most basic first."""
    yield from check_ranges(config)
    yield from check_length(config.train)
    warmup, epochs = config.optimizer.warmup_epochs, config.train.epochs
    if epochs is not None and warmup >= epochs:
        yield f"optimizer.warmup_epochs={warmup} must be below train.epochs={epochs}"
    if pairs_views(config) and config.train.micro_batch_size < 2:
        yield refuse_single_views(config.train.micro_batch_size)
    yield from check_backend(config.backend)
    yield from check_log(config.log.trackers, config.log.profile_steps)
