"""Every setting of pre-training: one dataclass per group, a sentence under each field.

``MISSING`` means that the recipe must give the value; ``None`` means off. Groups mirror a YAML
file. A field's range stands in its default (``positive(8)``, ``fraction(0.0)``, ``bounded(...)``)
and is checked from there; numbers must be finite. ``finetune.py`` uses the same notation.
"""

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from omegaconf import MISSING

from cmtmae_scale.config.ranges import (
    blocks,
    bounded,
    fraction,
    given_blocks,
    non_negative,
    positive,
    scheduled,
    step_range,
)

MapSource = Literal["cls", "pool", "mean_query", "activation_norm"]
"""Where a teacher's attention map comes from."""
TargetNorm = Literal["l2", "ln", "instance", "channel", "center", "none"]
"""Normalisation of the features of a target."""


@dataclass
class Schedule:
    """A number as a function of progress u = position / horizon in [0, 1]."""

    kind: Literal["constant", "two_stage", "linear", "cosine"] = "constant"
    """constant: ``start``; two_stage: ``start`` for u < ``switch``, then ``end``; linear and
    cosine: from ``start`` at ``u0`` to ``end`` at ``u1``, constant outside."""
    start: float = fraction(MISSING)
    """Value at the beginning (the value, for constant)."""
    end: float | None = fraction(None)
    """Value at the end; not for constant."""
    switch: float | None = fraction(None)
    """Progress at which two_stage changes."""
    u0: float = fraction(0.0)
    """Progress at which linear and cosine leave ``start``."""
    u1: float = fraction(1.0)
    """Progress at which linear and cosine reach ``end``; above ``u0``."""


@dataclass
class Run:
    """Identity of the run."""

    name: str = "cmtmae"
    """Label in logs."""
    output_dir: str = field(default=MISSING, metadata={"empty": "name a folder"})
    """Folder of checkpoints, logs and the resolved config; the same folder resumes."""
    seed: int = non_negative(0)
    """Seed of weights, order, views and masks; never changes within a run."""
    deterministic: bool = False
    """On a GPU, use only kernels that give the same bits at every launch, at some loss of speed; a
    CPU's are so anyway."""
    allow_change: list[str] = field(default_factory=list[str])
    """Keys that may differ from those of the checkpoint that is resumed."""
    time_limit_s: float | None = positive(None)
    """Save and exit with code 75 this many seconds after the launch. ``None``: no limit but
    SLURM's, where the run stops in the same way two minutes before the job's end."""


@dataclass
class Data:
    """Where the images are and how they are read."""

    source: Literal["auto", "folder", "webdataset", "parquet"] = "auto"
    """Layout under ``path``: a folder of images, WebDataset tars or Parquet files; auto:
    detected."""
    path: str = MISSING
    """Folder of images (sub-folders are labels); or tars (``KEY.jpg``, ``KEY.cls``): a folder of
    tars, one tar, or a pattern such as ``train-{000..146}.tar`` or ``train-*.tar``; or the address
    of tars in a store (``s3://``, ``gs://``, ``https://``), without credentials; or Parquet files
    with a column of encoded images: their folder, one, or a pattern such as ``train-*.parquet``."""
    index: str | None = None
    """Folder of the index, for all ranks; ``None``: ``RUN_DIR/index``."""
    verify_index: Literal["never", "changed", "always"] = "changed"
    """Before a kept index is used - never: of a folder nothing is listed, of tars and Parquet files
    names and sizes are compared; changed: names, sizes and times of all files; always: its digests
    too."""
    store_cache: str | None = None
    """Folder on a disk of each node for pieces of the tars of a store, which the ranks of the node
    share and later epochs and runs read; ``None``: each image is requested from the store."""
    expected_images: int | None = positive(None)
    """Number of usable images; checked, and used by ``--dry-run`` when ``path`` is absent."""
    decode: Literal["auto", "dali", "torch"] = "auto"
    """dali: DALI, on the GPU where there is one; torch: the CPU;
    auto: DALI if it is installed and there is a GPU, else torch."""
    resident: bool = False
    """Keep all decoded images on each rank's device and crop the views there: for images of 32 or
    64 pixels, at most 8 GiB. Same views; on a GPU a pixel may differ by two levels of 255."""
    max_pixels: int = positive(100_000_000)
    """Images with more pixels (width x height) are excluded from the index."""
    exif_orientation: bool = True
    """Turn images upright as their EXIF orientation (in a TIFF: its tag) says; false: use the
    pixels as stored, as most published recipes do."""
    max_bad_fraction: float = fraction(0.001)
    """Share of undecodable images, among those sampled, above which the run stops."""
    shuffle: Literal["full", "window", "none"] = "full"
    """full: a fresh permutation each epoch; window: a permutation that reads from few places at a
    time, for tars that were shuffled when written, on slow storage; none: index order."""
    window_on_sorted: bool = False
    """Let ``shuffle=window`` accept images that are sorted by class, which it refuses otherwise:
    its batches then hold few classes."""
    workers: int = positive(4)
    """Readers and decoders per rank, threads or processes; each uses one core."""
    worker_type: Literal["auto", "thread", "process"] = "auto"
    """process: worker processes, which leave the interpreter that launches kernels alone and take
    seconds to start; thread: threads; auto: process on a GPU, thread on a CPU. Same views."""


