"""A pre-flight is a study of candidates, with one verdict for each."""

import json
from pathlib import Path

import pytest

from cmtmae_scale.commands.study import run_study
from cmtmae_scale.errors import ConfigError
from cmtmae_scale.tools.study.preflight import (
    DEFAULTS,
    judge_candidate,
    preflight_study,
    preflight_table,
)
from cmtmae_scale.tools.study.run_results import Accuracy
from cmtmae_scale.tools.study.work import plan_runs
from tests.tools.study.study_case import NO_TEACHER, hits_of, put_results, study_tree

ROOT = Path(__file__).resolve().parents[3]
IMAGES = ["eval.train_path=train", "eval.test_path=test"]
RANDOM = Accuracy(0.05, (0.04, 0.06))
NEAR = Accuracy(0.2, (0.17, 0.23))


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("cmtmae_scale.commands.study.set_up_logging", lambda *_: None)
    return study_tree(tmp_path)["recipe"]


@pytest.mark.parametrize(
    ("rank", "cosine", "near", "expected"),
    [
        (4.9, 0.1, NEAR, "collapses: effective rank below 5"),
        (9.0, 0.96, NEAR, "collapses: patches have a cosine above 0.95"),
        (9.0, 0.9, Accuracy(0.03, (0.02, 0.039)), "worse than random weights"),
        (None, None, Accuracy(0.07, (0.06, 0.08)), "not better than random weights; inter"),
        (None, None, NEAR, "learns"),
    ],
)
def test_the_verdict(rank: float, cosine: float, near: Accuracy, expected: str) -> None:
    assert judge_candidate(rank, cosine, near, RANDOM).startswith(expected)


def test_each_candidate_is_a_run_of_the_same_length(recipe: str, tmp_path: Path) -> None:
    texts = [
        "mask.ratio=0.5",
        "loss.pixel=1 'mask.salient_fraction={kind: linear, start: 0, end: 0.5}'",
    ]
    study = preflight_study(recipe, str(tmp_path / "p"), 30, IMAGES, texts)
    plain, half, pixel = (run.config for run in plan_runs(study))
    assert plain.mask.ratio != half.mask.ratio == 0.5
    assert pixel.loss.pixel == 1 and pixel.mask.salient_fraction.end == 0.5
    assert {config.train.steps for config in (plain, half, pixel)} == {30}
    assert plain.log.diagnostics_every == 3


def test_the_default_candidates_are_those_that_fit_the_recipe(
    recipe: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def rows(*settings: str) -> list[str]:
        study = preflight_study(recipe, str(tmp_path / "p"), 30, [*IMAGES, *settings], [])
        assert len(plan_runs(study)) == len(study.rows)
        return list(study.rows)

    as_it_is, target_1, target_03, pixel, no_decoder = rows()
    assert [as_it_is, target_1, target_03, pixel, no_decoder] == ["as it is", *DEFAULTS]
    assert rows(*NO_TEACHER) == ["as it is"]
    assert rows("collaboration.alpha_target=1") == ["as it is", target_03, pixel, no_decoder]
    best = rows(*no_decoder.split())
    assert best == ["as it is", target_03, pixel]  # the rest are the recipe itself
    assert not caplog.records
    cross = ["decoder.type=cross", "loss.tokens=masked", "decoder.predict_ratio=0.25"]
    assert rows(*cross) == ["as it is", target_1, target_03, pixel]
    assert f"no candidate {no_decoder}: " in caplog.text and "predict_ratio" in caplog.text


def test_unusable_recipes_are_refused(recipe: str) -> None:
    with pytest.raises(ConfigError, match=r"give labelled images with eval.train_path=PATH"):
        preflight_study(recipe, "p", 30, [], [])
    with pytest.raises(ConfigError, match=r"--candidate run.name='a: No closing quotation; close"):
        preflight_study(recipe, "p", 30, IMAGES, ["run.name='a"])
    with pytest.raises(ConfigError, match=r"run.seed=1: the study sets run"):
        preflight_study(recipe, "p", 30, IMAGES, ["run.seed=1"])


def test_the_table_has_a_verdict_per_candidate(recipe: str, tmp_path: Path) -> None:
    study = preflight_study(recipe, str(tmp_path / "p"), 30, IMAGES, ["mask.ratio=0.5"])
    runs = plan_runs(study)
    assert preflight_table(study, runs).startswith("no verdict")
    put_results(runs[0], hits_of(20), baselines=True)
    entries = [{"step": 30, "diagnostics/effective_rank": 2.5, "diagnostics/pairwise_cosine": 0.3}]
    (runs[0].folder / "log.jsonl").write_text(json.dumps(entries[0]) + "\n")
    lines = preflight_table(study, runs).splitlines()
    assert lines[-2] == (
        "| `as it is` | 2.50 | 0.30 | 20.0 [35.2, 64.8] | collapses: effective rank below 5 |"
    )
    assert lines[-1] == "| `mask.ratio=0.5` | | | | no result |"
    put_results(runs[1], hits_of(20))
    assert preflight_table(study, runs).splitlines()[-1].endswith("| 20.0 [35.2, 64.8] | learns |")


def test_a_dry_run_lists_the_candidates(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["preflight", recipe, *IMAGES, "--candidate", "mask.ratio=0.5", "--dry-run"]
    assert run_study([*words, "--steps", "7"]) == 0
    text = capsys.readouterr().out
    assert "# mask.ratio=0.5, seed 0: train, evaluate, evaluate\n" in text
    assert "train.steps=7" in text and "run.name=as_it_is-0" in text
    assert "runs/preflight/recipe/runs/" in text


def test_absent_images_are_refused_before_anything_is_trained(
    recipe: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, absent = tmp_path / "p", tmp_path / "absent"
    images = [f"eval.train_path={absent}", f"eval.test_path={absent}"]
    assert run_study(["preflight", recipe, *images, "--dir", str(folder), "--steps", "1"]) == 78
    assert str(absent) in caplog.text and not folder.exists()
