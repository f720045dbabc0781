"""The report of a fine-tuning shows what a fine-tuning has, and nothing of a pre-training."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cmtmae_scale.engine.progress import fresh_progress
from cmtmae_scale.finetuning.task import Finetuning
from cmtmae_scale.tools.report.page import render_page
from cmtmae_scale.tools.report.ranges import scheduled_values
from cmtmae_scale.tools.report.run import read_run
from tests.tools.report.report_case import write_run, write_tuning
from tests.tools.report.test_hostile import VALUES
from tests.tools.report.test_report import report

ABSENT = (
    *("pre-training", "teacher", "masked", "decoder", "Figures", "not this version's"),
    *("not evaluated during training", "holds no result", "momentum"),
)


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    return write_tuning(tmp_path / "runs" / "tuned")


def test_a_fine_tuning_is_reported_as_such(tuned: Path) -> None:
    words = report(tuned)
    for phrase in (
        "Fine-tuning, as of",
        "60 of 60",
        "top-1 accuracy 30.0 % at step 60, 95 % interval 21.9 % to 39.6 %, chance 12.5 %",
        "student, step 400 (sha256 aaaaaaaaaaaa): test_vit at 64 pixels",
        "images/train: 1234 images",
        "Cross-entropy",
        "Accuracy, fine-tuned",
        "top-5 0.6",
        "fine-tuned 30.0 % 21.9 % to 39.6 % 60.0 % 30/100 result.json",
        "evaluations 10.0 %",
    ):
        assert phrase in words, phrase
    for phrase in ABSENT:
        assert phrase not in words, phrase


def test_the_learning_rate_of_a_fine_tuning_has_its_schedule(tmp_path: Path) -> None:
    """What the task itself returns at each step, on 1,234 images."""
    run = read_run(write_tuning(tmp_path / "tuned", "train.global_batch_size=512"))
    task: Any = object.__new__(Finetuning)
    task.config, task.sets = run.tuning, SimpleNamespace(train=range(1234))
    progress = fresh_progress(60, 512)
    planned = dict(scheduled_values(run, "lr"))
    assert len(planned) == 60 and planned[1] == 0
    for step in range(1, 61):
        assert planned[step] == pytest.approx(task.scalars(progress).lr, rel=1e-12)
        progress.advance(512, True)
    assert "Thin grey lines are schedules" in report(tmp_path / "tuned")
    run.num_images = None  # no index: the epochs are not known
    assert scheduled_values(run, "lr") == []


def test_a_fine_tuning_that_has_just_begun_says_what_is_not_there_yet(tuned: Path) -> None:
    for name in ("result.json", "exit.json", "log.jsonl"):
        (tuned / name).unlink()
    (tuned / "checkpoints" / "step-00000060" / "state.json").unlink()
    words = report(tuned)
    for phrase in (
        "0 of 60",
        "encoder not known before the first checkpoint",
        "The accuracy is first measured after a pass over the images.",
        "The accuracy of the last weights will be in result.json.",
    ):
        assert phrase in words, phrase
    for phrase in ABSENT:
        assert phrase not in words, phrase


@pytest.mark.parametrize("gone", ["checkpoints/step-00000060/state.json", "result.json"])
def test_a_fine_tuning_is_known_without_its_settings(tuned: Path, gone: str) -> None:
    (tuned / gone).unlink()
    (tuned / "config.yaml").write_text("augment: {vanished: 1}\n")
    words = report(tuned)
    assert "config.yaml is not this version's: " in words and "vanished" in words
    assert "Fine-tuning, as of" in words and "student, step 400 (sha256 aaaaaaaaaaaa)" in words
    (tuned / "config.yaml").unlink()
    assert "Fine-tuning, as of" in report(tuned)


def test_only_fine_tunings_of_the_same_encoder_make_a_range(tuned: Path) -> None:
    write_tuning(tuned.parent / "other", "run.seed=1", sha256="b" * 64)
    write_tuning(tuned.parent / "elsewhere", "run.seed=1", "data.test_path=elsewhere")
    words = report(tuned)
    assert "No sibling folder holds a finished run of the same settings and encoder" in words
    write_tuning(tuned.parent / "seed-1", "run.seed=1")
    assert "one other run of these settings" in report(tuned)


def test_fine_tunings_are_compared_with_their_encoders(tuned: Path) -> None:
    other = write_tuning(tuned.parent / "other", sha256="b" * 64)
    words = report(tuned, other)
    row = "encoder student, step 400 (sha256 aaaaaaaaaaaa) student, step 400 (sha256 bbbbbbbbbbbb)"
    assert row in words and "Top-1 accuracy (fine-tuned)" in words
    before = write_run(tuned.parent / "before")
    assert "CMT-MAE pre-training and fine-tuning, as of" in report(before, tuned)


@pytest.mark.parametrize("value", VALUES, ids=range(len(VALUES)))
def test_values_of_any_type_are_reported(tuned: Path, value: Any) -> None:
    place = tuned / "checkpoints" / "step-00000060" / "state.json"
    for encoder in (value, {"name": value, "facts": value}, {"facts": {"sha256": value}}):
        place.write_text(json.dumps({"task": value, "encoder": encoder}))
        for weights in (value, {"x": value}):
            result = {"steps": 60, "subject": value, "weights_sha256": weights}
            result |= {"results": [{"interval_95": value, "accuracy": value}]}
            (tuned / "result.json").write_text(json.dumps(result))
            page = render_page([read_run(tuned)])
            assert "top-1 accuracy" in page and "cannot be drawn" not in page
