"""The jobs of the suite, by priority: one per row of "On a GPU" in docs/performance.md."""

from typing import NamedTuple

TARS = "TARS"
"""Placeholder for the images in a command."""

TINY = (
    *("views.image_size=64", "student.arch=test_vit", "data.workers=1"),
    *("decoder.depth=1", "decoder.width=32", "decoder.heads=2"),
    *("backend.precision=fp32", "backend.compile=false", "train.micro_batch_size=2"),
)
TINY_TEACHER = (
    *("teacher.library=timm", "teacher.model=test_vit", "teacher.quick_gelu=null"),
    *("teacher.weights=random", "teacher.feature=block"),
)
FEW_STEPS = ("--warm-up", "0", "--windows", "1", "--steps", "1")


class Job(NamedTuple):
    """One row: a command, and how long it may take."""

    name: str
    what: str
    command: str
    """As typed in the root of a clone, options before overrides; ``TARS``: the images."""
    limit_s: int
    """Seconds after which the command is ended."""
    needs: tuple[str, ...] = ()
    """Packages without which the row is skipped."""
    small: tuple[str, ...] = ()
    """Arguments that the rehearsal of ``--small`` appends; the last one wins."""


LARGE = "python launchers/benchmark.py train --config configs/vit_large.yaml"
HUGE = "python launchers/benchmark.py train --config configs/vit_huge.yaml"
SHORT = "--warm-up 5 --windows 5 --steps 10"
REAL = f"--data real data.path={TARS} data.expected_images=null"
FSDP = "backend.name=fsdp"
STEP = (*TINY, *TINY_TEACHER, *FEW_STEPS)

JOBS = (
    Job(
        "smoke",
        "every path that a run can take on a GPU, with tiny networks",
        f"python launchers/benchmark.py smoke {TARS}",
        150,
    ),
    Job(
        "large",
        "ViT-L/16: images/s, time by part, MFU, GPU idle, memory against the estimate",
        f"{LARGE} {SHORT}",
        120,
        small=STEP,
    ),
    Job("huge_fsdp", "ViT-H/14 on FSDP2, the same", f"{HUGE} {SHORT} {FSDP}", 120, small=STEP),
    Job(
        "huge_zero",
        "ViT-H/14 on DeepSpeed as the recipe has it, the same",
        f"{HUGE} {SHORT}",
        120,
        ("deepspeed",),
        STEP,
    ),
    Job(
        "host_reads",
        "no host synchronisation in the micro-steps of ViT-L/16, eager and compiled",
        "python -m pytest -m gpu tests/engine/test_gpu.py",
        120,
        ("pytest",),
    ),
    Job(
        "large_masks",
        "ViT-L/16 with 2 and 4 masks per view, against 1",
        f"{LARGE} {SHORT} --sweep mask.masks_per_view=2,4 train.micro_batch_size=128",
        240,
        small=STEP,
    ),
    Job(
        "data",
        "decoding on the GPU against Pillow and torchvision",
        f"python launchers/benchmark.py data {TARS} --images 2048 --threads 4",
        120,
        small=("--size", "32", "--images", "32", "--rounds", "1", "--threads", "1"),
    ),
    Job(
        "large_real",
        "ViT-L/16 with the GPU decoding from tars: `data_wait_fraction`",
        f"{LARGE} {SHORT} {REAL}",
        120,
        ("nvidia.dali",),
        STEP,
    ),
    Job(
        "cache",
        "the teacher cache: reading, decoding, and steps/s against a synthetic teacher (at least "
        "0.97) and the online teacher",
        f"python launchers/benchmark.py cache --config configs/vit_base.yaml --rows 4096 "
        f"--windows 5 --steps 10 data.path={TARS} data.expected_images=null",
        150,
        small=(*STEP, "--rows", "4", "--rounds", "1"),
    ),
    Job(
        "mae",
        "MAE's forward and backward against transformers' `ViTMAEForPreTraining`",
        "python launchers/benchmark.py train --config configs/mae_large.yaml --against hf_mae "
        "--warm-up 2 --windows 5 --steps 5 backend.precision=fp32 train.micro_batch_size=64",
        120,
        ("transformers",),
        (*TINY, *FEW_STEPS),
    ),
    Job(
        "large_fp8",
        "ViT-L/16 with teacher and momentum encoder in fp8, against bf16",
        f"{LARGE} {SHORT} --sweep teacher.precision=fp8 --sweep momentum.precision=fp8",
        240,
        small=(*TINY, *TINY_TEACHER, "backend.precision=bf16", *FEW_STEPS),
    ),
    Job(
        "large_attention",
        "ViT-L/16 by attention kernel",
        f"{LARGE} {SHORT} --sweep sdpa=flash,cudnn",
        240,
        small=STEP,
    ),
    Job(
        "large_batch",
        "ViT-L/16 by micro-batch, and eager",
        f"{LARGE} {SHORT} --sweep train.micro_batch_size=128,256,1024 "
        "--sweep backend.compile=false",
        300,
        small=STEP,
    ),
    Job(
        "huge_batch",
        "ViT-H/14 on FSDP2 by micro-batch",
        f"{HUGE} {SHORT} --sweep train.micro_batch_size=128,512 {FSDP}",
        240,
        small=STEP,
    ),
    Job(
        "huge_masks",
        "ViT-H/14 on FSDP2 with 2 and 4 masks per view, against 1",
        f"{HUGE} {SHORT} --sweep mask.masks_per_view=2,4 {FSDP} train.micro_batch_size=128",
        240,
        small=STEP,
    ),
    Job(
        "huge_stages",
        "ViT-H/14 on ZeRO-1, ZeRO-2, ZeRO-3 and FSDP2: time by part, memory, the loss after the "
        "same steps, time to the first step",
        f"{HUGE} {SHORT} --sweep backend.zero_stage=2,3 --sweep backend.name=fsdp "
        "backend.compile=false train.micro_batch_size=64",
        240,
        ("deepspeed",),
        STEP,
    ),
    Job(
        "large_deterministic",
        "ViT-L/16 with `run.deterministic=true`, beside `large`",
        f"{LARGE} {SHORT} run.deterministic=true",
        180,
        small=STEP,
    ),
    Job(
        "method_tests",
        "no host synchronisation in the method's functions",
        "python -m pytest -m gpu tests/method",
        120,
        ("pytest",),
    ),
    Job(
        "data_tests",
        "pixels of the GPU's decoder, batches on the right stream, the outcome of each bad file, "
        "recovery of its graph",
        "python -m pytest -m gpu tests/dataloading",
        240,
        ("pytest", "nvidia.dali"),
    ),
    Job(
        "curve",
        "ViT-L/16 with decoding on the GPU: SIGTERM, kill -9, resume; the loss stays on the "
        "undisturbed run's curve; seconds from the signal to the exit",
        "python -m pytest -m 'gpu and slow' -s tests/pretraining/test_curve.py",
        420,
        ("pytest", "nvidia.dali"),
    ),
)
