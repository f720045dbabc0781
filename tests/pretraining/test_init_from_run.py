"""A new run continues the weights of another run, at its image size or at another."""

import logging
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import timm
import torch
from timm.models.vision_transformer import checkpoint_filter_fn

from cmtmae_scale.backends.plain import Plain
from cmtmae_scale.checkpoint import layout
from cmtmae_scale.config.load import load_config
from cmtmae_scale.config.schema import Config
from cmtmae_scale.errors import EXIT_CONFIG, CmtMaeError, ConfigError
from cmtmae_scale.method.model import CollaborativeMAE
from cmtmae_scale.pretraining import init_from_run
from cmtmae_scale.pretraining.build import build_models, fetch_teacher
from cmtmae_scale.pretraining.init_from_run import load_source, open_source
from cmtmae_scale.pretraining.prepare import Models
from cmtmae_scale.runtime.launch import World
from tests.engine.run_case import read_log, run, same, tensors, this_world, write_recipe
from tests.processes import run_ranks

pytestmark = pytest.mark.gloo

ALONE, CPU = World(0, 1, 0, 1, "none"), torch.device("cpu")
STEPS = 8
TWICE = ["views.image_size=128", "decoder.position_grid=4"]
COMMON = [
    *("target.teacher.norm=channel", "target.student.norm=channel"),
    "log.diagnostics_every=null",
]
"""Targets with running statistics."""


def run_all(recipe: Path) -> None:
    """Train the source, and new runs from it: stopped and resumed, and at twice the size."""
    folder = recipe.parent
    run(recipe, [f"train.steps={STEPS}", f"checkpoint.every={STEPS}", *COMMON])
    start = f"student.init_from_run={folder / 'run'}"
    kept = [start, "student.init_optimizer=true", "train.steps=2", *COMMON]
    run(recipe, [f"run.output_dir={folder / 'whole'}", *kept])
    run(recipe, [f"run.output_dir={folder / 'moved'}", *kept, "train.stop_after=1"])
    (folder / "run").rename(folder / "away")
    run(recipe, [f"run.output_dir={folder / 'moved'}", *kept])
    (folder / "away").rename(folder / "run")
    larger = [*TWICE, "train.steps=1", *COMMON]
    run(recipe, [f"run.output_dir={folder / 'larger'}", *larger, start])
    run(recipe, [f"run.output_dir={folder / 'random'}", *larger])


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe; the folder ``run`` beside it is the other run."""
    path = write_recipe(tmp_path_factory.mktemp("case"), depth=2)
    run_ranks(1, run_all, path)
    return path


def losses(run_dir: Path) -> list[float]:
    return [entry["loss/total"] for entry in read_log(run_dir)]


def read_start(recipe: Path, *overrides: str) -> Config:
    folder = recipe.parent
    where = [f"run.output_dir={folder / 'new'}", f"student.init_from_run={folder / 'run'}"]
    return load_config(recipe, [*where, *COMMON, *overrides])


def start(config: Config, world: World = ALONE) -> Models:
    teacher = fetch_teacher(config, world, CPU)
    assert teacher is not None
    return build_models(config, world, CPU, {"": teacher})


def test_at_the_same_size_every_value_is_that_of_the_other_run(
    recipe: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved = tensors(recipe.parent / "run", STEPS)
    folder = layout.folder_of(recipe.parent / "run" / "checkpoints", STEPS)
    state = layout.read_state(folder)
    for keeps in (False, True):
        with caplog.at_level(logging.INFO):
            models = start(read_start(recipe, f"student.init_optimizer={keeps}".lower()))
        found = models.backend.fragments()
        assert found.keys() == saved.keys()
        for key, own in found.items():
            is_loaded = keeps or key.startswith(("model.", "momentum."))
            value = saved[key] if is_loaded else torch.zeros_like(saved[key])
            assert torch.equal(own.local, value.flatten()), key
        assert models.channels.to_dict()["target_channels"] == state["target_channels"]
        assert models.prior_steps == (STEPS if keeps else 0)
    lines = [line for line in caplog.messages if "init_from_run" in line]
    count = {
        kind: sum(key.startswith(f"{kind}.") for key in saved) for kind in ("model", "exp_avg")
    }
    assert f"run/checkpoints/{folder.name}, step {STEPS}: loaded: " in lines[0]
    assert f"{count['model']} of model, " in lines[0]
    assert f"at initial values: {count['exp_avg']} of exp_avg, " in lines[0]
    assert (
        "at initial values: none; not used: none; statistics of targets: student, teacher"
        in (lines[1])
    )


def test_at_twice_the_size_the_encoder_is_timms_own(recipe: Path) -> None:
    saved = tensors(recipe.parent / "run", STEPS)
    models = start(read_start(recipe, *TWICE))
    found = models.backend.fragments()
    for prefix in ("model.encoder.", "momentum."):
        theirs = cast(Any, timm.create_model("test_vit", img_size=128, depth=2, num_classes=0))
        old = {k.removeprefix(prefix): v for k, v in saved.items() if k.startswith(prefix)}
        theirs.load_state_dict(checkpoint_filter_fn(old, theirs, antialias=True))
        ours = {k.removeprefix(prefix): own for k, own in found.items() if k.startswith(prefix)}
        for name, value in theirs.state_dict().items():
            assert torch.equal(ours[name].local, value.flatten()), name


def test_the_first_loss_goes_on_from_the_other_run(recipe: Path) -> None:
    before = losses(recipe.parent / "run")
    (after,), (random,) = losses(recipe.parent / "larger"), losses(recipe.parent / "random")
    assert before[0] - before[-1] > 0.1
    assert abs(after - before[-1]) < 0.5 * (random - before[-1])


def test_a_resume_reads_nothing_of_the_other_run_and_keeps_adamws_counter(recipe: Path) -> None:
    same(recipe.parent / "moved", recipe.parent / "whole", 2)


def read_ranges(recipe: Path, overrides: list[str]) -> dict[str, tuple[int, Any]]:
    """Offset and values of this rank's fragments at the start of a new run."""
    torch.set_num_threads(1)
    found = start(read_start(recipe, *overrides), this_world()).backend.fragments()
    return {key: (own.offset, own.local.numpy()) for key, own in found.items()}


