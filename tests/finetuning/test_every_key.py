"""Changing any key of fine-tuning changes its weights, its output or an error."""

from pathlib import Path

import pytest

from cmtmae_scale.config.finetune import Finetune, load_finetune
from cmtmae_scale.config.ranges import walk_fields
from tests.config.key_case import missing_tests, observe_changes, unread_keys
from tests.evaluation.evaluation_case import labelled_photographs
from tests.finetuning.finetune_case import tune, write_recipe
from tests.processes import run_ranks

# Key -> a legal change, and overrides without which the key would not matter.
CHANGES: dict[str, tuple[str, ...]] = {
    "run.time_limit_s": ("run.time_limit_s=0.001",),
    "run.seed": ("run.seed=1",),
    "data.path": ("data.path=others",),
    "data.test_path": ("data.test_path=others",),
    "head.pool": ("head.pool=cls",),
    "head.drop_path": ("head.drop_path=0.6",),
    "augment.crop_scale": ("augment.crop_scale=[0.5,1.0]",),
    "augment.aspect_ratio": ("augment.aspect_ratio=[1.0,1.0]",),
    "augment.hflip": ("augment.hflip=false",),
    "augment.magnitude": ("augment.magnitude=null",),
    "augment.magnitude_std": ("augment.magnitude_std=2",),
    "augment.erase": ("augment.erase=1",),
    "augment.mixup": ("augment.mixup=0",),
    "augment.cutmix": ("augment.cutmix=0",),
    "augment.smoothing": ("augment.smoothing=0.3",),
    "optimizer.base_lr": ("optimizer.base_lr=0.01",),
    "optimizer.layer_decay": ("optimizer.layer_decay=1.0",),
    "optimizer.betas": ("optimizer.betas=[0.5,0.6]",),
    "optimizer.weight_decay": ("optimizer.weight_decay=0.5",),
    "optimizer.grad_clip": ("optimizer.grad_clip=0.01",),
    "optimizer.warmup_epochs": ("optimizer.warmup_epochs=0",),
    "optimizer.min_lr": ("optimizer.min_lr=0.001",),
    "train.global_batch_size": ("train.global_batch_size=16",),
    "train.micro_batch_size": ("train.micro_batch_size=4",),
    "train.epochs": ("train.epochs=2",),
    "train.steps": ("train.steps=4",),
    "train.stop_after": ("train.stop_after=1",),
    "backend.precision": ("backend.precision=bf16",),
    "checkpoint.every": ("checkpoint.every=1",),
    "checkpoint.keep": ("checkpoint.keep=1", "checkpoint.every=1"),
    "log.every": ("log.every=2",),
}
EXCEPTIONS = {
    "run.output_dir": "the folder itself, in every case here: finetuning/test_every_key.py",
    "run.name": "a label in the log: tools/report/test_report.py",
    "run.allow_change": "at a resume: engine/test_resume_rules.py",
    "run.deterministic": "kernels of GPUs: runtime/test_determinism.py",
    "data.decode": "speed; pixels are the same on a CPU: dataloading/test_dali.py",
    "data.verify_index": "of a kept index: dataloading/test_index.py",
    "data.exif_orientation": "with turned images: dataloading/test_orientation.py",
    "data.max_bad_fraction": "with undecodable images: pretraining/test_bad_share.py",
    "data.workers": "speed; the order is the same: dataloading/test_stream.py",
    "data.worker_type": "speed; the views are the same: dataloading/test_pool.py",
    "backend.name": "numbers agree: backends/test_parity.py",
    "backend.sharding": "memory; numbers agree: backends/test_parity.py",
    "backend.zero_stage": "memory; numbers agree: backends/test_parity.py",
    "backend.deepspeed": "with DeepSpeed: backends/test_zero.py",
    "backend.compile": "speed; numbers agree: finetuning/test_runs.py",
    "backend.activation_checkpointing": "memory; numbers agree: finetuning/test_classifier.py",
    "backend.reduce_every_micro_step": "memory; gradients agree: backends/test_accumulation.py",
    "checkpoint.background": "speed: checkpoint/test_writer.py",
    "log.trackers": "with their packages: engine/test_trackers.py",
    "log.profile_steps": "a trace beside the run: engine/test_profile.py",
    "guard.skip_limit": "at non-finite steps: engine/test_skips.py",
    "guard.rollback_limit": "at non-finite steps: engine/test_skips.py",
    "guard.spike_factor": "at spikes: engine/test_skips.py",
    "guard.hang_seconds": "when a rank hangs: engine/test_hangs.py",
}
SHORT = ["train.steps=3", "checkpoint.every=3"]


def observe_all(recipe: Path, folder: Path) -> dict[str, tuple[str, str]]:
    labelled_photographs(folder / "others", 17, 2, 3)
    return observe_changes(
        lambda overrides: tune(recipe, *SHORT, *overrides),
        lambda overrides: load_finetune(recipe, [*SHORT, *overrides]),
        folder,
        CHANGES,
    )


def test_every_key_is_listed() -> None:
    keys = sorted(key for key, _ in walk_fields(Finetune))
    assert keys == sorted([*CHANGES, *EXCEPTIONS])
    assert not missing_tests(EXCEPTIONS)
    assert set(unread_keys(Finetune)) == set()


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
    assert before != after
    assert "Error" not in before or "Error" not in after