@dataclass
class Views:
    """How an image is cropped."""

    image_size: int = positive(224)
    """Side of the student's view, pixels; a multiple of its patch size."""
    crop_scale: tuple[float, float] = bounded((0.2, 1.0), above=0, at_most=1, ascending=True)
    """Range of the crop's share of the image's area."""
    aspect_ratio: tuple[float, float] = bounded((0.75, 4 / 3), above=0, ascending=True)
    """Range of the crop's width / height."""
    hflip: bool = True
    """Flip half of the views horizontally."""
    views_per_image: int | None = positive(None)
    """Number of distinct views per image (view = epoch mod count); ``None``: new each epoch."""


@dataclass
class Student:
    """The trained encoder."""

    arch: str = "vit_base_patch16_224"
    """A timm name of a VisionTransformer or of an Eva, such as DINOv3, EVA-02 or PE."""
    patch_size: int | None = positive(None)
    """Patch side in pixels; ``None``: the architecture's own."""
    width: int | None = positive(None)
    """Channels, timm's ``embed_dim``, a multiple of ``heads`` and of 4; ``None``: the
    architecture's own."""
    depth: int | None = positive(None)
    """Blocks; ``None``: the architecture's own."""
    heads: int | None = positive(None)
    """Attention heads; ``None``: as many as give each head the architecture's channels, which is
    the architecture's own number at its own width."""
    init_weights: str | None = None
    """Path of a file with the initial weights, .safetensors, .pt, .pth, .bin, .ckpt or .tar, or of
    a folder of torch.distributed.checkpoint, under the names of timm, MAE or transformers, or of
    DINOv3, DINOv2, PE or CLIP as published, also as MAE, DINO, DINOv2 or Lightning save them;
    ``None``: random initialisation."""
    init_from_run: str | None = None
    """Folder of another run, for its newest checkpoint, or of a checkpoint: a new run starts from
    its student, decoder, heads and EMA weights, also at another ``views.image_size``; ``None``: see
    ``init_weights``."""
    init_optimizer: bool = False
    """Take AdamW's moments from ``init_from_run`` too; false: they start at zero."""


@dataclass
class Decoder:
    """The light network that predicts the targets."""

    type: Literal["prompt", "full", "cross", "none"] = "prompt"
    """prompt: MILAN's; full: MAE's; cross: CrossMAE's; none: heads on the encoder's tokens."""
    depth: int = positive(8)
    """Blocks."""
    width: int = positive(512)
    """Channels; a multiple of ``heads`` and of 4."""
    heads: int = positive(16)
    """Attention heads."""
    predict_ratio: float | None = fraction(None)
    """Share of all patches that is predicted, above 0 and at most ``mask.ratio`` (``cross`` only);
    ``None``: all masked patches."""
    position_grid: int | None = positive(None)
    """Side, in patches, of the grid whose positions are stretched over the student's: that of the
    run of ``student.init_from_run`` at another image size; ``None``: the student's own grid."""
    prompt_norm_context: bool = False
    """Apply each block's first norm to the context too (``prompt`` only; MILAN does not)."""


