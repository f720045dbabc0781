"""Evaluation during a run: the command's numbers, and not a bit of the training changed."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from cmtmae_scale.config.load import load_config
from cmtmae_scale.engine.telemetry import Telemetry
from cmtmae_scale.evaluation.periodic import LABEL_FREE
from cmtmae_scale.evaluation.representation import ALL_IMAGES
from cmtmae_scale.pretraining.task import Pretraining
from cmtmae_scale.runtime.launch import World
from tests.engine.run_case import STEPS, read_log, run, same, write_recipe
from tests.evaluation.dense_case import write_masked
from tests.evaluation.evaluation_case import command, labelled_photographs
from tests.processes import run_ranks

pytestmark = pytest.mark.gloo
MAE = [
    *("teacher.mode=none", "mask.sampler=random", "loss.teacher=0", "loss.student=0"),
    *("loss.pixel=1", "decoder.type=full", "loss.tokens=masked"),
]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("during")
    labelled_photographs(folder / "train", 41, 0, 6)
    labelled_photographs(folder / "test", 23, 1, 6)
    write_masked(folder / "masked" / "train", 4)
    write_masked(folder / "masked" / "test", 3, 50)
    return write_recipe(folder)


def asking(recipe: Path, run_dir: Path, *more: str) -> list[str]:
    """Overrides of a run that evaluates every third step."""
    paths = [f"eval.{name}_path={recipe.parent / name}" for name in ("train", "test")]
    paths.append(f"eval.segmentation_path={recipe.parent / 'masked'}")
    return [f"run.output_dir={run_dir}", "eval.every=3", *paths, *more]


def evaluations(run_dir: Path) -> list[dict[str, float]]:
    found = [line for line in read_log(run_dir) if "eval/knn10" in line]
    assert all(0 < line.pop("eval/time_fraction") < 1 for line in found)
    return found


def both_methods(run_dir: Path) -> None:
    options = ["--checkpoint", run_dir, "--no-baselines", "--batch", "7"]
    command("knn", *options, "--out", run_dir / "knn.json")
    command("linear", *options, "--epochs", "1", "--out", run_dir / "linear.json")
    command("representation", *options, "--out", run_dir / "representation.json")


def accuracies_of_the_command(run_dir: Path) -> dict[str, float]:
    """The command's accuracies of the run's last checkpoint, under the log's names."""
    run_ranks(1, both_methods, run_dir)
    names = {"k-NN k=10": "knn10", "k-NN k=20": "knn20", "logistic": "linear"}
    found: dict[str, float] = {}
    for method in ("knn", "linear"):
        for row in json.loads((run_dir / f"{method}.json").read_text())["results"]:
            prefix = "eval/" if row["features"] == "patches" else "eval/cls/"
            if row["method"] in names:
                found[prefix + names[row["method"]]] = row["accuracy"]
    for row in json.loads((run_dir / "representation.json").read_text())["results"]:
        name = LABEL_FREE.get((row["features"], row["measure"]))
        if name is not None and row["method"] != ALL_IMAGES:
            found[f"eval/{name}"] = pytest.approx(row["value"], rel=1e-6)
    return found


@pytest.mark.parametrize(
    ("ranks", "more"),
    [
        pytest.param(1, [], marks=pytest.mark.slow),
        (2, ["backend.sharding=full"]),
        pytest.param(2, ["backend.sharding=replicate", *MAE], marks=pytest.mark.slow),
        pytest.param(
            *(2, ["backend.name=deepspeed", "backend.zero_stage=1"]),
            marks=[pytest.mark.deepspeed, pytest.mark.slow],
        ),
        pytest.param(
            *(2, ["backend.name=deepspeed", "backend.zero_stage=3", *MAE]),
            marks=[pytest.mark.deepspeed, pytest.mark.slow],
        ),
    ],
)
def test_training_is_the_same_bit_for_bit_and_the_numbers_are_the_commands(
    recipe: Path, tmp_path: Path, ranks: int, more: list[str]
) -> None:
    if any("zero" in one for one in more):
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    quiet, asked = tmp_path / "quiet", tmp_path / "asked"
    assert run_ranks(ranks, run, recipe, [f"run.output_dir={quiet}", *more]) == [None] * ranks
    assert run_ranks(ranks, run, recipe, asking(recipe, asked, *more)) == [None] * ranks
    same(quiet, asked)
    found = evaluations(asked)
    assert [entry["step"] for entry in found] == [3, STEPS]
    last = {name: value for name, value in found[-1].items() if name != "step"}
    assert 0 < last.pop("eval/segmentation_knn") <= 1
    assert last == accuracies_of_the_command(asked)
    assert len(last) == 12
    assert not (quiet / "evaluation").exists()


