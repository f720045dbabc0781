import pytest

from cmtmae_scale.config.derive import batch_plan, extremes, needs, peak_lr, total_steps
from cmtmae_scale.config.schema import Config, Schedule
from cmtmae_scale.errors import ConfigError


def settled() -> Config:
    config = Config()
    config.collaboration.alpha_attention = Schedule("two_stage", 1.0, 0.5, 0.1)
    config.collaboration.alpha_target = Schedule("linear", 1.0, 0.7, None, 0.0, 0.25)
    return config


def test_the_batch_is_derived_and_says_how() -> None:
    plan = batch_plan(settled(), 32)
    assert plan.accumulation == 2
    assert str(plan) == "4096 = 64 micro x 32 ranks x 2 accumulation"


def test_a_batch_that_does_not_divide_names_those_that_do() -> None:
    with pytest.raises(ConfigError, match="64 x 48 = 3072; use 3072 or 6144"):
        batch_plan(settled(), 48)
    config = settled()
    config.train.global_batch_size = 32
    with pytest.raises(ConfigError, match=r"use 64$"):
        batch_plan(config, 1)


def test_steps_follow_from_epochs() -> None:
    config = settled()
    config.train.epochs = 1.5
    assert total_steps(config, 1_281_167) == 470
    config.train.steps = 3
    assert total_steps(config, 1) == 3


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