@dataclass
class Teacher:
    """The frozen teacher."""

    library: Literal["open_clip", "timm", "python"] = "open_clip"
    """Library that builds the teacher; python: a function of yours (docs/teachers.md)."""
    model: str | None = None
    """Model name; for open_clip also the path of a model's JSON description; for python
    ``package.module:factory``."""
    weights: str | None = None
    """Pretrained tag, path of a .safetensors or .pt file, or ``random`` (tests); for python a file,
    or ``None`` for the weights that the factory returns."""
    quick_gelu: bool | None = None
    """Whether the weights were trained with QuickGELU; must be given for open_clip, and for a file
    of CLIP weights that timm loads."""
    image_size: int | None = positive(None)
    """Side of the teacher's view, pixels; ``None``: chosen so that its grid is the student's."""
    depth: int | None = positive(None)
    """Keep only the first blocks, or stages of a convolutional network; ``None``: all."""
    feature: Literal["proj", "ln_post", "block"] = "proj"
    """Token features: projected, after the last norm, or a block's output before that norm."""
    precision: Literal["bf16", "fp8"] = "bf16"
    """Linear layers of the blocks: bf16 (float32 with ``backend.precision=fp32``), or fp8, which is
    faster on GPUs of compute capability 8.9 and above, and less exact."""
    mode: Literal["online", "cached", "sidecar", "none"] = "online"
    """online: the teacher runs beside the student; cached: its attention maps and features are read
    from ``cache.dir``; sidecar: rows that ``cmtmae precompute --follow RUN_DIR`` computes ahead
    of the run are read, and the teacher runs where a row is missing; none: no teacher (MAE)."""


@dataclass
class NamedTeacher(Teacher):
    """Several frozen teachers, in place of ``teacher``: a list of entries, each with a name."""

    name: str = MISSING
    """Name of the entry in keys, logs and weights: lower-case letters, digits and ``_``."""
    loss: float = non_negative(1.0)
    """Weight of the entry's features among those of all teachers; 0: its attention map only."""
    map: float = non_negative(1.0)
    """Weight of the entry's attention map among those of all teachers; 0: its features only."""
    attention_source: MapSource | None = None
    """As ``attention.source``, which it is if ``None``."""
    attention_layers: list[int] | None = given_blocks()
    """As ``attention.layers``, which it is if ``None``."""
    norm: TargetNorm | None = None
    """As ``target.teacher.norm``, which it is if ``None``."""
    layers: list[int] | None = given_blocks()
    """As ``target.teacher.layers``, which it is if ``None``."""
    cache_dir: str | None = None
    """Folder of the entry's cache; ``None``: the folder of its name below ``cache.dir``."""


@dataclass
class Momentum:
    """EMA weights of the student: m * old + (1 - m) * new after each applied step."""

    start: float = fraction(0.996)
    """m at the beginning."""
    end: float = fraction(1.0)
    """m at the end."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """cosine from start to end; constant: start."""
    precision: Literal["bf16", "fp8"] = "bf16"
    """Linear layers of the momentum encoder's blocks, as in ``teacher.precision``."""


@dataclass
class Attention:
    """How a model's attention becomes an attention map over patches."""

    source: MapSource = "cls"
    """Teacher's attention map: class-token row, attention-pool query, or mean over patch queries;
    activation_norm: the norm of each patch's features, for teachers without attention. The momentum
    encoder's is its class-token row, or mean_query if it has no class token."""
    layers: list[int] = blocks()
    """Blocks whose normalised attention maps are averaged; negative counts from the end."""
    norm: Literal["prob", "minmax", "rank", "zscore"] = "prob"
    """Normalisation before mixing."""
    temperature: float = positive(1.0)
    """T in a ** (1 / T) before mixing."""
    clip_quantile: float = fraction(1.0)
    """Clamp values above this quantile of an attention map; 1 is off."""