@pytest.mark.slow
def test_a_resumed_run_evaluates_as_an_undisturbed_one(recipe: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_ranks(1, run, recipe, asking(recipe, whole))
    run_ranks(1, run, recipe, asking(recipe, parts, "train.stop_after=4"))
    run_ranks(1, run, recipe, asking(recipe, parts, "eval.every=2"))
    same(whole, parts)
    assert [entry["step"] for entry in evaluations(parts)] == [3, STEPS]
    assert evaluations(parts)[-1] == evaluations(whole)[-1]


def run_without_images(recipe: Path, overrides: list[str], folder: Path) -> list[str]:
    """Run without evaluation images when an evaluation is due; returns the warnings."""
    import functools

    from cmtmae_scale.evaluation import features
    from tests.checkpoint.save_case import Lines

    log = Lines()
    features.OnePass = functools.partial(features.OnePass, patience_s=0.0)
    build = features.extract_features

    def gone(*arguments: Any) -> Any:
        for path in (folder / "class0").glob("*.jpg"):
            path.unlink(missing_ok=True)  # the other rank does so too
        return build(*arguments)

    from cmtmae_scale.evaluation import periodic as during

    during.extract_features = gone
    assert run(recipe, overrides) is None
    return log.lines


def test_images_that_cannot_be_read_skip_the_evaluation(recipe: Path, tmp_path: Path) -> None:
    train = labelled_photographs(tmp_path / "train", 41, 0, 6)
    overrides = [*asking(recipe, tmp_path / "run", "eval.every=6"), f"eval.train_path={train}"]
    for lines in run_ranks(2, run_without_images, recipe, overrides, train):
        warnings = [line for line in lines if line.startswith(f"step {STEPS}: no evaluation: ")]
        assert len(warnings) == 1 and ".jpg" in warnings[0]
    assert evaluations(tmp_path / "run") == []


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("eval.train_path=null", "eval.train_path must be given: eval.every=3"),
        ("eval.test_path=nowhere", "nowhere"),
        ("eval.every=0", "eval.every=0 must be above 0"),
        ("eval.segmentation_path=nowhere", "nowhere: nothing to test on"),
    ],
)
def test_evaluations_that_cannot_work_are_refused_before_the_first_step(
    recipe: Path, tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(AssertionError, match=message):
        run_ranks(1, run, recipe, asking(recipe, tmp_path / "run", override))


def test_evaluation_that_takes_much_time_is_reported_once(
    recipe: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    telemetry = Telemetry(tmp_path, 0, 10, 1)
    telemetry.began -= 100.0  # seconds of training so far
    task = Pretraining(load_config(recipe), World(0, 1, 0, 1, "none"), torch.device("cpu"))
    with caplog.at_level(logging.WARNING):
        for step in (1, 2, 3):
            fraction = telemetry.record_side_task("eval", step, {"eval/knn10": 0.5}, 4.0)
            task.warn_of_cost(fraction, 4.0)
            assert step > 1 or not caplog.messages
    telemetry.close()
    (line,) = caplog.messages
    assert line.startswith("evaluation has taken 8 % of the time since the launch, 4.0 s for this")
    assert "raise eval.every, or name fewer images in eval.train_path" in line
    shares = [
        json.loads(line)["eval/time_fraction"]
        for line in (tmp_path / "log.jsonl").read_text().splitlines()
    ]
    assert shares == pytest.approx([0.04, 0.08, 0.12], abs=0.005)


def test_the_time_of_an_evaluation_is_not_in_the_rates(tmp_path: Path) -> None:
    telemetry = Telemetry(tmp_path, 0, 10, 1)
    telemetry.since -= 10.0
    telemetry.record_side_task("eval", 0, {}, 9.0)
    telemetry.record(1, {}, 100, 0.0, 100)
    telemetry.close()
    entry = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert entry["images_s"] == pytest.approx(100, rel=0.05)
