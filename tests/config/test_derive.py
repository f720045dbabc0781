import math
from pathlib import Path

import pytest

from cmtmae_scale.config.batch import batch_plan, explain_batch, find_length_problem, total_steps
from cmtmae_scale.config.derive import find_scale_problem, find_unloaded_weights, peak_lr
from cmtmae_scale.config.finetune import Finetune, find_finetune_problems, load_finetune
from cmtmae_scale.config.load import load_config
from cmtmae_scale.config.needs import extremes, needs
from cmtmae_scale.config.schema import Config, Schedule
from cmtmae_scale.errors import ConfigError

ROOT = Path(__file__).parents[2]


def settled() -> Config:
    config = Config()
    config.collaboration.alpha_attention = Schedule("two_stage", 1.0, 0.5, 0.1)
    config.collaboration.alpha_target = Schedule("linear", 1.0, 0.7, None, 0.0, 0.25)
    return config


def test_the_batch_is_derived_and_says_how() -> None:
    plan = batch_plan(settled(), 32)
    assert plan.accumulation == 2
    assert str(plan) == "4096 = 64 micro x 32 ranks x 2 accumulation"


@pytest.mark.parametrize(
    ("total", "limit", "ranks", "micro", "accumulation"),
    [
        (4096, 64, 32, 64, 2),  # as configured
        (4096, 96, 64, 64, 1),  # less than the limit fits
        (32, 64, 1, 32, 1),  # the limit is above a rank's share
        (4096, 100, 8, 64, 8),
        (3000, 64, 8, 25, 15),
        (61, 60, 1, 1, 61),  # a prime share
    ],
)
def test_the_micro_batch_is_the_largest_divisor_that_fits(
    total: int, limit: int, ranks: int, micro: int, accumulation: int
) -> None:
    config = settled()
    config.train.global_batch_size, config.train.micro_batch_size = total, limit
    plan = batch_plan(config, ranks)
    assert plan == (total, micro, ranks, accumulation)
    assert micro * ranks * accumulation == total
    assert explain_batch(config, plan).startswith(str(plan))
    assert (f"up to train.micro_batch_size={limit}" in explain_batch(config, plan)) == (
        micro != limit
    )


def test_only_a_batch_that_the_ranks_cannot_share_is_refused() -> None:
    with pytest.raises(
        ConfigError,
        match=r"4096 cannot be shared by 48 ranks, .*; use 32 ranks or 64 ranks or "
        r"train.global_batch_size=4080 or 4128, which changes the run",
    ):
        batch_plan(settled(), 48)
    config = settled()
    config.train.global_batch_size = 6
    with pytest.raises(ConfigError, match=r"use 6 ranks or train.global_batch_size=8, which"):
        batch_plan(config, 8)
    config.train.global_batch_size = 2**62 + 1  # found at once, and no number of ranks is far
    with pytest.raises(ConfigError, match=r"shared by 8 ranks, .*; use 5 ranks or train.global"):
        batch_plan(config, 8)


def test_paired_views_get_an_even_micro_batch() -> None:
    config = Finetune()
    config.train.global_batch_size, config.train.micro_batch_size = 72, 4
    assert batch_plan(config, 4).micro_batch_size == 2  # 18 views per rank: 3 would be odd
    assert "largest even divisor" in explain_batch(config, batch_plan(config, 4))
    config.train.micro_batch_size = 7  # an odd number that fits in memory
    assert batch_plan(config, 2).micro_batch_size == 6
    assert not any("mixup" in text for text in find_finetune_problems(config))
    config.train.micro_batch_size = 4
    config.augment.mixup = config.augment.cutmix = 0
    assert batch_plan(config, 4).micro_batch_size == 3
    config.augment.cutmix = 1
    with pytest.raises(ConfigError, match=r"72 cannot be shared by 8 ranks, an even .*use 6 ranks"):
        batch_plan(config, 8)