ZERO = (
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
    pytest.mark.deepspeed,
    pytest.mark.slow,
)


@pytest.mark.parametrize(
    "backend",
    [
        ["backend.sharding=full"],
        pytest.param(["backend.sharding=hybrid"], marks=pytest.mark.slow),
        pytest.param(["backend.name=deepspeed", "backend.zero_stage=1"], marks=ZERO),
        pytest.param(["backend.name=deepspeed", "backend.zero_stage=3"], marks=ZERO),
    ],
    ids=["fsdp", "hybrid", "zero1", "zero3"],
)
def test_two_ranks_start_from_the_run_of_one(recipe: Path, backend: list[str]) -> None:
    saved = tensors(recipe.parent / "run", STEPS)
    expected = start(read_start(recipe, *TWICE)).backend.fragments()
    overrides = [*TWICE, "student.init_optimizer=true", *backend]
    found = {key: np.full(own.local.numel(), np.nan) for key, own in expected.items()}
    for rank in run_ranks(2, read_ranges, recipe, overrides):
        assert rank.keys() == saved.keys()
        for key, (offset, local) in rank.items():
            found[key][offset : offset + len(local)] = local
    for key, values in found.items():
        whole = expected[key].local if key.endswith("pos_embed") else saved[key].flatten()
        np.testing.assert_array_equal(values, whole.numpy(), err_msg=key)


UNFIT = {
    "architecture": (
        ["student.arch=test_vit2", "loss.include_cls=false"],
        "student.arch: that run has test_vit, this one test_vit2; set what that run has",
    ),
    "depth": (["student.depth=3"], "student.depth: that run has 2, this one 3"),
    "decoder": (["decoder.width=64"], "decoder.width: that run has 32, this one 64; set what"),
    "positions": (
        TWICE[:1],
        "of 4 x 4 patches, this one's of 8 x 8; decoder.position_grid=4 stretches",
    ),
    "target": (
        ["collaboration.alpha_target=1"],
        "collaboration.alpha_target: that run has 0.7, this one 1.0; heads.student.bias: that run "
        "has [64], this one none; ",
    ),
}