@dataclass
class Mask:
    """Which patches are masked."""

    sampler: Literal[
        "random",
        "hide_salient",
        "hide_salient_mix",
        "hide_salient_sample",
        "reveal_salient",
        "reveal_salient_topk",
    ] = "reveal_salient"
    """Rule from the mixed attention map to the masked patches; see "Samplers" in docs/method.md."""
    ratio: float = bounded(0.75, above=0, below=1)
    """Share of patches masked."""
    masks_per_view: int = positive(1)
    """Masks sampled per view; they share the forwards of teacher and momentum encoder."""
    salient_fraction: Any = scheduled(kind="linear", start=0.0, end=0.5)
    """Share of the masked patches that is most salient (``hide_salient_mix``)."""
    throw_ratio: float = fraction(0.0)
    """Share of patches neither seen nor predicted."""
    hint_fraction: float = fraction(0.0)
    """Share of patches revealed at random among the most salient patches."""
    hint_pool: float = fraction(0.1)
    """Share of patches that counts as most salient for hints."""
    prob: float = fraction(1.0)
    """Share of views masked by ``sampler``; the others are masked at random."""
    temperature: float = positive(1.0)
    """Temperature of the weighted samplers."""
    floor: float = positive(1e-6)
    """Smallest weight of a patch in the weighted samplers; below 1/N for N patches."""


@dataclass
class Collaboration:
    """Weights of the teacher against the momentum encoder; 1 is teacher alone."""

    alpha_attention: Any = scheduled(kind="two_stage", start=1.0, end=0.5, switch=0.1)
    """Teacher's weight in the attention map."""
    alpha_target: Any = scheduled(kind="linear", start=1.0, end=0.7, u1=0.25)
    """Teacher's weight in the loss."""


@dataclass
class TeacherTarget:
    """The teacher's features as a target."""

    norm: TargetNorm = "l2"
    """l2, ln: each token; instance: each channel over the patches of a view; channel, center: each
    channel by running statistics of all ranks' views, center without division."""
    layers: list[int] = blocks()
    """Blocks whose outputs are averaged (``teacher.feature=block`` only)."""


@dataclass
class StudentTarget:
    """The momentum encoder's features as a target."""

    norm: TargetNorm = "ln"
    """As ``target.teacher.norm``."""
    feature: Literal["block", "norm"] = "block"
    """Output of ``layers`` before the final norm, or after it."""
    layers: list[int] = blocks()
    """Blocks whose outputs are averaged (``feature=block`` only)."""


@dataclass
class PixelTarget:
    """Pixels as a target (MAE)."""

    norm: Literal["patch", "none"] = "patch"
    """patch: each patch standardised with the unbiased variance."""


@dataclass
class Target:
    """What the decoder predicts."""

    teacher: TeacherTarget = field(default_factory=TeacherTarget)
    """Teacher's features."""
    student: StudentTarget = field(default_factory=StudentTarget)
    """Momentum encoder's features."""
    pixel: PixelTarget = field(default_factory=PixelTarget)
    """Pixels."""


@dataclass
class Loss:
    """How predictions are compared with targets."""

    type: Literal["cosine", "mse", "smooth_l1"] = "cosine"
    """Distance of features: 2 - 2 cos, mean square, or smooth L1. Pixels always use mean square."""
    beta: float = positive(2.0)
    """Transition point (beta) of smooth L1."""
    tokens: Literal["masked", "all", "visible", "weighted"] = "all"
    """Tokens that count; weighted: masked tokens with weight 1, visible tokens with
    ``visible_weight``."""
    include_cls: bool = True
    """Predict the class token of the feature targets too."""
    visible_weight: float = non_negative(1.0)
    """Weight of visible tokens under ``tokens=weighted``."""
    teacher: float = non_negative(1.0)
    """Weight of the teacher's term, times alpha_target."""
    student: float = non_negative(1.0)
    """Weight of the momentum encoder's term, times 1 - alpha_target."""
    pixel: float = non_negative(0.0)
    """Weight of the pixel term."""