@pytest.mark.parametrize("recipe", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_runs_on_up_to_64_ranks_with_its_own_batch(recipe: Path) -> None:
    tuning = recipe.stem.startswith("finetune_")
    config = load_finetune(recipe) if tuning else load_config(recipe)
    batch = config.train.global_batch_size
    ranks = math.gcd(batch, 64)
    plan = batch_plan(config, ranks)
    assert ranks > 1 and plan.micro_batch_size * ranks * plan.accumulation == batch
    assert plan.micro_batch_size <= config.train.micro_batch_size


def test_steps_follow_from_epochs() -> None:
    config = settled()
    config.train.epochs = 1.5
    assert total_steps(config, 1_281_167) == 470
    config.train.steps = 3
    assert total_steps(config, 1) == 3


@pytest.mark.parametrize(
    ("epochs", "images", "batch", "steps"),
    [
        *((1.1, 100_000, 1000, 110), (2.2, 100_000, 1000, 220), (1.1, 50_000, 100, 550)),
        *((1.1, 1001, 1000, 2), (1e-9, 10, 4, 1), (300.0, 1_281_167, 4096, 93_836)),
    ],
)
def test_a_fraction_of_an_epoch_is_taken_as_it_is_written(
    epochs: float, images: int, batch: int, steps: int
) -> None:
    config = settled()
    config.train.epochs, config.train.global_batch_size = epochs, batch
    assert total_steps(config, images) == steps


@pytest.mark.parametrize(
    ("kind", "teacher", "student", "is_named"),
    [
        ("mse", "l2", "ln", True),
        ("smooth_l1", "l2", "instance", True),
        ("mse", "ln", "l2", True),
        ("mse", "l2", "l2", False),
        ("mse", "ln", "channel", False),
        ("cosine", "l2", "ln", False),
    ],
)
def test_targets_of_different_scales_are_named(
    kind: str, teacher: str, student: str, is_named: bool
) -> None:
    config = settled()
    config.loss.type = kind
    config.target.teacher.norm, config.target.student.norm = teacher, student
    found = find_scale_problem(config)
    assert (found is not None) == is_named
    if found is not None:
        one, other = ("teacher", "student") if teacher == "l2" else ("student", "teacher")
        assert f"the norm of {one} is l2" in found and f"that of {other} is not" in found
    config.loss.student = 0
    assert find_scale_problem(config) is None


def test_a_tag_of_weights_that_no_file_gives_is_named() -> None:
    student = settled().student
    assert find_unloaded_weights(student) is None
    student.arch = "vit_base_patch16_224.mae"
    found = find_unloaded_weights(student) or ""
    assert "the weights mae of timm are not loaded" in found
    assert found.endswith("set student.init_weights=FILE, or student.arch=vit_base_patch16_224")
    student.init_weights = "mae.pth"
    assert find_unloaded_weights(student) is None


def test_a_batch_or_a_length_that_the_images_cannot_fill_is_a_problem() -> None:
    config = settled()
    config.train.global_batch_size, config.train.epochs, config.train.steps = 4096, 400, None
    problem = find_length_problem(config, 500) or ""
    assert "an epoch of 500 images has 0.12 batches, fewer than 4" in problem
    assert problem.endswith("set train.global_batch_size=125 or less")
    config.train.global_batch_size = 125
    assert find_length_problem(config, 500) is None
    config.train.epochs = 12
    problem = find_length_problem(config, 500) or ""
    assert problem.startswith("train.epochs=12 over 500 images are 48 steps of 125")
    assert problem.endswith("set train.epochs=13 or more")
    config.train.epochs = 13
    assert find_length_problem(config, 500) is None
    config.train.epochs, config.train.steps = None, 1  # as the user wants it
    assert find_length_problem(config, 500) is None


def test_lr_is_scaled_by_256() -> None:
    assert peak_lr(settled()) == pytest.approx(2.4e-3)


def test_extremes_of_a_schedule() -> None:
    assert extremes(0.3) == (0.3, 0.3)
    assert extremes(Schedule("linear", 1.0, 0.5)) == (0.5, 1.0)


def test_only_what_the_weights_ask_for_is_needed() -> None:
    assert needs(settled()) == (True, True, True, True, False)
    mae = settled()
    mae.mask.sampler = "random"
    mae.loss.teacher, mae.loss.student, mae.loss.pixel = 0, 0, 1
    assert needs(mae) == (False, False, False, False, True)
    assert not needs(mae).teacher and not needs(mae).momentum
    milan = settled()
    milan.collaboration.alpha_attention = milan.collaboration.alpha_target = 1.0
    assert needs(milan) == (True, True, False, False, False)
    student_only = settled()
    student_only.collaboration.alpha_attention = student_only.collaboration.alpha_target = 0.0
    assert needs(student_only) == (False, False, True, True, False)
