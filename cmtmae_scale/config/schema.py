"""Every setting of a run: one dataclass a group, one sentence under each field.

``MISSING`` means that the recipe must give the value; ``None`` means off. Groups mirror a
YAML file.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from omegaconf import MISSING

from cmtmae_scale.config.evaluation import Eval
from cmtmae_scale.config.guard import Guard
from cmtmae_scale.config.teacher import Cache, Teacher


@dataclass
class Schedule:
    """A number as a function of progress u = position / horizon in [0, 1]."""

    kind: Literal["constant", "two_stage", "linear", "cosine"] = "constant"
    """constant: ``start``; two_stage: ``start`` for u < ``switch``, then ``end``; linear and
    cosine: from ``start`` at ``u0`` to ``end`` at ``u1``, constant outside."""
    start: float = MISSING
    """Value at the beginning (the value, for constant)."""
    end: float | None = None
    """Value at the end; not for constant."""
    switch: float | None = None
    """Progress at which two_stage changes, in [0, 1]."""
    u0: float = 0.0
    """Progress at which linear and cosine leave ``start``."""
    u1: float = 1.0
    """Progress at which linear and cosine reach ``end``."""


@dataclass
class Run:
    """Identity of the run."""

    name: str = "cmtmae"
    """Label in logs."""
    output_dir: str = MISSING
    """Folder of checkpoints, logs and the resolved config; the same folder resumes."""
    seed: int = 0
    """Seed of weights, order, views and masks; never changes within a run."""
    allow_change: list[str] = field(default_factory=list[str])
    """Keys that may differ from those of the checkpoint that is resumed."""
    time_limit_s: float | None = None
    """Save and leave with exit code 75 this many seconds after the start; ``None``: no limit but
    SLURM's, two minutes before which the run does so too."""


@dataclass
class Data:
    """Where the photographs are and how they are read."""

    source: Literal["auto", "folder", "webdataset"] = "auto"
    """Layout under ``path``: a folder of images or WebDataset tars; auto looks."""
    path: str = MISSING
    """Folder of images (sub-folders are labels); or tars (``KEY.jpg``, ``KEY.cls``): a folder of
    them, one of them, or a pattern such as ``train-{000..146}.tar``."""
    index: str | None = None
    """Folder of the index; ``None``: ``RUN_DIR/index``."""
    expected_images: int | None = None
    """Number of usable images; checked, and used by ``--dry-run`` when ``path`` is absent."""
    decode: Literal["auto", "dali", "torch"] = "auto"
    """dali: DALI, on the GPU where there is one; torch: the CPU, with nvImageCodec or torchvision;
    auto: DALI if it is installed and there is a GPU, else torch."""
    resident: bool = False
    """Keep all images decoded on each rank's device and cut the views there: for sets of 32 or 64
    pixels, at most 8 GiB. Same views; on a GPU a pixel may differ by two levels of 255."""
    max_pixels: int = 100_000_000
    """Images with more pixels (width x height) are left out of the index."""
    max_bad_fraction: float = 0.001
    """Share of undecodable draws above which the run stops, in [0, 1]."""
    shuffle: Literal["full", "window", "none"] = "full"
    """full: a fresh permutation each epoch; window: one that reads few places at a time, for tars
    that were shuffled when written, on slow storage; none: index order."""
    window_on_sorted: bool = False
    """Let ``shuffle=window`` take images that are sorted by class, which it refuses: its batches
    then have few classes."""
    workers: int = 4
    """Reader and decoder threads a rank, >= 1."""


@dataclass
class Views:
    """What is cut from a photograph."""

    image_size: int = 224
    """Side of the student's picture, pixels; a multiple of its patch."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Range of the crop's share of the area, within (0, 1]."""
    aspect_ratio: tuple[float, float] = (0.75, 1.3333333333333333)
    """Range of the crop's width / height."""
    hflip: bool = True
    """Mirror half of the views."""
    views_per_image: int | None = None
    """Number of distinct views an image (view = epoch mod count); ``None``: new each epoch."""


@dataclass
class Student:
    """The trained encoder."""

    arch: str = "vit_base_patch16_224"
    """A timm VisionTransformer name."""
    patch_size: int | None = None
    """Patch side in pixels; ``None``: the architecture's own."""
    init_weights: str | None = None
    """Path of a .safetensors or .pt file to start from: timm's, MAE's or transformers' names;
    ``None``: random start values."""


