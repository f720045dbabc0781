"""The collectives that a step issues are those of the formulas, at any number of ranks."""

import logging

import pytest

from cmtmae_scale.backends.traffic import Traffic, fsdp_traffic, warn_of_latency, zero_traffic
from cmtmae_scale.config.load import load_config
from cmtmae_scale.tools.benchmark.collectives import (
    REPORT,
    Counted,
    collectives_table,
    count_collectives,
)
from cmtmae_scale.tools.estimate import build_meta_networks
from tests.engine.run_case import write_recipe
from tests.tools.benchmark.zero_case import count_zero, run_alone

SLOW = pytest.mark.slow
CASES = [
    ("hybrid", [64]),
    ("full", [8]),
    pytest.param("replicate", [8, 64, 512, 2048], marks=SLOW),
    pytest.param("hybrid", [8, 512, 2048], marks=SLOW),
    pytest.param("full", [64, 512, 2048], marks=SLOW),  # 2,048 fake pieces of each parameter
]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_recipe(tmp_path_factory.mktemp("case")))


@pytest.mark.parametrize(("sharding", "sizes"), CASES)
def test_counted_collectives_equal_the_formulas(
    recipe: str, sharding: str, sizes: list[int]
) -> None:
    config = load_config(recipe, [f"backend.sharding={sharding}", "backend.precision=bf16"])
    model, momentum, _ = build_meta_networks(config)
    assert momentum is not None
    momentum.requires_grad_(False)
    for ranks in sizes:
        expected = fsdp_traffic(config, model, momentum, ranks, 8)
        report = Traffic("all-reduce", ranks, 1, 4 * (REPORT + 1))
        counted = count_collectives(config, ranks)
        assert sum_by_group([*expected, report]) == sum_by_group(counted), ranks


@pytest.mark.slow
@pytest.mark.deepspeed
def test_counted_collectives_of_zero_equal_the_formulas(recipe: str) -> None:
    changes = ["backend.name=deepspeed", "backend.precision=bf16"]
    cases = [(1, 8), (1, 64), (2, 64), (3, 64)]
    for (stage, ranks), counted in zip(
        cases, run_alone(count_zero, recipe, changes, cases), strict=True
    ):
        config = load_config(recipe, [*changes, f"backend.zero_stage={stage}"])
        model, momentum, _ = build_meta_networks(config)
        by_kind = {one.kind: 0 for one in counted}
        for one in counted:
            by_kind[one.kind] += one.payload
        for one in zero_traffic(config, model, momentum, ranks):
            by_kind[one.kind] -= one.payload
        assert by_kind["all-gather"] == 0 and by_kind.get("reduce-scatter", 0) == 0
        report = by_kind["all-reduce"] - 4 * REPORT
        assert 0 <= report <= 32  # norm and flags


def sum_by_group(traffic: list[Traffic]) -> dict[tuple[str, int], tuple[int, int]]:
    found: dict[tuple[str, int], tuple[int, int]] = {}
    for one in traffic:
        calls, payload = found.get(one[:2], (0, 0))
        found[one[:2]] = (calls + one.calls, payload + one.payload)
    return found


def test_full_sharding_over_many_ranks_is_warned_about_with_the_figure(
    recipe: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = load_config(recipe, ["backend.sharding=full"])
    model, momentum, _ = build_meta_networks(config)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        warn_of_latency(config, model, momentum, 64)
        assert not caplog.messages
        warn_of_latency(config, model, momentum, 512)
    (line,) = caplog.messages
    calls = sum(one.calls for one in fsdp_traffic(config, model, momentum, 512, 8))
    assert f"{calls} collectives over all of them" in line
    assert f"{calls * 511 * 3e-3:.0f} ms per micro-step at 3 us per hop (modelled)" in line


def test_the_table_names_calls_and_bytes() -> None:
    traffic = [Traffic("all-gather", 8, 3, 8 * 10**9), Traffic("all-reduce", 64, 1, 64 * 10**6)]
    *_, row = collectives_table([Counted("sharding=hybrid", 512, traffic)]).splitlines()
    assert row == (
        "| sharding=hybrid | 512 | 3, 8 GB | 1, 0.064 GB | 7.13 GB | 0.4 ms |"
    )  # 7/8 of 8 GB and 2 x 63/64 of 0.064 GB; 3 x 7 and 2 x 63 hops