@dataclass
class Optimizer:
    """AdamW with linear warm-up, then a cosine to zero."""

    base_lr: float = non_negative(1.5e-4)
    """Learning rate for 256 views; lr = base_lr * global_batch_size / 256."""
    betas: tuple[float, float] = bounded((0.9, 0.95), at_least=0, below=1)
    """AdamW's betas."""
    weight_decay: float = non_negative(0.05)
    """Decay of matrices; vectors and tokens have none."""
    grad_clip: float | None = positive(None)
    """Largest gradient norm; ``None``: no clipping."""
    warmup_fraction: float = bounded(0.1, at_least=0, below=1)
    """Share of the run with rising learning rate."""


@dataclass
class Train:
    """Length and batch size."""

    global_batch_size: int = positive(4096)
    """Views per optimizer step."""
    micro_batch_size: int = positive(64)
    """Largest number of views per rank and forward that fits in memory. The run takes the largest
    divisor of ``global_batch_size`` / world size up to it; samples and masks do not depend on it,
    but mixup of a fine-tuning pairs the views of a micro-batch."""
    epochs: float | None = positive(None)
    """Length in passes over the images; give this or ``steps``."""
    steps: int | None = positive(None)
    """Length in optimizer steps; give this or ``epochs``."""
    stop_after: int | None = positive(None)
    """Save and exit with code 75 after this many steps in all."""


@dataclass
class Backend:
    """How the step is computed and sharded."""

    name: Literal["fsdp", "deepspeed"] = "fsdp"
    """fsdp: FSDP2; deepspeed: DeepSpeed ZeRO."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Compute dtype; weights, moments and reductions are float32 always."""
    sharding: Literal["replicate", "hybrid", "full"] = "hybrid"
    """Replicate; shard within a node and replicate across nodes; or shard over all ranks
    (``fsdp``)."""
    reduce_every_micro_step: bool = False
    """Reduce gradients to shards at every micro-step (``fsdp``, ``hybrid`` or ``full``): between
    micro-steps a rank holds its shard of the gradients, not all in float32, for one reduce-scatter
    more per further micro-step. Gradients are equal to rounding. ZeRO's stages 2 and 3 always do
    so."""
    zero_stage: Literal[1, 2, 3] = 1
    """What is sharded over all ranks (``deepspeed``): 1 moments and float32 weights, 2 gradients
    too, 3 everything."""
    compile: bool = False
    """Compile the blocks, the loss, and what has no gradient: teacher, momentum encoder, masks and
    targets. The first step of a launch takes minutes longer."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass."""
    deepspeed: Any = None
    """Further keys of a DeepSpeed config, or the path of a JSON file with such keys
    (``deepspeed``); those that follow from the recipe are refused. ``None``: DeepSpeed's
    defaults."""


@dataclass
class Checkpoint:
    """Saved states."""

    every: int = positive(500)
    """Steps between saves; the last step is saved too."""
    keep: int = positive(2)
    """Newest checkpoints kept."""
    background: bool = True
    """Write from a host copy while training continues."""


@dataclass
class Log:
    """What is reported, and how often."""

    every: int = positive(10)
    """Steps between log entries."""
    images_every: int | None = positive(None)
    """Steps between figures of a fixed set of images, drawn at the end too; ``None``: never."""
    diagnostics_every: int | None = positive(100)
    """Steps between diagnostics of the target tokens and of the loss terms' gradients; ``None``:
    never."""
    trackers: list[str] = field(default_factory=list[str])
    """Experiment trackers that get metrics, figures and incidents: wandb, mlflow, trackio."""
    profile_steps: list[int] = step_range()
    """First and last step that rank 0 traces into ``RUN_DIR/profile``; ``[]``: none."""


@dataclass
class Guard:
    """Skipped steps, and ranks that hang."""

    skip_limit: int = non_negative(3)
    """Consecutive steps skipped because the loss or the gradient is not finite, or the loss spikes,
    after which the run rolls back to its newest checkpoint and continues with later data; 0: the
    first such step ends the run."""
    rollback_limit: int = non_negative(2)
    """Number of times that a launch rolls back to the same checkpoint before the run ends."""
    spike_factor: float | None = positive(None)
    """A loss above median + factor x spread of the last 128 steps counts as a spike; the spread is
    1.4826 x the median distance from the median, at least 1 % of the median. ``None``: only steps
    that are not finite are skipped."""
    hang_seconds: float | None = positive(300.0)
    """Seconds without progress after which a run counts as hung and ends; five times that while the
    run is built, in the first step, in saves and in evaluations. ``None``: only the collectives'
    own limit applies."""