@dataclass
class Decoder:
    """The light network that predicts the targets."""

    type: Literal["prompt", "full", "cross", "none"] = "prompt"
    """prompt: MILAN's; full: MAE's; cross: CrossMAE's; none: heads on the encoder's tokens."""
    depth: int = 8
    """Blocks, >= 1."""
    width: int = 512
    """Channels; a multiple of ``heads`` and of 4."""
    heads: int = 16
    """Attention heads."""
    predict_ratio: float | None = None
    """Share of all patches that is predicted, at most ``mask.ratio`` (``cross`` only); ``None``:
    all hidden ones."""
    prompt_norm_context: bool = False
    """Apply each block's first norm to the context too (``prompt`` only; MILAN does not)."""


@dataclass
class Momentum:
    """Moving average of the student: m * old + (1 - m) * new once an applied step."""

    start: float = 0.996
    """m at the beginning, in [0, 1]."""
    end: float = 1.0
    """m at the end, in [0, 1]."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """cosine from start to end; constant: start."""


@dataclass
class Attention:
    """How a model's attention becomes a map over patches."""

    source: Literal["cls", "pool", "mean_query"] = "cls"
    """Teacher's map: class-token row, attention-pool query, or mean over patch queries. The
    momentum student's is its class-token row, or mean_query where it has no class token."""
    layers: list[int] = field(default_factory=lambda: [-1])
    """Blocks whose normalised maps are averaged; negative counts from the end."""
    norm: Literal["prob", "minmax", "rank", "zscore"] = "prob"
    """Normalisation before mixing."""
    temperature: float = 1.0
    """T in a ** (1 / T) before mixing, > 0."""
    clip_quantile: float = 1.0
    """Clamp values above this quantile of a map; 1 is off."""


@dataclass
class Mask:
    """Which patches are hidden."""

    sampler: Literal[
        "random",
        "hide_salient",
        "hide_salient_mix",
        "hide_salient_sample",
        "reveal_salient",
        "reveal_salient_topk",
    ] = "reveal_salient"
    """Rule from the mixed map to the hidden set (docs/method.md, section "Samplers")."""
    ratio: float = 0.75
    """Share of patches hidden, in (0, 1)."""
    masks_per_view: int = 1
    """Masks drawn for one view; they share the teacher's and the momentum student's passes."""
    salient_fraction: Any = field(
        default_factory=lambda: {"kind": "linear", "start": 0.0, "end": 0.5}
    )
    """Share of the hidden set that is most salient (``hide_salient_mix``): number or schedule."""
    throw_ratio: float = 0.0
    """Share of patches neither seen nor predicted."""
    hint_fraction: float = 0.0
    """Share of patches revealed at random among the most salient ones."""
    hint_pool: float = 0.1
    """Share of patches that counts as most salient for hints."""
    prob: float = 1.0
    """Share of views masked by ``sampler``; the others are masked at random."""
    temperature: float = 1.0
    """Temperature of the weighted samplers, > 0."""
    floor: float = 1e-6
    """Smallest weight of a patch in the weighted samplers."""


@dataclass
class Collaboration:
    """Weights of the teacher against the momentum student; 1 is teacher alone."""

    alpha_attention: Any = field(
        default_factory=lambda: {"kind": "two_stage", "start": 1.0, "end": 0.5, "switch": 0.1}
    )
    """Teacher's weight in the attention map, in [0, 1]: number or schedule."""
    alpha_target: Any = field(
        default_factory=lambda: {"kind": "linear", "start": 1.0, "end": 0.7, "u1": 0.25}
    )
    """Teacher's weight in the loss, in [0, 1]: number or schedule."""


@dataclass
class TeacherTarget:
    """The teacher's features as a target."""

    norm: Literal["l2", "ln", "none"] = "l2"
    """Normalisation of each token."""
    layers: list[int] = field(default_factory=lambda: [-1])
    """Blocks whose outputs are averaged (``teacher.feature=block`` only)."""


@dataclass
class StudentTarget:
    """The momentum student's features as a target."""

    norm: Literal["l2", "ln", "none"] = "ln"
    """Normalisation of each token."""
    feature: Literal["block", "norm"] = "block"
    """Output of ``layers`` before the final norm, or after it."""
    layers: list[int] = field(default_factory=lambda: [-1])
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
    """Momentum student's features."""
    pixel: PixelTarget = field(default_factory=PixelTarget)
    """Pixels."""


