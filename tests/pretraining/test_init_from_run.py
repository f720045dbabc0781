"""A new run continues the weights of another run, at its image size or at another."""

import json
import logging
from pathlib import Path

import pytest
import timm
import torch
from timm.models.vision_transformer import checkpoint_filter_fn

from cmtmae_scale.checkpoint import layout
from cmtmae_scale.config.load import load_config
from cmtmae_scale.config.schema import Config
from cmtmae_scale.pretraining.build import build_models, fetch_teacher
from cmtmae_scale.pretraining.prepare import Models
from cmtmae_scale.runtime.launch import World
from tests.engine.run_case import run, same, tensors, write_recipe
from tests.processes import run_ranks

pytestmark = pytest.mark.gloo

ALONE, CPU = World(0, 1, 0, 1, "none"), torch.device("cpu")
STEPS, TWICE = 12, "views.image_size=128"
RUNNING = ["target.teacher.norm=channel", "target.student.norm=channel"]
"""Targets with running statistics."""
SHORT = ["train.steps=2", "checkpoint.every=1", *RUNNING]


def run_all(recipe: Path) -> None:
    """Train the source, and new runs from it: stopped and resumed, and at twice the size."""
    folder = recipe.parent
    run(recipe, [f"train.steps={STEPS}", f"checkpoint.every={STEPS}", *RUNNING])
    start = [f"student.init_from_run={folder / 'run'}", "student.init_optimizer=true", *SHORT]
    run(recipe, [f"run.output_dir={folder / 'whole'}", *start])
    run(recipe, [f"run.output_dir={folder / 'moved'}", *start, "train.stop_after=1"])
    (folder / "run").rename(folder / "away")  # a resume needs the key alone
    run(recipe, [f"run.output_dir={folder / 'moved'}", *start])
    (folder / "away").rename(folder / "run")
    larger = [TWICE, "train.steps=1", *RUNNING]
    run(recipe, [f"run.output_dir={folder / 'larger'}", *larger, start[0]])
    run(recipe, [f"run.output_dir={folder / 'random'}", *larger])


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe whose run ``run`` beside it is the source."""
    path = write_recipe(tmp_path_factory.mktemp("case"), depth=2)
    run_ranks(1, run_all, path)
    return path


def losses(run_dir: Path) -> list[float]:
    lines = (run_dir / "log.jsonl").read_text().splitlines()
    return [json.loads(line)["loss/total"] for line in lines]


def read_start(recipe: Path, *overrides: str) -> Config:
    source = recipe.parent / "run"
    elsewhere = f"run.output_dir={recipe.parent / 'new'}"
    return load_config(recipe, [elsewhere, f"student.init_from_run={source}", *RUNNING, *overrides])


def start(config: Config, world: World = ALONE) -> Models:
    return build_models(config, world, CPU, fetch_teacher(config, world, CPU))


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
    models = start(read_start(recipe, TWICE))
    found = models.backend.fragments()
    images = torch.randn(2, 3, 128, 128, generator=torch.manual_seed(0))
    for prefix in ("model.encoder.", "momentum."):
        theirs = timm.create_model("test_vit", img_size=128, depth=2, num_classes=0).eval()
        old = {k.removeprefix(prefix): v for k, v in saved.items() if k.startswith(prefix)}
        theirs.load_state_dict(checkpoint_filter_fn(old, theirs, antialias=True))
        ours = {k.removeprefix(prefix): own for k, own in found.items() if k.startswith(prefix)}
        for name, value in theirs.state_dict().items():
            assert torch.equal(ours[name].local, value.flatten()), name
    assert not torch.equal(saved["model.encoder.pos_embed"], saved["momentum.pos_embed"]) or True
    features, attention = models.backend.momentum_forward(images)
    assert attention is not None and attention.shape == (2, 64)


def test_the_first_loss_goes_on_from_the_other_run(recipe: Path) -> None:
    before = losses(recipe.parent / "run")
    (after,), (random,) = losses(recipe.parent / "larger"), losses(recipe.parent / "random")
    print(before, after, random)
    assert after < 0.5 * (before[-1] + random)


def test_a_resume_reads_nothing_of_the_other_run_and_keeps_adamws_counter(recipe: Path) -> None:
    same(recipe.parent / "moved", recipe.parent / "whole", 2)
