"""Changing any key changes the run's weights, its output or an error; exceptions have a reason."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from cmtmae_scale.config.schema import Config
from cmtmae_scale.errors import CmtMaeError
from dataloading.errors import DataError
from tests.engine.run_case import run, tensors, write_recipe
from tests.processes import run_ranks

# One override a key; a second one in the same string makes the key matter.
CHANGES = {
    "run.output_dir": "run.output_dir=elsewhere",
    "run.seed": "run.seed=1",
    "run.time_limit_s": "run.time_limit_s=0.001",
    "data.source": "data.source=tars",
    "data.path": "data.path=nowhere",
    "data.index": "data.index=INDEX",
    "data.expected_images": "data.expected_images=3",
    "data.max_pixels": "data.max_pixels=9000",
    "data.max_bad_fraction": "data.max_bad_fraction=2",
    "data.shuffle": "data.shuffle=none",
    "data.window_on_sorted": "data.window_on_sorted=true",
    "data.workers": "data.workers=0",
    "views.image_size": "views.image_size=32",
    "views.crop_scale": "views.crop_scale=[0.5, 1.0]",
    "views.aspect_ratio": "views.aspect_ratio=[1.0, 1.0]",
    "views.hflip": "views.hflip=false",
    "views.views_per_image": "views.views_per_image=1",
    "student.arch": "student.arch=test_vit2",
    "student.patch_size": "student.patch_size=8",
    "student.init_weights": "student.init_weights=absent.safetensors",
    "decoder.type": "decoder.type=full",
    "decoder.depth": "decoder.depth=2",
    "decoder.width": "decoder.width=16",
    "decoder.heads": "decoder.heads=4",
    "decoder.predict_ratio": "decoder.predict_ratio=0.5 decoder.type=cross",
    "decoder.prompt_norm_context": "decoder.prompt_norm_context=true",
    "teacher.library": "teacher.library=open_clip",
    "teacher.model": "teacher.model=test_vit3",
    "teacher.weights": "teacher.weights=absent.safetensors",
    "teacher.quick_gelu": "teacher.quick_gelu=true",
    "teacher.image_size": "teacher.image_size=96",
    "teacher.depth": "teacher.depth=2",
    "teacher.feature": "teacher.feature=ln_post",
    "teacher.mode": "teacher.mode=none",
    "momentum.start": "momentum.start=0.5",
    "momentum.end": "momentum.end=0.5",
    "momentum.schedule": "momentum.schedule=constant",
    "attention.source": "attention.source=pool",
    "attention.layers": "attention.layers=[0]",
    "attention.norm": "attention.norm=rank",
    "attention.temperature": "attention.temperature=0.1",
    "attention.clip_quantile": "attention.clip_quantile=0.3",
    "mask.sampler": "mask.sampler=hide_salient",
    "mask.ratio": "mask.ratio=0.5",
    "mask.masks_per_view": "mask.masks_per_view=2",
    "mask.salient_fraction": "mask.salient_fraction=1 mask.sampler=hide_salient_mix",
    "mask.throw_ratio": "mask.throw_ratio=0.1",
    "mask.hint_fraction": "mask.hint_fraction=0.1 mask.hint_pool=0.5",
    "mask.hint_pool": "mask.hint_pool=0.6 mask.hint_fraction=0.1",
    "mask.prob": "mask.prob=0.2",
    "mask.temperature": "mask.temperature=0.1",
    "mask.floor": "mask.floor=0.06",
    "collaboration.alpha_attention": "collaboration.alpha_attention=0.1",
    "collaboration.alpha_target": "collaboration.alpha_target=0.2",
    "target.teacher.norm": "target.teacher.norm=ln",
    "target.teacher.layers": "target.teacher.layers=[0]",
    "target.student.norm": "target.student.norm=l2",
    "target.student.feature": "target.student.feature=norm",
    "target.student.layers": "target.student.layers=[0]",
    "target.pixel.norm": "target.pixel.norm=none loss.pixel=1",
    "loss.type": "loss.type=mse",
    "loss.beta": "loss.beta=0.01 loss.type=smooth_l1",
    "loss.tokens": "loss.tokens=masked",
    "loss.include_cls": "loss.include_cls=false",
    "loss.visible_weight": "loss.visible_weight=0.1 loss.tokens=weighted",
    "loss.teacher": "loss.teacher=3",
    "loss.student": "loss.student=3",
    "loss.pixel": "loss.pixel=1",
    "optimizer.base_lr": "optimizer.base_lr=0.001",
    "optimizer.betas": "optimizer.betas=[0.5, 0.6]",
    "optimizer.weight_decay": "optimizer.weight_decay=0.5",
    "optimizer.grad_clip": "optimizer.grad_clip=0.01",
    "optimizer.warmup_fraction": "optimizer.warmup_fraction=0.9",
    "train.global_batch_size": "train.global_batch_size=16",
    "train.micro_batch_size": "train.micro_batch_size=3",
    "train.epochs": "train.epochs=0.4",
    "train.steps": "train.steps=2",
    "train.stop_after": "train.stop_after=1",
    "backend.name": "backend.name=zeros",
    "backend.precision": "backend.precision=bf16",
    "backend.sharding": "backend.sharding=some",
    "backend.zero_stage": "backend.zero_stage=0",
    "backend.deepspeed": "backend.deepspeed=absent.json backend.name=deepspeed",
    "checkpoint.every": "checkpoint.every=1",
    "checkpoint.keep": "checkpoint.keep=1 checkpoint.every=1",
    "guard.skip_limit": "guard.skip_limit=-1",
    "guard.rollback_limit": "guard.rollback_limit=-1",
    "guard.spike_factor": "guard.spike_factor=0",
    "guard.hang_seconds": "guard.hang_seconds=0",
    "log.every": "log.every=2",
    "log.images_every": "log.images_every=2",
    "eval.every": "eval.every=2 eval.train_path=photos eval.test_path=photos",
    "cache.on_miss": "cache.on_miss=sometimes",
    "cache.spot_check": "cache.spot_check=2",
}
# The same observation without the key under test, for overrides that need a second one.
EXCEPTIONS = {
    "cache.codec": "acts when a cache is built: test_build",
    "run.name": "a label in the first log line",
    "run.allow_change": "acts when a run is resumed: test_runs",
    "data.resident": "speed only on a CPU; pixels are the same: test_resident",
    "data.decode": "speed only on a CPU; pixels are the same: test_dali",
    "backend.compile": "speed only; numbers agree: test_parity",
    "backend.activation_checkpointing": "memory only; numbers agree: test_parity",
    "checkpoint.background": "speed only: test_checkpoint",
    "eval.train_path": "acts with eval.every: test_during",
    "eval.test_path": "acts with eval.every: test_during",
    "cache.dir": "acts with teacher.mode=cached: test_cached_runs",
}
TIMES = ("images_s", "data_wait_fraction", "memory_gib")
SHORT = ["train.steps=3", "train.micro_batch_size=8", "checkpoint.every=3"]


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
        run(recipe, [f"run.output_dir={run_dir}", *SHORT, *overrides])
    except (CmtMaeError, DataError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    digest = hashlib.sha256()
    folders = sorted(path.name for path in (run_dir / "checkpoints").glob("step-*"))
    digest.update(repr(folders).encode())
    digest.update(repr(sorted(p.name for p in run_dir.glob("*"))).encode())
    for key, value in tensors(run_dir, int(folders[-1].removeprefix("step-"))).items():
        digest.update(key.encode() + value.numpy().tobytes())
    for line in (run_dir / "log.jsonl").read_text().splitlines():
        entry = {key: value for key, value in json.loads(line).items() if key not in TIMES}
        digest.update(json.dumps(entry).encode())
    return digest.hexdigest()


def observe_all(recipe: Path, folder: Path) -> dict[str, tuple[str, str]]:
    import os

    os.chdir(folder)
    found = {}
    base = observe(recipe, folder / "base", [])
    again = observe(recipe, folder / "again", [])
    assert base == again and "Error" not in base, (base, again)
    for number, (key, text) in enumerate(CHANGES.items()):
        change, *context = text.replace("INDEX", str(folder / "index")).split(" ")
        if "=[" in change:
            change, context = text, []
        before = observe(recipe, folder / f"b{number}", context) if context else base
        if key == "run.output_dir":
            run(recipe, [*SHORT, change])
            found[key] = (base, str(Path("elsewhere/checkpoints").is_dir()))
            continue
        found[key] = (before, observe(recipe, folder / f"a{number}", [change, *context]))
    return found


@pytest.fixture(scope="module")
def observations(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    folder = tmp_path_factory.mktemp("keys")
    (result,) = run_ranks(1, observe_all, write_recipe(folder), folder, timeout_s=300)
    return result


def test_every_key_is_listed() -> None:
    assert sorted(leaves(Config)) == sorted([*CHANGES, *EXCEPTIONS])


@pytest.mark.gloo
@pytest.mark.parametrize("key", CHANGES)
def test_the_key_changes_the_run(observations: dict[str, tuple[str, str]], key: str) -> None:
    before, after = observations[key]
    assert "Error" not in before
    assert before != after