@dataclass
class Loss:
    """How predictions are compared with targets."""

    type: Literal["cosine", "mse", "smooth_l1"] = "cosine"
    """Distance of features: 2 - 2 cos, mean square, or smooth L1. Pixels always use mean square."""
    beta: float = 2.0
    """Corner of smooth L1."""
    tokens: Literal["masked", "all", "visible", "weighted"] = "all"
    """Tokens that count; weighted: hidden ones fully, visible ones with ``visible_weight``."""
    include_cls: bool = True
    """Predict the class token of the feature targets too."""
    visible_weight: float = 1.0
    """Weight of visible tokens under ``tokens=weighted``."""
    teacher: float = 1.0
    """Weight of the teacher's term, times alpha_target."""
    student: float = 1.0
    """Weight of the momentum student's term, times 1 - alpha_target."""
    pixel: float = 0.0
    """Weight of the pixel term."""


@dataclass
class Optimizer:
    """AdamW, cosine to zero after a linear warm-up."""

    base_lr: float = 1.5e-4
    """Learning rate for 256 views; lr = base_lr * global_batch_size / 256."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's betas."""
    weight_decay: float = 0.05
    """Decay of matrices; vectors and tokens have none."""
    grad_clip: float | None = None
    """Largest gradient norm; ``None``: no clipping."""
    warmup_fraction: float = 0.1
    """Share of the run with rising learning rate, in [0, 1)."""


@dataclass
class Train:
    """Length and batch."""

    global_batch_size: int = 4096
    """Views an optimizer step."""
    micro_batch_size: int = 64
    """Views a rank and forward."""
    epochs: float | None = None
    """Length in passes over the images; give this or ``steps``."""
    steps: int | None = None
    """Length in optimizer steps; give this or ``epochs``."""
    stop_after: int | None = None
    """Save and leave with exit code 75 after this many steps in all."""


@dataclass
class Backend:
    """How the step is computed and sharded."""

    name: Literal["fsdp", "deepspeed"] = "fsdp"
    """fsdp: FSDP2; zero: DeepSpeed ZeRO."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Compute type; weights, moments and reductions are float32 always."""
    sharding: Literal["replicate", "hybrid", "full"] = "hybrid"
    """Replicate, shard within a node and replicate across, or shard over all ranks (``fsdp``)."""
    zero_stage: Literal[1, 2, 3] = 1
    """What is sharded over all ranks (``zero``): 1 moments and float32 weights, 2 gradients too,
    3 everything."""
    compile: bool = False
    """Compile each transformer block."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass."""
    deepspeed: Any = None
    """Further keys of a DeepSpeed config, or the path of a JSON file with them (``zero``); those
    that follow from the recipe are refused. ``None``: DeepSpeed's defaults."""


@dataclass
class Checkpoint:
    """Saved states."""

    every: int = 500
    """Steps between saves; one more is made at the end."""
    keep: int = 2
    """Newest checkpoints kept, >= 1."""
    background: bool = True
    """Write from a host copy while training goes on."""


@dataclass
class Log:
    """What is told, and how often."""

    every: int = 10
    """Steps between log entries."""
    images_every: int | None = None
    """Steps between pictures of a fixed set of images, also made at the end; ``None``: never."""


@dataclass
class Config:
    """A whole run."""

    run: Run = field(default_factory=Run)
    """Identity."""
    data: Data = field(default_factory=Data)
    """Photographs."""
    views: Views = field(default_factory=Views)
    """Crops."""
    student: Student = field(default_factory=Student)
    """Trained encoder."""
    decoder: Decoder = field(default_factory=Decoder)
    """Decoder."""
    teacher: Teacher = field(default_factory=Teacher)
    """Frozen teacher."""
    momentum: Momentum = field(default_factory=Momentum)
    """Moving average."""
    attention: Attention = field(default_factory=Attention)
    """Maps."""
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
    """Length and batch."""
    backend: Backend = field(default_factory=Backend)
    """Sharding and precision."""
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    """Saved states."""
    log: Log = field(default_factory=Log)
    """Logs."""
    guard: Guard = field(default_factory=Guard)
    """Steps left out, ranks that hang."""
    cache: Cache = field(default_factory=Cache)
    """Teacher cache."""
    eval: Eval = field(default_factory=Eval)
    """Evaluation during the run."""
