"""Running statistics of the targets in whole runs: splits, resumes, skipped steps, backends."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from cmtmae_scale.checkpoint import layout
from cmtmae_scale.errors import CheckpointError
from cmtmae_scale.pretraining.channels import DECAY, KEY, RunningChannels, TargetChannels
from tests.engine.fault_case import run_changed
from tests.engine.run_case import STEPS, read_losses, run, same, write_recipe
from tests.processes import run_ranks

pytestmark = pytest.mark.gloo
CHANNEL = ["target.teacher.norm=channel", "target.student.norm=center", "train.steps=6"]
TOKENS = 8 * 16
"""Patches of a step."""


def run_cases(recipe: Path, cases: dict[str, list[list[str]]]) -> None:
    """The launches of several runs, one after the other in the same processes."""
    for name, launches in cases.items():
        for overrides in launches:
            folder = f"run.output_dir={recipe.parent / name}"
            run(recipe, [folder, *CHANNEL, *overrides])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run with one rank, in two launches, and by other splits of the batch."""
    recipe = write_recipe(tmp_path_factory.mktemp("channels"))
    one = {
        "one": [[]],
        "resumed": [["train.stop_after=3"], []],
        "whole": [["train.micro_batch_size=8"]],
    }
    run_ranks(1, run_cases, recipe, one)
    run_ranks(2, run_cases, recipe, {"two": [[]]})
    return recipe.parent


def statistics(run_dir: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Statistics of the newest checkpoint by target and kind."""
    newest = layout.list_checkpoints(run_dir / "checkpoints")[0]
    return {
        target: {kind: torch.tensor(values, dtype=torch.float64) for kind, values in one.items()}
        for target, one in layout.read_state(newest)[KEY].items()
    }


@pytest.mark.parametrize("other", ["whole", "two"])
def test_the_split_over_ranks_and_micro_steps_changes_roundings_alone(
    folder: Path, other: str
) -> None:
    assert read_losses(folder / other) == pytest.approx(read_losses(folder / "one"), rel=1e-5)
    base = statistics(folder / "one")
    assert set(base) == {"teacher", "student"}
    for target, found in statistics(folder / other).items():
        std = base[target]["variance"].sqrt()
        assert torch.equal(found["num_tokens"], base[target]["num_tokens"])
        assert ((found["mean"] - base[target]["mean"]).abs() / std).max() < 1e-5
        assert torch.allclose(found["variance"], base[target]["variance"], rtol=1e-5)


def test_a_resumed_run_has_the_bits_of_the_undisturbed_run(folder: Path) -> None:
    same(folder / "one", folder / "resumed")
    one, resumed = (statistics(folder / name) for name in ("one", "resumed"))
    for target, kinds in one.items():
        assert all(torch.equal(kinds[kind], resumed[target][kind]) for kind in kinds)


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ([], "is not a JSON object"),
        ({"teacher": 3}, "target_channels.teacher cannot be read"),
        (
            {"teacher": {"num_tokens": [[1.0]], "mean": [[0.0, "a"]], "variance": []}},
            "cannot be read",
        ),
        ({"teacher": {"num_tokens": [[1.0]]}}, "cannot be read"),
        (
            {"teacher": {"num_tokens": [[1.0]], "mean": [[0.0]], "variance": [[1.0, 2.0]]}},
            "mean must be finite numbers of shape (1, 2), found shape (1, 1)",
        ),
        (
            {
                "teacher": {
                    "num_tokens": [[1.0]],
                    "mean": [[0.0, float("nan")]],
                    "variance": [[1.0, 2.0]],
                }
            },
            "mean must be finite numbers",
        ),
    ],
)
def test_statistics_that_cannot_be_used_are_refused(state: Any, expected: str) -> None:
    channels = TargetChannels({"teacher": RunningChannels(True, 1, 2, torch.device("cpu"))}.items())
    with pytest.raises(CheckpointError) as refused:
        channels.restore({KEY: state})
    assert expected in str(refused.value) and "copy the checkpoint again" in str(refused.value)
    channels.restore({})  # a checkpoint of another norm: they begin anew
    assert not channels.scalings["teacher"].factor.any()


def test_before_the_first_step_a_channel_target_is_zero_and_gives_no_gradient(folder: Path) -> None:
    first = json.loads((folder / "one" / "log.jsonl").read_text().splitlines()[0])
    assert first["loss/teacher"] == 2.0
    assert first["loss/student"] != 2.0  # center subtracts nothing yet


def run_with_faults(recipe: Path, overrides: list[str], change: dict[int, float]) -> Any:
    return run_changed(recipe, [*CHANNEL, *overrides], change, 0)["progress"]


def test_skipped_and_rolled_back_steps_are_not_in_the_statistics(tmp_path: Path) -> None:
    nan = float("nan")
    overrides = ["guard.skip_limit=2", "checkpoint.every=1"]
    change = {3: nan, 5: nan, 6: nan}
    ((progress),) = run_ranks(1, run_with_faults, write_recipe(tmp_path), overrides, change)
    assert (progress["step"], progress["position0"]) == (STEPS, 48)  # rolled back to step 4
    applied = sum(DECAY**age for age in range(progress["applied"]))
    for one in statistics(tmp_path / "run").values():
        assert one["num_tokens"].flatten().tolist() == pytest.approx(
            [8 * applied, TOKENS * applied]
        )


@pytest.mark.slow
@pytest.mark.deepspeed
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.parametrize("stage", [1, 3])
def test_deepspeed_gives_the_statistics_of_one_rank(folder: Path, stage: int) -> None:
    settings = ["backend.name=deepspeed", f"backend.zero_stage={stage}"]
    run_ranks(2, run_cases, folder / "recipe.yaml", {f"zero{stage}": [settings]})
    assert read_losses(folder / f"zero{stage}") == pytest.approx(
        read_losses(folder / "one"), rel=1e-4
    )
    base = statistics(folder / "one")
    for target, found in statistics(folder / f"zero{stage}").items():
        assert torch.allclose(found["mean"], base[target]["mean"], rtol=1e-3, atol=1e-4)
