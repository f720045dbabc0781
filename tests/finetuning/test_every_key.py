"""Changing any key of a fine-tuning changes its weights, its output or an error."""

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from cmtmae_scale.config.finetune import Finetune
from cmtmae_scale.errors import CmtMaeError
from dataloading.errors import DataError
from tests.engine.run_case import tensors
from tests.finetuning.finetune_case import tune, write_recipe
from tests.processes import run_ranks

# One override a key; a second one in the same string makes the key matter.
CHANGES = {
    "run.output_dir": "run.output_dir=elsewhere",
    "run.time_limit_s": "run.time_limit_s=0.001",
    "run.seed": "run.seed=1",
    "run.allow_change": "run.allow_change=[train.epochs] train.stop_after=1",
    "data.path": "data.path=nowhere",
    "data.test_path": "data.test_path=nowhere",
    "data.max_bad_fraction": "data.max_bad_fraction=2",
    "data.workers": "data.workers=0",
    "head.pool": "head.pool=cls",
    "head.drop_path": "head.drop_path=0.6",
    "augment.crop_scale": "augment.crop_scale=[0.5,1.0]",
    "augment.aspect_ratio": "augment.aspect_ratio=[1.0,1.0]",
    "augment.hflip": "augment.hflip=false",
    "augment.magnitude": "augment.magnitude=null",
    "augment.magnitude_std": "augment.magnitude_std=2",
    "augment.erase": "augment.erase=1",
    "augment.mixup": "augment.mixup=0",
    "augment.cutmix": "augment.cutmix=0",
    "augment.smoothing": "augment.smoothing=0.3",
    "optimizer.base_lr": "optimizer.base_lr=0.01",
    "optimizer.layer_decay": "optimizer.layer_decay=1.0",
    "optimizer.betas": "optimizer.betas=[0.5,0.6]",
    "optimizer.weight_decay": "optimizer.weight_decay=0.5",
    "optimizer.grad_clip": "optimizer.grad_clip=0.01",
    "optimizer.warmup_epochs": "optimizer.warmup_epochs=0",
    "optimizer.min_lr": "optimizer.min_lr=0.001",
    "train.global_batch_size": "train.global_batch_size=16",
    "train.micro_batch_size": "train.micro_batch_size=4",
    "train.epochs": "train.epochs=2",
    "train.steps": "train.steps=4",
    "train.stop_after": "train.stop_after=1",
    "backend.name": "backend.name=zeros",
    "backend.precision": "backend.precision=bf16",
    "backend.sharding": "backend.sharding=some",
    "backend.zero_stage": "backend.zero_stage=0",
    "backend.deepspeed": "backend.deepspeed=absent.json backend.name=deepspeed",
    "checkpoint.every": "checkpoint.every=1",
    "checkpoint.keep": "checkpoint.keep=1 checkpoint.every=1",
    "log.every": "log.every=2",
}
EXCEPTIONS = {
    "run.name": "a label in the first log line",
    "data.decode": "speed only on a CPU; pixels are the same: test_dali",
    "backend.compile": "speed only: test_runs",
    "backend.activation_checkpointing": "memory only; gradients are the same: test_classifier",
    "checkpoint.background": "speed only: test_checkpoint",
}
TIMES = ("images_s", "data_wait_fraction", "memory_gib")
SHORT = ["train.steps=3", "checkpoint.every=3"]


def leaves(owner: Any, prefix: str = "") -> list[str]:
    found: list[str] = []
    for field in dataclasses.fields(owner):
        factory = field.default_factory
        inner = factory() if factory is not dataclasses.MISSING else None
        if dataclasses.is_dataclass(inner):
            found += leaves(inner, f"{prefix}{field.name}.")
        else:
            found.append(prefix + field.name)
    return found


def observe(recipe: Path, run_dir: Path, overrides: list[str]) -> str:
    """Digest of everything that a run leaves behind, or its error."""
    try:
        tune(recipe, f"run.output_dir={run_dir}", *SHORT, *overrides)
    except (CmtMaeError, DataError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    digest = hashlib.sha256()
    folders = sorted(path.name for path in (run_dir / "checkpoints").glob("step-*"))
    digest.update(repr(folders).encode())
    for key, value in tensors(run_dir, int(folders[-1].removeprefix("step-"))).items():
        digest.update(key.encode() + value.numpy().tobytes())
    for line in (run_dir / "log.jsonl").read_text().splitlines():
        entry = {key: value for key, value in json.loads(line).items() if key not in TIMES}
        digest.update(json.dumps(entry).encode())
    return digest.hexdigest()


def observe_all(recipe: Path, folder: Path) -> dict[str, tuple[str, str]]:
    os.chdir(folder)
    found = {}
    base = observe(recipe, folder / "base", [])
    again = observe(recipe, folder / "again", [])
    assert base == again and "Error" not in base, (base, again)
    for number, (key, text) in enumerate(CHANGES.items()):
        change, *context = text.split(" ")
        if key == "run.output_dir":
            tune(recipe, *SHORT, change)
            found[key] = (base, str(Path("elsewhere/checkpoints").is_dir()))
            continue
        before = base
        if context:
            before = observe(recipe, folder / f"b{number}", context)
        place = folder / f"b{number}" if key == "run.allow_change" else folder / f"a{number}"
        if key == "run.allow_change":  # another length, which a run that goes on else refuses
            refused = observe(recipe, place, ["train.epochs=2"])
            assert "run.allow_change" in refused, refused
            change, context = "run.allow_change=[train.epochs,train.steps]", ["train.epochs=2"]
        found[key] = (before, observe(recipe, place, [change, *context]))
    return found


def test_every_key_is_listed() -> None:
    assert sorted(leaves(Finetune)) == sorted([*CHANGES, *EXCEPTIONS])


@pytest.fixture(scope="module")
def observations(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    folder = tmp_path_factory.mktemp("keys")
    (result,) = run_ranks(1, observe_all, write_recipe(folder), folder, timeout_s=500)
    return result


@pytest.mark.slow
@pytest.mark.gloo
@pytest.mark.parametrize("key", CHANGES)
def test_the_key_changes_the_run(observations: dict[str, tuple[str, str]], key: str) -> None:
    before, after = observations[key]
    assert "Error" not in before
    assert before != after
