"""Every way to run the step gives the same numbers."""

import shutil
from typing import Any

import numpy as np
import pytest
import torch

from cmtmae_scale.method.masking import choose_masks
from tests.backends import backend_case as case
from tests.processes import run_ranks
from tests.references.independent_loop import train

STEPS = 10


@pytest.fixture(scope="module")
def plain() -> Any:
    torch.set_num_threads(1)
    curve, parts = case.run_case("plain", 4, STEPS, {})
    return curve, case.assemble([parts])


def close(a: Any, b: Any, tolerance: float = 1e-5) -> None:
    (curve_a, whole_a), (curve_b, whole_b) = a, b
    np.testing.assert_allclose(
        np.array(curve_a)[:, :2], np.array(curve_b)[:, :2], rtol=tolerance, atol=1e-7
    )
    assert whole_a.keys() == whole_b.keys()
    for key, value in whole_a.items():
        np.testing.assert_allclose(
            case.trained(key, value),
            case.trained(key, whole_b[key]),
            rtol=0,
            atol=tolerance,
            err_msg=key,
        )


def test_plain_equals_an_independent_loop(plain: Any) -> None:
    config = case.make_config()
    model, average = case.make_models(config)

    def choose(attention: torch.Tensor, positions: list[int]) -> Any:
        return choose_masks(config.mask, attention, torch.tensor(positions), 0, 0.0)

    curve, weights, averages = train(
        model, average, case.make_views, choose, STEPS, case.GLOBAL, 2, case.ALPHA
    )
    np.testing.assert_allclose(np.array(plain[0])[:, :2], np.array(curve), rtol=1e-5)
    found = {f"model.{n}": v for n, v in weights.items()}
    found |= {f"momentum.{n}": v for n, v in averages.items()}
    for name, value in found.items():
        np.testing.assert_allclose(
            case.trained(name, plain[1][name]),
            case.trained(name, value.detach().numpy()),
            rtol=0,
            atol=1e-5,
            err_msg=name,
        )


def test_clipping_and_invalid_views_take_part(plain: Any) -> None:
    assert max(norm for _, norm, _ in plain[0]) > 0.3
    assert not all(case.make_views(list(range(8)))[3])


def test_plain_does_not_depend_on_the_micro_batch(plain: Any) -> None:
    curve, parts = case.run_case("plain", 2, STEPS, {})
    close(plain, (curve, case.assemble([parts])))


@pytest.mark.gloo
@pytest.mark.parametrize(
    ("world_size", "kind", "micro", "always"),
    [
        (1, "replicate", 4, False),
        (2, "full", 2, False),
        (2, "replicate", 4, False),
        (4, "node2", 1, True),  # reduces at every micro-step
        pytest.param(4, "node2", 1, False, marks=pytest.mark.slow),
        pytest.param(4, "full", 1, True, marks=pytest.mark.slow),
        pytest.param(4, "full", 2, False, marks=pytest.mark.slow),
    ],
)
def test_fsdp_equals_plain(
    plain: Any, world_size: int, kind: str, micro: int, always: bool
) -> None:
    changes = {"backend__reduce_every_micro_step": always}
    results = run_ranks(world_size, case.run_case, kind, micro, STEPS, changes)
    close(plain, (results[0][0], case.assemble([part for _, part in results])))


@pytest.mark.gloo
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_rank_has_the_bits_of_fsdp(precision: str) -> None:
    """One rank uses plain modules in place of FSDP2, with accumulation and clipping."""
    changes = {"backend__precision": precision}
    (sharded,) = run_ranks(1, case.run_case, "replicate", 4, STEPS, changes)
    (plain,) = run_ranks(1, case.run_case, "plain", 4, STEPS, changes)
    assert sharded[0] == plain[0] and sharded[1].keys() == plain[1].keys()
    for key, (_, shape, value) in sharded[1].items():
        assert shape == plain[1][key][1] and np.array_equal(value, plain[1][key][2]), key


@pytest.mark.gloo
@pytest.mark.parametrize("kind", ["full", "replicate", "node2"])
def test_updated_shards_are_those_that_the_forward_gathers(kind: str) -> None:
    """The lists of plain tensors are made once; FSDP2 must not replace their memory."""
    expected = case.run_overwritten("plain", 4)
    for losses, live, _ in run_ranks(2, case.run_overwritten, kind, 2):
        np.testing.assert_allclose(losses, expected[0], rtol=1e-5)
        for name, value in live.items():
            ours, theirs = case.trained(name, value), case.trained(name, expected[1][name])
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.gloo
def test_activation_checkpointing_changes_nothing(plain: Any) -> None:
    changes = {"backend__activation_checkpointing": True}
    results = run_ranks(2, case.run_case, "node2", 2, STEPS, changes)
    close(plain, (results[0][0], case.assemble([part for _, part in results])))


@pytest.mark.gloo
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs g++")
def test_compilation_changes_nothing(plain: Any) -> None:
    changes = {"backend__compile": True}
    results = run_ranks(2, case.run_case, "node2", 2, STEPS, changes, timeout_s=600)
    close(plain, (results[0][0], case.assemble([part for _, part in results])))


@pytest.mark.gloo
def test_bf16_stays_near_fp32(plain: Any) -> None:
    results = run_ranks(2, case.run_case, "replicate", 2, STEPS, {"backend__precision": "bf16"})
    loss, norm = np.array(results[0][0])[:, :2].T
    expected_loss, expected_norm = np.array(plain[0])[:, :2].T
    # 8 bits of mantissa; a mask that differs in a patch shifts the loss a little.
    np.testing.assert_allclose(loss, expected_loss, rtol=2e-2)
    np.testing.assert_allclose(norm, expected_norm, rtol=2e-1)
    whole = case.assemble([part for _, part in results])
    moved = np.abs(whole["momentum.cls_token"] - plain[1]["momentum.cls_token"]).max()
    assert moved < 5e-3


@pytest.mark.gloo
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_step_that_is_not_finite_changes_nothing(world_size: int) -> None:
    for before, after, bad, good in run_ranks(world_size, case.run_poisoned, "full", 2):
        assert bad[2] is False
        assert good[2] is True
        for key, (_, _, value) in before.items():
            assert np.array_equal(value, after[key][2]), key


@pytest.mark.gloo
@pytest.mark.parametrize("micro", [2, 4])
def test_loss_and_gradient_do_not_depend_on_the_split(micro: int) -> None:
    curve, parts = case.run_gradient(8)
    expected = case.assemble([parts])
    results = run_ranks(2, case.run_gradient, micro)
    np.testing.assert_allclose(results[0][0][0][0], curve[0][0], rtol=1e-6)
    for key, value in case.assemble([part for _, part in results]).items():
        np.testing.assert_allclose(value, expected[key], rtol=0, atol=1e-6, err_msg=key)
