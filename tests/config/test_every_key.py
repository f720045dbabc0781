"""Changing any key changes the run's weights, its output or an error; exceptions name a test."""

from pathlib import Path

import pytest

from cmtmae_scale.config.load import load_config
from cmtmae_scale.config.ranges import walk_fields
from cmtmae_scale.config.schema import Config, NamedTeacher
from tests.config.key_case import missing_tests, observe_changes, unread_keys
from tests.engine.run_case import make_photographs, run, write_recipe
from tests.processes import run_ranks

# Key -> a legal change, and overrides without which the key would not matter.
CHANGES: dict[str, tuple[str, ...]] = {
    "run.seed": ("run.seed=1",),
    "run.time_limit_s": ("run.time_limit_s=0.001",),
    "data.path": ("data.path=others",),
    "data.index": ("data.index=index",),
    "data.expected_images": ("data.expected_images=3",),
    "data.max_pixels": ("data.max_pixels=9000",),
    "data.shuffle": ("data.shuffle=none",),
    "data.window_on_sorted": ("data.window_on_sorted=true", "data.shuffle=window"),
    "views.image_size": ("views.image_size=32",),
    "views.crop_scale": ("views.crop_scale=[0.5, 1.0]",),
    "views.aspect_ratio": ("views.aspect_ratio=[1.0, 1.0]",),
    "views.hflip": ("views.hflip=false",),
    "views.views_per_image": ("views.views_per_image=1",),
    "student.arch": ("student.arch=test_vit2",),
    "student.patch_size": ("student.patch_size=8",),
    "student.width": ("student.width=32",),
    "student.depth": ("student.depth=2",),
    "student.heads": ("student.heads=4",),
    "student.init_weights": ("student.init_weights=absent.safetensors",),
    "student.init_from_run": ("student.init_from_run=absent",),
    "decoder.type": ("decoder.type=full",),
    "decoder.depth": ("decoder.depth=2",),
    "decoder.width": ("decoder.width=16",),
    "decoder.heads": ("decoder.heads=4",),
    "decoder.predict_ratio": ("decoder.predict_ratio=0.5", "decoder.type=cross"),
    "decoder.position_grid": ("decoder.position_grid=2",),
    "decoder.prompt_norm_context": ("decoder.prompt_norm_context=true",),
    "teacher.model": ("teacher.model=test_vit3",),
    "teacher.quick_gelu": ("teacher.quick_gelu=true",),
    "teacher.weights": ("teacher.weights=absent.safetensors",),
    "teacher.image_size": ("teacher.image_size=96",),
    "teacher.depth": ("teacher.depth=2",),
    "teacher.feature": ("teacher.feature=ln_post",),
    "teacher.precision": ("teacher.precision=fp8", "backend.precision=bf16"),
    "teacher.mode": ("teacher.mode=cached", "cache.dir=absent", "views.views_per_image=1"),
    "momentum.start": ("momentum.start=0.5",),
    "momentum.end": ("momentum.end=0.5",),
    "momentum.schedule": ("momentum.schedule=constant",),
    "momentum.precision": ("momentum.precision=fp8", "backend.precision=bf16"),
    "attention.source": ("attention.source=mean_query",),
    "attention.layers": ("attention.layers=[0]",),
    "attention.norm": ("attention.norm=rank", "collaboration.alpha_attention=1"),
    "attention.temperature": ("attention.temperature=0.1",),
    "attention.clip_quantile": ("attention.clip_quantile=0.3",),
    "mask.sampler": ("mask.sampler=hide_salient",),
    "mask.ratio": ("mask.ratio=0.5",),
    "mask.masks_per_view": ("mask.masks_per_view=2",),
    "mask.salient_fraction": ("mask.salient_fraction=1", "mask.sampler=hide_salient_mix"),
    "mask.throw_ratio": ("mask.throw_ratio=0.1",),
    "mask.hint_fraction": ("mask.hint_fraction=0.1", "mask.hint_pool=0.5"),
    "mask.hint_pool": ("mask.hint_pool=0.6", "mask.hint_fraction=0.1"),
    "mask.prob": ("mask.prob=0.2",),
    "mask.temperature": ("mask.temperature=0.1",),
    "mask.floor": ("mask.floor=0.06",),
    "collaboration.alpha_attention": ("collaboration.alpha_attention=0.1",),
    "collaboration.alpha_target": ("collaboration.alpha_target=0.2",),
    "target.teacher.norm": ("target.teacher.norm=ln",),
    "target.teacher.layers": ("target.teacher.layers=[0]",),
    "target.student.norm": ("target.student.norm=l2",),
    "target.student.feature": ("target.student.feature=norm",),
    "target.student.layers": ("target.student.layers=[0]",),
    "target.pixel.norm": ("target.pixel.norm=none", "loss.pixel=1"),
    "loss.type": ("loss.type=mse",),
    "loss.beta": ("loss.beta=0.01", "loss.type=smooth_l1"),
    "loss.tokens": ("loss.tokens=masked",),
    "loss.include_cls": ("loss.include_cls=false",),
    "loss.visible_weight": ("loss.visible_weight=0.1", "loss.tokens=weighted"),
    "loss.teacher": ("loss.teacher=3",),
    "loss.student": ("loss.student=3",),
    "loss.pixel": ("loss.pixel=1",),
    "optimizer.base_lr": ("optimizer.base_lr=0.001",),
    "optimizer.betas": ("optimizer.betas=[0.5, 0.6]",),
    "optimizer.weight_decay": ("optimizer.weight_decay=0.5",),
    "optimizer.grad_clip": ("optimizer.grad_clip=0.01",),
    "optimizer.warmup_fraction": ("optimizer.warmup_fraction=0.9",),
    "train.global_batch_size": ("train.global_batch_size=16",),
    "train.micro_batch_size": ("train.micro_batch_size=3",),
    "train.epochs": ("train.epochs=0.4",),
    "train.steps": ("train.steps=2",),
    "train.stop_after": ("train.stop_after=1",),
    "backend.precision": ("backend.precision=bf16",),
    "checkpoint.every": ("checkpoint.every=1",),
    "checkpoint.keep": ("checkpoint.keep=1", "checkpoint.every=1"),
    "log.every": ("log.every=2",),
    "log.images_every": ("log.images_every=2",),
    "log.diagnostics_every": ("log.diagnostics_every=1",),
    "eval.every": ("eval.every=2", "eval.train_path=photos", "eval.test_path=photos"),
}
EXCEPTIONS = {
    "run.output_dir": "the folder itself, in every case here: config/test_every_key.py",
    "run.name": "a label in the log and the report: tools/report/test_report.py",
    "run.allow_change": "at a resume: engine/test_resume_rules.py",
    "run.deterministic": "kernels of GPUs: runtime/test_determinism.py",
    "data.store_cache": "speed; the views are the same: dataloading/test_store_cache.py",
    "data.verify_index": "what is compared before: dataloading/test_index.py",
    "data.source": "other layouts: dataloading/test_index.py",
    "data.decode": "speed; pixels are the same on a CPU: dataloading/test_dali.py",
    "data.resident": "speed; pixels are the same on a CPU: dataloading/test_resident.py",
    "data.exif_orientation": "with turned images: pretraining/test_orientation.py",
    "data.max_bad_fraction": "with undecodable images: pretraining/test_bad_share.py",
    "data.workers": "speed; the order is the same: dataloading/test_stream.py",
    "data.worker_type": "speed; the views are the same: dataloading/test_pool.py",
    "student.init_optimizer": "with student.init_from_run: pretraining/test_init_from_run.py",
    "teacher.library": "other models: teachers/test_open_clip.py",
    "teachers": "several teachers: pretraining/test_several_teachers.py",
    "backend.name": "numbers agree: backends/test_parity.py",
    "backend.sharding": "memory; numbers agree: backends/test_parity.py",
    "backend.zero_stage": "memory; numbers agree: backends/test_parity.py",
    "backend.deepspeed": "with DeepSpeed: backends/test_zero.py",
    "backend.compile": "speed; numbers agree: backends/test_parity.py",
    "backend.activation_checkpointing": "memory; numbers agree: backends/test_parity.py",
    "backend.reduce_every_micro_step": "memory; gradients agree: backends/test_accumulation.py",
    "checkpoint.background": "speed: checkpoint/test_writer.py",
    "log.trackers": "with their packages: engine/test_trackers.py",
    "log.profile_steps": "a trace beside the run: engine/test_profile.py",
    "guard.skip_limit": "at non-finite steps: engine/test_skips.py",
    "guard.rollback_limit": "at non-finite steps: engine/test_skips.py",
    "guard.spike_factor": "at spikes: engine/test_skips.py",
    "guard.hang_seconds": "when a rank hangs: engine/test_hangs.py",
    "eval.train_path": "with eval.every: evaluation/test_periodic.py",
    "eval.test_path": "with eval.every: evaluation/test_periodic.py",
    "eval.segmentation_path": "with eval.every: evaluation/test_periodic.py",
    "cache.dir": "with a cache: pretraining/test_cached_runs.py",
    "cache.codec": "when a cache is built: cache/test_build.py",
    "cache.on_miss": "with a cache: pretraining/test_cached_runs.py",
    "cache.spot_check": "with a cache: pretraining/test_cached_runs.py",
}
SHORT = ["train.steps=3", "train.micro_batch_size=8", "checkpoint.every=3"]


def observe_all(recipe: Path, folder: Path) -> dict[str, tuple[str, str]]:
    make_photographs(folder / "others", 12)
    return observe_changes(
        lambda overrides: run(recipe, [*SHORT, *overrides]),
        lambda overrides: load_config(recipe, [*SHORT, *overrides]),
        folder,
        CHANGES,
    )


@pytest.fixture(scope="module")
def observations(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    folder = tmp_path_factory.mktemp("keys")
    (result,) = run_ranks(1, observe_all, write_recipe(folder), folder, timeout_s=300)
    return result


def test_every_key_is_listed() -> None:
    keys = sorted(key for key, _ in walk_fields(Config))
    assert keys == sorted([*CHANGES, *EXCEPTIONS])
    assert not missing_tests(EXCEPTIONS)
    assert set(unread_keys(Config)) == set() == set(unread_keys(NamedTeacher))


@pytest.mark.slow
@pytest.mark.gloo
@pytest.mark.parametrize("key", CHANGES)
def test_the_key_changes_the_run(observations: dict[str, tuple[str, str]], key: str) -> None:
    before, after = observations[key]
    assert before != after
    assert "Error" not in before or "Error" not in after
