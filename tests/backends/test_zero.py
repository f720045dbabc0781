"""ZeRO gives the plain loop's numbers at every stage, and can be read and written from outside."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cmtmae_scale.config.deepspeed import deepspeed_config
from cmtmae_scale.config.load import load_config
from cmtmae_scale.errors import ConfigError
from tests.backends import backend_case as case
from tests.processes import run_ranks

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
pytestmark = [pytest.mark.gloo, pytest.mark.deepspeed]

STEPS = 10
STAGES = ("zero1", "zero2", "zero3", "zero3gathered")
RECIPE = Path(__file__).parents[2] / "configs" / "vit_huge.yaml"


def slow(*values: Any) -> Any:
    """A case for ``make test-all``: a similar case runs in ``make test``."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def plain() -> Any:
    torch.set_num_threads(1)
    curve, parts = case.run_case("plain", 4, STEPS, {})
    return curve, case.assemble([parts])


def run(world_size: int, kind: str, micro: int, changes: dict[str, Any]) -> Any:
    results = run_ranks(world_size, case.run_case, kind, micro, STEPS, changes)
    return results[0][0], case.assemble([part for _, part in results])


def close(a: Any, b: Any) -> None:
    """The prototype reached 1e-7; weights differ by the order of sums, AdamW divides by them."""
    np.testing.assert_allclose(np.array(a[0])[:, :2], np.array(b[0])[:, :2], rtol=1e-5, atol=1e-7)
    assert a[1].keys() == b[1].keys()
    for key, value in a[1].items():
        ours, theirs = case.trained(key, value), case.trained(key, b[1][key])
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5, err_msg=key)


@pytest.mark.parametrize(
    "kind", ["zero1", *map(slow, (*STAGES[1:], "zero2offloaded", "zero3offloaded"))]
)
def test_two_ranks_equal_plain(plain: Any, kind: str) -> None:
    close(plain, run(2, kind, 2, {}))


@pytest.mark.parametrize(
    ("world_size", "kind", "micro"),
    [
        slow(1, "zero3", 2),
        slow(4, "zero1", 1),
        (4, "zero3gathered", 1),
        slow(1, "zero1", 4),
        slow(4, "zero2", 2),
    ],
)
def test_one_and_four_ranks_equal_plain(plain: Any, world_size: int, kind: str, micro: int) -> None:
    close(plain, run(world_size, kind, micro, {}))


@pytest.mark.parametrize("kind", [slow("zero1"), slow("zero3gathered")])
def test_activation_checkpointing_changes_nothing(plain: Any, kind: str) -> None:
    close(plain, run(2, kind, 2, {"backend__activation_checkpointing": True}))


def test_no_clipping_is_no_clipping() -> None:
    changes = {"optimizer__clip": None}
    curve, parts = case.run_case("plain", 4, STEPS, changes)
    close((curve, case.assemble([parts])), run(2, "zero2", 2, changes))


@pytest.mark.parametrize("kind", ["zero1", slow("zero2"), slow("zero3"), slow("zero3gathered")])
def test_bf16_stays_near_fp32(plain: Any, kind: str) -> None:
    curve, whole = run(2, kind, 2, {"backend__precision": "bf16"})
    loss, norm = np.array(curve)[:, :2].T
    expected_loss, expected_norm = np.array(plain[0])[:, :2].T
    # 8 bits of mantissa; a mask that differs in a patch shifts the loss a little.
    np.testing.assert_allclose(loss, expected_loss, rtol=2e-2)
    np.testing.assert_allclose(norm, expected_norm, rtol=2e-1)
    key = "momentum.cls_token"
    assert np.abs(whole[key] - plain[1][key]).max() < 5e-3