@pytest.mark.parametrize("case", UNFIT)
def test_another_model_is_refused_with_both_values(recipe: Path, case: str) -> None:
    overrides, said = UNFIT[case]
    config = read_start(recipe, *overrides)
    with torch.device("meta"):
        model = CollaborativeMAE(config, {"teacher": 64})
    with pytest.raises(ConfigError) as caught:
        open_source(config, model, ALONE)
    place = recipe.parent / "run"
    assert str(caught.value).startswith(f"student.init_from_run={place} does not fit: ")
    assert said in str(caught.value) and caught.value.exit_code == EXIT_CONFIG
    encoder = layout.folder_of(place / "checkpoints", STEPS) / "encoder.safetensors"
    is_same = not case.startswith(("arch", "depth"))
    assert (f"student.init_from_run=null student.init_weights={encoder}" in str(caught.value)) == (
        is_same
    )


def test_a_teacher_of_another_width_is_refused(recipe: Path) -> None:
    config = read_start(recipe, "teacher.model=test_vit3")
    with torch.device("meta"):
        model = CollaborativeMAE(config, {"teacher": 96})
    with pytest.raises(ConfigError) as caught:
        open_source(config, model, ALONE)
    assert (
        "teacher.model: that run has test_vit, this one test_vit3; heads.teacher.bias: that "
        in (str(caught.value))
    )


def test_without_ema_weights_there_the_ema_is_a_copy_of_the_student(
    recipe: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = read_start(recipe)
    models = start(config)
    backend = cast(Plain, models.backend)
    model = cast(CollaborativeMAE, backend.model)
    source = open_source(config, model, ALONE)
    left = {key: one for key, one in source.tensors.items() if not key.startswith("momentum.")}
    with caplog.at_level(logging.INFO):
        load_source(config, model, backend, models.channels, source._replace(tensors=left))
    found = backend.fragments()
    names = [key.removeprefix("momentum.") for key in found if key.startswith("momentum.")]
    assert f", {len(names)} of momentum; not used: " in caplog.text
    for name in names:
        assert torch.equal(found[f"momentum.{name}"].local, found[f"model.encoder.{name}"].local)


def test_a_run_of_another_task_is_refused(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = read_start(recipe)
    with torch.device("meta"):
        model = CollaborativeMAE(config, {"teacher": 64})
    monkeypatch.setattr(init_from_run, "read_state", lambda folder: {"task": "fine-tuning"})
    with pytest.raises(ConfigError, match="holds checkpoints of fine-tuning; name a run of pre-"):
        open_source(config, model, ALONE)


def test_folders_without_an_intact_checkpoint_are_named(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "early" / "checkpoints").mkdir(parents=True)
    shutil.copytree(recipe.parent / "run", tmp_path / "torn")
    torn = layout.folder_of(tmp_path / "torn" / "checkpoints", STEPS)
    shard = torn / "rank-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    said = {
        "absent": "student.init_from_run={} is neither .*; there is no such folder: correct",
        "empty": "student.init_from_run={} is neither a run .* nor a checkpoint .*; name one of",
        "early": "{}: no checkpoint yet; train first",
        "torn": "{}/checkpoints: none of 1 checkpoints is intact; restore one, or name another run",
        f"torn/checkpoints/{torn.name}": "{} is broken: rank-00000.safetensors differs from its",
    }
    for name, text in said.items():
        config = read_start(recipe, f"student.init_from_run={tmp_path / name}")
        with torch.device("meta"):
            model = CollaborativeMAE(config, {"teacher": 64})
        with pytest.raises(CmtMaeError, match=text.format(tmp_path / name)) as caught:
            open_source(config, model, ALONE)
        assert caught.value.exit_code == EXIT_CONFIG


def test_settings_that_exclude_each_other_are_refused(recipe: Path) -> None:
    run_dir = recipe.parent / "run"
    said = {
        "student.init_weights=w.pt": "both give the initial weights; set one of them to null",
        f"run.output_dir={run_dir}": "name another run.output_dir",
        "student.init_from_run=null student.init_optimizer=true": "which is not given",
    }
    for overrides, text in said.items():
        with pytest.raises(ConfigError, match=text):
            read_start(recipe, *overrides.split())
