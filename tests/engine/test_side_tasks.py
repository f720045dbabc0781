"""Failures beside the training neither end the run nor change a bit of its weights."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from cmtmae_scale.engine.stop import LaunchInterrupted
from cmtmae_scale.evaluation.images import open_pair, require_decodable
from dataloading.errors import DataError
from tests.engine.fault_case import incidents
from tests.engine.run_case import STEPS, run, same, write_recipe
from tests.engine.side_case import interrupted_by, run_quiet_and_failing, saved_at_each_side_task
from tests.evaluation.evaluation_case import labelled_photographs
from tests.processes import run_ranks

pytestmark = pytest.mark.gloo
ZERO = "backend.name=deepspeed"
DEEPSPEED = (
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
    pytest.mark.deepspeed,
)


@pytest.mark.parametrize(
    "backend",
    [
        [],
        pytest.param([ZERO, "backend.zero_stage=1", "backend.precision=bf16"], marks=DEEPSPEED),
        *(
            pytest.param(
                [ZERO, f"backend.zero_stage={stage}"], marks=(*DEEPSPEED, pytest.mark.slow)
            )
            for stage in (1, 2, 3)
        ),
    ],
    ids=lambda backend: "-".join(one.partition("=")[2] for one in backend) or "fsdp",
)
def test_a_failing_side_task_is_an_incident_and_the_weights_keep_their_bits(
    backend: list[str], tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path)
    quiet, failing, last = tmp_path / "quiet", tmp_path / "failing", 3
    first, second = run_ranks(2, run_quiet_and_failing, recipe, quiet, failing, last, backend)
    same(quiet, failing, last)
    found = [(entry["step"], entry["why"]) for entry in incidents(failing)]
    reasons = [
        "ZeroDivisionError: on all (on ranks 0, 1)",
        "ValueError: on the first (on ranks 0)",
        "MemoryError: on the second (on ranks 1)",
        "RuntimeError: between backward and step (on ranks 0, 1)",
    ]
    assert found == [(step, why) for step in range(1, last + 1) for why in reasons]
    assert {entry["incident"] for entry in incidents(failing)} == {"no figures"}
    assert f"step {last}: no figures: MemoryError: on the second (on ranks 1)" in first
    assert f"step {last}: no figures: MemoryError: on the second" in second


@pytest.mark.parametrize(
    "requests",
    [[LaunchInterrupted], pytest.param([KeyboardInterrupt, SystemExit], marks=pytest.mark.slow)],
)
def test_a_request_passes_a_side_task(tmp_path: Path, requests: list[type[BaseException]]) -> None:
    (found,) = run_ranks(1, interrupted_by, write_recipe(tmp_path), requests)
    assert found == [request.__name__ for request in requests]


@pytest.mark.parametrize(
    ("interval", "expected"),
    [(4, [0, 0, 0, 4, 4, STEPS]), pytest.param(2, [0, 2, 2, 4, 4, STEPS], marks=pytest.mark.slow)],
)
def test_a_step_is_saved_before_its_side_tasks(
    tmp_path: Path, interval: int, expected: list[int]
) -> None:
    (found,) = run_ranks(1, saved_at_each_side_task, write_recipe(tmp_path), interval)
    assert found == expected  # the last step is saved first, whatever the interval


@pytest.mark.slow
def test_undecodable_images_lower_k_and_end_nothing(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    train = labelled_photographs(tmp_path / "train", 20, 0, 2)
    test = labelled_photographs(tmp_path / "test", 6, 1, 2)
    for name in ("class0/000.jpg", "class1/001.jpg"):
        (train / name).write_bytes((train / name).read_bytes()[:700])
    overrides = ["eval.every=3", f"eval.train_path={train}", f"eval.test_path={test}"]
    (lines,) = run_ranks(1, run_with_lines, recipe, overrides)
    told = [line for line in lines if "k-NN" in line]
    assert told == [
        "k-NN with k=20: there are only 18 training images that can be decoded; k=18 is used"
    ]
    text = (tmp_path / "run" / "log.jsonl").read_text()
    found = [json.loads(line) for line in text.splitlines() if "eval/knn20" in line]
    assert [entry["step"] for entry in found] == [3, STEPS]
    assert incidents(tmp_path / "run") == []


def run_with_lines(recipe: Path, overrides: list[str]) -> list[str]:
    from tests.checkpoint.save_case import Lines

    log = Lines()
    assert run(recipe, overrides) is None
    return log.lines


@pytest.mark.parametrize("kind", ["cut", "unread"])
def test_a_set_without_a_decodable_image_is_refused(tmp_path: Path, kind: str) -> None:
    folder = labelled_photographs(tmp_path / "images", 3, 0, 2)
    images = open_pair(str(folder), str(folder)).train
    require_decodable(images, "eval.train_path=X")
    paths = sorted(folder.rglob("*.jpg"))
    for path in paths[:2]:
        path.write_bytes(path.read_bytes()[:700])
    images = open_pair(str(folder), str(folder)).train
    require_decodable(images, "eval.train_path=X")  # one is left
    if kind == "cut":
        paths[2].write_bytes(paths[2].read_bytes()[:700])
        images = open_pair(str(folder), str(folder)).train
    else:
        paths[2].unlink()
    message = r"eval.train_path=X: none of 3 images can be decoded \(class0/000.jpg: "
    with pytest.raises(DataError, match=message) as refused:
        require_decodable(images, "eval.train_path=X")
    assert refused.value.exit_code == {"cut": 78, "unread": 75}[kind]


@pytest.mark.slow
def test_a_run_with_such_a_set_is_refused_before_the_first_step(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    good = labelled_photographs(tmp_path / "good", 3, 0, 2)
    bad = labelled_photographs(tmp_path / "bad", 3, 0, 2)
    for path in bad.rglob("*.jpg"):
        path.write_bytes(path.read_bytes()[:700])
    overrides = ["eval.every=3", f"eval.train_path={good}", f"eval.test_path={bad}"]
    message = "DataError: eval.test_path=.*bad: none of 3 images can be decoded"
    with pytest.raises(AssertionError, match=message):
        run_ranks(2, run, recipe, overrides)
    assert not (tmp_path / "run" / "log.jsonl").exists()