@pytest.mark.parametrize("kind", ["zero1", "zero2", "zero3"])
def test_bf16_starts_from_float32_values_and_averages_in_float32(kind: str) -> None:
    config = case.make_config()
    model, _ = case.make_models(config)
    results = run_ranks(2, case.run_average, kind, 0.9999)
    before, after = (case.assemble([result[i] for result in results]) for i in (0, 1))
    for name, parameter in model.named_parameters():
        assert np.array_equal(before[f"model.{name}"], parameter.detach().numpy()), name
    key = "encoder.blocks.0.mlp.fc1.weight"
    moved = after[f"momentum.{key.removeprefix('encoder.')}"]
    start, end = before[f"model.{key}"], after[f"model.{key}"]
    expected = start.astype(np.float64) + 1e-4 * (end.astype(np.float64) - start)
    assert not np.array_equal(moved, start)
    np.testing.assert_allclose(moved, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    ("kind", "precision"),
    [("zero1", "bf16"), slow("zero3", "fp32"), slow("zero1", "fp32"), slow("zero3", "bf16")]
    + [slow("zero2", precision) for precision in ("fp32", "bf16")],
)
def test_a_step_that_is_not_finite_changes_nothing(kind: str, precision: str) -> None:
    changes = {"backend__precision": precision}
    for before, after, outcomes in run_ranks(2, case.run_refusals, kind, 2, changes):
        for key, (_, _, value) in before.items():
            assert np.array_equal(value, after[key][2]), key
        nan_view, infinite_gradient, refused_report, good = outcomes
        assert [nan_view[2], infinite_gradient[2], refused_report[2]] == [False] * 3
        assert good[2] is True and good[1] < 1e3


@pytest.mark.parametrize(
    "kind", ["zero1", "zero3", *map(slow, ("zero2", "zero3gathered", "zero2offloaded"))]
)
def test_what_is_written_from_outside_is_what_computes(kind: str) -> None:
    """Other weights, positions and averages are loaded: the next losses are those of a plain run
    that holds them, and what is saved is what the forward uses."""
    expected = case.run_overwritten("plain", 4)
    for losses, live, saved in run_ranks(2, case.run_overwritten, kind, 2):
        np.testing.assert_allclose(losses, expected[0], rtol=1e-5)
        for name, value in live.items():
            ours, theirs = case.trained(name, value), case.trained(name, expected[1][name])
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5, err_msg=name)
        assert saved is None or np.array_equal(saved, live["encoder.cls_token"])


def test_further_keys_reach_deepspeed() -> None:
    assert run_ranks(1, case.read_bucket_size) == [12345]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "train_batch_size=8",
            "train_batch_size follows from the recipe; set train.global_batch_size",
        ),
        (
            "gradient_clipping=1",
            "gradient_clipping follows from the recipe; set optimizer.grad_clip",
        ),
        ("bf16.enabled=true", "bf16 follows from the recipe; set backend.precision"),
        ("optimizer.type=Adam", "optimizer follows from the recipe; set the group optimizer"),
        ("zero_optimization.stage=3", "stage follows from the recipe; set backend.zero_stage"),
        ("zero_optimization.round_robin_gradients=true", "refused: it partitions weights"),
        ("zero_optimization.offload_param.device=cpu", "offload_param is refused"),
        ("zero_optimization.offload_optimizer.device=nvme", "device must be cpu"),
        ("zero_optimization=3", "zero_optimization=3 is a group"),
    ],
)
def test_keys_of_the_recipe_are_refused_by_name(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(RECIPE, [f"backend.deepspeed.{override}"])


def test_a_json_file_is_merged_and_checked(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"overlap_comm": True}}))
    tree = deepspeed_config(load_config(RECIPE, [f"backend.deepspeed={file}"]), 4)
    assert tree["zero_optimization"] == {"overlap_comm": True, "stage": 1}
    assert tree["gradient_accumulation_steps"] == 4 and tree["gradient_clipping"] == 1.0
    file.write_text('{"fp16": {"enabled": true}}')
    with pytest.raises(ConfigError, match=r"fp16 follows from the recipe"):
        load_config(RECIPE, [f"backend.deepspeed={file}"])
    file.write_text("{")
    with pytest.raises(ConfigError, match=r"ds.json: is not JSON"):
        load_config(RECIPE, [f"backend.deepspeed={file}"])
    with pytest.raises(ConfigError, match=r"absent.json: cannot be read"):
        load_config(RECIPE, ["backend.deepspeed=absent.json"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["backend.zero_stage=0"], r"set backend.name=fsdp backend.sharding=replicate"),
        (["backend.zero_stage=3", "backend.compile=true"], r"ZeRO-3 .* set backend.compile=false"),
        (["backend.name=fsdp", "backend.deepspeed.wall_clock_breakdown=true"], r"belongs to"),
    ],
)
def test_what_zero_cannot_do_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(RECIPE, overrides)


def test_another_version_of_deepspeed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from cmtmae_scale.backends import deepspeed as zero

    monkeypatch.setattr(zero.deepspeed, "__version__", "0.99.1")
    with pytest.raises(ConfigError, match=r"DeepSpeed 0.99.1 is installed"):
        zero.check_version()
