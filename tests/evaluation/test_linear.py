"""Linear probes: scikit-learn's optimum, plain SGD, a choice that never sees the test set."""

from typing import Any

import numpy as np
import pytest
import torch

from cmtmae_scale.errors import ConfigError
from cmtmae_scale.evaluation import linear
from cmtmae_scale.evaluation.features import fit_standardiser
from cmtmae_scale.evaluation.images import stratified_sample
from cmtmae_scale.evaluation.linear import SETTINGS, linear_probe
from cmtmae_scale.evaluation.logistic import fit_logistic, logistic_score
from dataloading.order import sample_ids
from tests.evaluation.evaluation_case import CLASSES, COLUMN, clusters, table_of
from tests.processes import run_ranks

TRAIN, TEST = clusters(210, 0), clusters(70, 1)


def standardised() -> tuple[np.ndarray, np.ndarray]:
    """Both sets with the training set's statistics, float64, written out."""
    rows = TRAIN[0].astype(np.float64)
    mean = rows.mean(0)
    std = np.sqrt(((rows - mean) ** 2).mean(0) + 1e-6)
    return (rows - mean) / std, (TEST[0].astype(np.float64) - mean) / std


# The oldest scikit-learn calls SciPy in a way that a newer SciPy warns of.
@pytest.mark.filterwarnings("ignore:scipy.optimize:DeprecationWarning")
@pytest.mark.parametrize("strength", [0.01, 1.0])
def test_logistic_regression_reaches_scikit_learns_optimum(strength: float) -> None:
    models = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
    train, test = standardised()
    theirs = models.LogisticRegression(C=strength, tol=1e-10, max_iter=5000).fit(train, TRAIN[1])
    ours = fit_logistic(
        torch.tensor(train), torch.tensor(TRAIN[1]), CLASSES, strength, iterations=1000
    )
    # Both minimise the same strictly convex function; left is how far each goes.
    np.testing.assert_allclose(ours.weight.T.numpy(), theirs.coef_, atol=2e-5)
    logits = ours(torch.tensor(test)).numpy()
    expected = theirs.decision_function(test)
    centred = logits - logits.mean(1, keepdims=True)
    np.testing.assert_allclose(centred, expected - expected.mean(1, keepdims=True), atol=1e-4)
    if strength == 1.0:
        score = logistic_score(table_of(*TRAIN), table_of(*TEST), COLUMN, CLASSES)
        assert score.correct == (theirs.predict(test) == TEST[1]).sum()
        assert 0.4 < score.correct / score.total < 0.95


def test_the_statistics_are_those_of_the_training_rows() -> None:
    standard = fit_standardiser(torch.tensor(TRAIN[0]))
    np.testing.assert_allclose(
        standard(torch.tensor(TEST[0])).numpy(), standardised()[1], atol=1e-9
    )


def plain_sgd(base_lr: float, decay: float, epochs: int, seed: int) -> tuple[Any, Any]:
    """One head by torch's SGD and autograd, float64; its held-out and test predictions."""
    learnt = stratified_sample(TRAIN[1], 0.9, seed)
    rows = TRAIN[0].astype(np.float64)
    mean, variance = rows[learnt].mean(0), rows[learnt].var(0)
    known, test = ((x - mean) / np.sqrt(variance + 1e-6) for x in (rows, TEST[0].astype(float)))
    inputs, labels = torch.tensor(known[learnt]), torch.tensor(TRAIN[1][learnt])
    layer = torch.nn.Linear(inputs.shape[1], CLASSES).double()
    for parameter in layer.parameters():
        torch.nn.init.zeros_(parameter)
    batch = min(linear.BATCH, len(labels))
    steps = -(-epochs * len(labels) // batch)
    groups = [{"params": [layer.weight], "weight_decay": decay}, {"params": [layer.bias]}]
    optimizer = torch.optim.SGD(groups, lr=base_lr, momentum=0.9)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = base_lr * batch / 256 * (1 + np.cos(np.pi * step / steps)) / 2
        ids, _ = sample_ids(len(labels), seed, np.arange(step * batch, (step + 1) * batch))
        loss = torch.nn.functional.cross_entropy(layer(inputs[ids]), labels[ids])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return tuple(layer(torch.tensor(x)).argmax(1).numpy() for x in (known[~learnt], test))


def probe(labels: np.ndarray | None = None) -> Any:
    """The probe on the made-up sets in batches that do not divide."""
    before, linear.BATCH = linear.BATCH, 50
    try:
        test = table_of(TEST[0], TEST[1] if labels is None else labels)
        found = linear_probe(table_of(*TRAIN), test, COLUMN, CLASSES, 10, 0.1, 3)
    finally:
        linear.BATCH = before
    return tuple(found.score), tuple(found.setting), found.held_out, tuple(found.hits.tolist())


def test_every_head_is_plain_sgd_and_the_best_on_held_out_rows_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (correct, _, total), setting, held_out, hits = probe()
    monkeypatch.setattr(linear, "BATCH", 50)
    truth = TRAIN[1][~stratified_sample(TRAIN[1], 0.9, 3)]
    held, tested = plain_sgd(*setting, epochs=10, seed=3)
    assert held_out == (held == truth).mean()
    # float32 against float64 may turn one image at a border
    assert abs(correct - (tested == TEST[1]).sum()) <= 1 and total == 70
    assert sum(hits) == correct and (np.array(hits) != (tested == TEST[1])).sum() <= 1
    others = [plain_sgd(*one, epochs=10, seed=3)[0] for one in SETTINGS]
    assert held_out >= max((other == truth).mean() for other in others) - 1e-9


def test_the_choice_does_not_see_the_test_set() -> None:
    _, setting, held_out, _ = probe()
    other = probe(np.roll(TEST[1], 1))
    assert other[1:3] == (setting, held_out)
    assert other[0] != probe()[0]


def both_probes() -> Any:
    score = logistic_score(table_of(*TRAIN), table_of(*TEST), COLUMN, CLASSES)
    return probe(), tuple(score)


@pytest.mark.gloo
def test_probes_do_not_depend_on_the_number_of_ranks() -> None:
    expected = both_probes()
    for size in (2, 3):
        assert run_ranks(size, both_probes) == [expected] * size


def test_a_learning_rate_that_is_too_large_loses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "SETTINGS", (linear.Setting(1e30, 0.0), linear.Setting(0.1, 0.0)))
    assert probe()[1] == (0.1, 0.0)


def test_classes_of_one_image_leave_nothing_to_choose_on() -> None:
    train = table_of(TRAIN[0][:CLASSES], TRAIN[1][:CLASSES])
    with pytest.raises(ConfigError, match="no class has two training images"):
        linear_probe(train, table_of(*TEST), COLUMN, CLASSES, 1, 0.1, 0)