@dataclass
class Cache:
    """The teacher's attention maps and features, as ``cmtmae precompute`` computes them."""

    dir: str | None = None
    """Folder of the cache. ``teacher.mode=sidecar`` defaults to ``RUN_DIR/cache``;
    ``teacher.mode=cached`` needs this key, and ``views.views_per_image``."""
    codec: Literal["int8", "bf16", "attention"] = "int8"
    """How features are stored when the cache is built: int8 over standardised channels, bf16, or
    not at all (attention maps only)."""
    on_miss: Literal["stop", "online"] = "online"
    """What a missing or damaged row does: stop the run, or let the teacher run for its micro-batch.
    With stop and no spot check no teacher is built, and its weights are not needed."""
    spot_check: float = fraction(0.0)
    """Share of micro-batches in which the teacher runs too and must agree."""


@dataclass
class Eval:
    """k-NN, a small linear probe and label-free measures of the encoder during the run."""

    every: int | None = positive(None)
    """Steps between evaluations; ``None``: never."""
    train_path: str | None = None
    """Labelled images to learn from, as ``data.path``; also the default of
    ``cmtmae evaluate --train``."""
    test_path: str | None = None
    """Labelled images to test on; also the default of ``cmtmae evaluate --test``."""
    segmentation_path: str | None = None
    """Images with masks for k-NN segmentation: Pascal VOC's folder, or one with ``train/`` and
    ``test/``, each with ``images/`` and ``masks/``; ``None``: not measured. Also the default of
    ``cmtmae evaluate segmentation --train``."""


@dataclass
class Config:
    """The settings of a pre-training."""

    run: Run = field(default_factory=Run)
    """Identity."""
    data: Data = field(default_factory=Data)
    """Images."""
    views: Views = field(default_factory=Views)
    """Crops."""
    student: Student = field(default_factory=Student)
    """Trained encoder."""
    decoder: Decoder = field(default_factory=Decoder)
    """Decoder."""
    teacher: Teacher = field(default_factory=Teacher)
    """Frozen teacher."""
    teachers: list[NamedTeacher] = field(default_factory=list[NamedTeacher])
    """Several frozen teachers, each with a name, in place of the group ``teacher``."""
    momentum: Momentum = field(default_factory=Momentum)
    """EMA weights."""
    attention: Attention = field(default_factory=Attention)
    """Attention maps."""
    mask: Mask = field(default_factory=Mask)
    """Masks."""
    collaboration: Collaboration = field(default_factory=Collaboration)
    """Mixing weights."""
    target: Target = field(default_factory=Target)
    """Targets."""
    loss: Loss = field(default_factory=Loss)
    """Losses."""
    optimizer: Optimizer = field(default_factory=Optimizer)
    """Optimizer."""
    train: Train = field(default_factory=Train)
    """Length and batch size."""
    backend: Backend = field(default_factory=Backend)
    """Sharding and precision."""
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    """Saved states."""
    log: Log = field(default_factory=Log)
    """Logs."""
    guard: Guard = field(default_factory=Guard)
    """Skipped steps, ranks that hang."""
    cache: Cache = field(default_factory=Cache)
    """Teacher cache."""
    eval: Eval = field(default_factory=Eval)
    """Evaluation during the run."""


class AdamWSettings(Protocol):
    """AdamW's keys in the optimizer group of either task."""

    betas: tuple[float, float]
    weight_decay: float
    grad_clip: float | None


class Trained(Protocol):
    """The groups that pre-training and fine-tuning share."""

    run: Run
    train: Train
    backend: Backend
    checkpoint: Checkpoint
    guard: Guard

    @property
    def data(self) -> Any: ...

    @property
    def log(self) -> Any: ...

    @property
    def optimizer(self) -> AdamWSettings: ...
