"""Features that are not finite are refused, and no scorer counts what is not finite as a hit."""

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from cmtmae_scale.backends.base import Fragment
from cmtmae_scale.commands.evaluate import parse_options
from cmtmae_scale.config.finetune import Finetune
from cmtmae_scale.config.schema import Student as StudentConfig
from cmtmae_scale.evaluation import frozen
from cmtmae_scale.evaluation.encoders import Encoder
from cmtmae_scale.evaluation.images import open_pair
from cmtmae_scale.evaluation.knn import Neighbours, count_votes, knn_scores
from cmtmae_scale.evaluation.linear import linear_probe
from cmtmae_scale.evaluation.logistic import logistic_score
from cmtmae_scale.evaluation.result import TOP, rank_of_truth, score_predictions
from cmtmae_scale.evaluation.subject import Subject
from cmtmae_scale.finetuning.accuracy import Accuracy
from cmtmae_scale.finetuning.classifier import build_classifier
from cmtmae_scale.method.images import IMAGENET_MEAN, IMAGENET_STD
from dataloading.errors import DataError
from tests.evaluation.evaluation_case import (
    CLASSES,
    COLUMN,
    clusters,
    labelled_photographs,
    table_of,
    world,
)
from tests.processes import run_ranks

SCORERS: dict[str, Callable[[Any, Any], Any]] = {
    "knn": lambda train, test: list(knn_scores(train, test, COLUMN)),
    "logistic": lambda train, test: logistic_score(train, test, COLUMN, CLASSES),
    "linear": lambda train, test: linear_probe(train, test, COLUMN, CLASSES, 1, 0.2, 0),
}


def score_with(scorer: str, in_train: dict[int, float], in_test: dict[int, float]) -> str:
    """Score made-up features with some values replaced; returns the error."""
    tables = []
    for (rows, labels), change in zip(
        (clusters(80, 0), clusters(40, 1)), (in_train, in_test), strict=True
    ):
        for number, value in change.items():
            rows[number, number % rows.shape[1]] = value
        tables.append(table_of(rows, labels))
    with pytest.raises(DataError) as caught:
        SCORERS[scorer](*tables)
    return str(caught.value)


@pytest.mark.parametrize("scorer", SCORERS)
def test_no_scorer_takes_features_that_are_not_finite(scorer: str) -> None:
    everything = dict.fromkeys(range(80), math.nan), dict.fromkeys(range(40), math.nan)
    text = score_with(scorer, *everything)
    assert text.startswith("the features of made up (patches) are not finite for 80 of 80 training")
    assert "and 40 of 40 test images (first: image 0)" in text
    text = score_with(scorer, {}, {7: math.inf, 3: -math.inf})
    assert "not finite for 2 of 40 test images (first: image 3):" in text
    assert "training images" not in text


@pytest.mark.gloo
def test_all_ranks_refuse_what_one_of_them_holds() -> None:
    """Row 5 is of the second rank."""
    texts = run_ranks(2, score_with, "knn", {5: math.nan}, {})
    assert texts[0] == texts[1] and "1 of 80 training images (first: image 5)" in texts[0]


@pytest.mark.parametrize("num_classes", [3, 9])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_no_hit(bad: float, num_classes: int) -> None:
    values = torch.full((num_classes, num_classes), bad)
    assert score_predictions(values, torch.arange(num_classes)) == (0, 0, num_classes)
    values = torch.zeros(2, num_classes)
    values[0, 1] = bad  # the true class of the first row
    values[1, 1] = bad  # another class than the second row's
    first, second = rank_of_truth(values, torch.tensor([1, 0])).tolist()
    assert first >= TOP
    assert second == 0 if bad == -math.inf else second >= TOP  # a class without a vote is none


def test_votes_at_a_small_temperature_stay_finite() -> None:
    """exp(1 / 0.001) is infinite: classes with any near neighbour would tie, and the first win."""
    near = Neighbours(
        torch.tensor([[0.99, 0.95, 0.94], [-0.80, -0.81, -0.99]]),
        torch.arange(3).expand(2, 3),
        torch.tensor([[2, 0, 1], [1, 0, 2]]),
    )
    for temperature in (0.07, 0.001, 1e-4):
        votes = count_votes(near, 3, 4, temperature)
        assert votes.argmax(1).tolist() == [2, 1]
        assert votes[:, :3].isfinite().all() and (votes[:, 3] == -math.inf).all()


def test_the_command_names_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def encode(images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"patches": torch.full((len(images), 4), math.nan)}

    facts = {"checkpoint": "runs/a/checkpoints/step-00000004", "step": 4}
    subject = Subject(Encoder("momentum, step 4", 64, encode), None, facts)
    monkeypatch.setattr(frozen, "open_subject", lambda *_: subject)
    sets = [str(labelled_photographs(tmp_path / name, 6, 0)) for name in ("train", "test")]
    options = ["knn", "--checkpoint", "runs/a", "--no-baselines", "--decode", "torch"]
    options += ["--train", sets[0], "--test", sets[1], "--k", "3"]
    found = r"^runs/a/checkpoints/step-00000004: the features of momentum, step 4 \(patches\) are "
    with pytest.raises(DataError, match=found):
        frozen.evaluate_frozen(parse_options(options), world(), torch.device("cpu"))


def test_logits_of_fine_tuned_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    sets = open_pair(
        str(labelled_photographs(tmp_path / "train", 6, 0)),
        str(labelled_photographs(tmp_path / "test", 7, 1)),
        tmp_path,
    )
    classifier = build_classifier(StudentConfig("test_vit", 16), 64, classes=3, pool="mean")
    weights = {f"model.{name}": one.clone() for name, one in classifier.state_dict().items()}
    encoder: Any = SimpleNamespace(mean=IMAGENET_MEAN, std=IMAGENET_STD, size=64)
    accuracy = Accuracy(classifier, encoder, sets.test, Finetune(), world(), torch.device("cpu"))

    def measure(value: float) -> Any:
        state = {name: one.clone() for name, one in weights.items()}
        state["model.encoder.head.weight"][:] = value
        fragments = {
            name: Fragment(0, tuple(one.shape), one.flatten(), True) for name, one in state.items()
        }
        return accuracy(SimpleNamespace(fragments=lambda: fragments))  # type: ignore[arg-type]

    score, _ = measure(0.5)
    assert score.total == 7 and np.isfinite(score).all()
    with pytest.raises(DataError, match=r"logits of the fine-tuned weights \(\w{12}\) are not fin"):
        measure(math.nan)
