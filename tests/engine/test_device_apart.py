"""Requirements of a GPU that a CPU lacks: no operation takes tensors of the device and of the host.

Whole commands run on a device that computes on the CPU, see ``tests/device_apart.py``.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.engine.run_case import write_recipe
from tests.evaluation.evaluation_case import labelled_photographs
from tests.finetuning import finetune_case

ROOT = Path(__file__).parents[2]
ALL = ["log.images_every=2", "log.diagnostics_every=2", "eval.every=2", "train.steps=4"]

pytestmark = pytest.mark.skipif(
    not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch lets no device be written in Python",
)


def start(module: str, *arguments: Any, ranks: int = 1) -> str:
    """Run a command and return its output; it must succeed."""
    words = [sys.executable, "-m", module, *map(str, arguments)]
    if ranks > 1:
        torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
        words[2:3] = [*torchrun, module]
    done = subprocess.run(
        words,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def apart(*arguments: Any, ranks: int = 1) -> str:
    return start("tests.device_apart", *arguments, ranks=ranks)


def write_pretraining(folder: Path) -> tuple[Path, list[str]]:
    """A recipe, and settings of every side task, on few images."""
    recipe = write_recipe(folder, depth=1)
    train = labelled_photographs(folder / "train", 9, 0)
    test = labelled_photographs(folder / "test", 6, 1)
    return recipe, [*ALL, f"eval.train_path={train}", f"eval.test_path={test}"]


def values_of(run: Path) -> dict[tuple[int, str], Any]:
    """Every logged value by step and name, but for times and memory."""
    entries = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    measured = re.compile(r"time|seconds|_s$|memory|per_s|wait|host|rss")
    return {
        (entry["step"], name): value
        for entry in entries
        for name, value in entry.items()
        if not measured.search(name)
    }


def incidents_of(run: Path) -> list[Any]:
    return [value for (_, name), value in values_of(run).items() if "incident" in name]


def test_the_device_refuses_the_host() -> None:
    code = """
import torch
from tests.device_apart import register_device
device = register_device()
rows = torch.ones(2, 3, device=device)
print((rows + torch.ones((), dtype=torch.float32)).device, rows[torch.tensor([1])].sum().item())
host = torch.ones(2, 3)
for mixed in (lambda: rows + host, lambda: rows.numpy(), lambda: host[rows.long()]):
    try:
        mixed()
    except (RuntimeError, TypeError, IndexError) as error:
        print("refused:", error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.startswith("apart:0 3.0\n"), done.stderr
    assert done.stdout.count("refused:") == 3


def test_pre_training_and_its_side_tasks(tmp_path: Path) -> None:
    recipe, settings = write_pretraining(tmp_path)
    here, there = tmp_path / "here", tmp_path / "there"
    start("cmtmae_scale", "pretrain", "--config", recipe, *settings, f"run.output_dir={here}")
    apart("pretrain", "--config", recipe, *settings, f"run.output_dir={there}")
    assert not incidents_of(there)
    # Attention has another kernel there.
    assert values_of(there) == pytest.approx(values_of(here), rel=1e-3, abs=1e-4)
    assert [*there.glob("figures/*.png")]


SETTINGS = {
    "bf16, masked tokens": [
        "backend.precision=bf16",
        "decoder.type=cross",
        "decoder.predict_ratio=0.25",
        "loss.tokens=masked",
        "mask.sampler=hide_salient_mix",
        "attention.source=mean_query",
        "backend.activation_checkpointing=true",
    ],
    "statistics of channels": [
        "target.teacher.norm=channel",
        "target.student.norm=center",
        "loss.pixel=1",
        "mask.masks_per_view=2",
        "data.resident=true",
    ],
    "pixels alone": [
        "teacher.mode=none",
        "loss.teacher=0",
        "loss.student=0",
        "loss.pixel=1",
        "mask.sampler=random",
        "decoder.type=full",
        "loss.tokens=masked",
        "loss.include_cls=false",
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_other_settings(tmp_path: Path, name: str) -> None:
    recipe, settings = write_pretraining(tmp_path)
    apart("pretrain", "--config", recipe, *settings, *SETTINGS[name])
    assert not incidents_of(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["full", "hybrid", "replicate"])
def test_two_ranks_of_fsdp(tmp_path: Path, sharding: str) -> None:
    recipe, settings = write_pretraining(tmp_path)
    apart("pretrain", "--config", recipe, *settings, f"backend.sharding={sharding}", ranks=2)
    assert not incidents_of(tmp_path / "run")
    assert (4, "loss/total") in values_of(tmp_path / "run")


@pytest.mark.slow
def test_what_follows_pre_training(tmp_path: Path) -> None:
    """A cache, a run with it, every evaluation, features, exports, and fine-tuning."""
    recipe, settings = write_pretraining(tmp_path)
    cached = ["teacher.mode=cached", f"cache.dir={tmp_path / 'cache'}", "views.views_per_image=2"]
    apart("precompute", "--config", recipe, *settings, *cached)
    apart("pretrain", "--config", recipe, *settings, *cached)
    run = ["--checkpoint", tmp_path / "run"]
    for measure in ("knn", "linear"):
        apart("evaluate", measure, *run)
    for split, count in (("train", 6), ("test", 3)):
        write_masks(tmp_path / "masks" / split, count)
    masks = tmp_path / "masks"
    apart("evaluate", "segmentation", *run, "--train", masks / "train", "--test", masks / "test")
    apart("evaluate", "representation", *run, "--images", tmp_path / "test")
    apart("features", *run, "--images", tmp_path / "test", "--output", tmp_path / "features.npz")
    apart("export", "timm", *run, "--output", tmp_path / "timm")
    apart("export", "full", *run, "--output", tmp_path / "full")
    tuning = finetune_case.write_recipe(tmp_path / "tuning")
    for precision in ("fp32", "bf16"):
        given = [f"backend.precision={precision}", f"run.output_dir={tmp_path / precision}"]
        apart("finetune", *finetune_case.arguments(tuning, *given))


def write_masks(folder: Path, count: int) -> None:
    """Images of two colours, and masks that distinguish them."""
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    for number in range(count):
        mask = np.zeros((64, 64), np.uint8)
        mask[:, : 16 + 8 * (number % 4)] = 1
        picture = np.where(mask[..., None] == 1, [200, 40, 40], [40, 40, 200]).astype(np.uint8)
        Image.fromarray(picture).save(folder / "images" / f"{number}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{number}.png")
