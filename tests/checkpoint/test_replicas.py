"""A bit that differs between replicas is named, and never saved."""

from pathlib import Path

import pytest

from cmtmae_scale.checkpoint import layout
from tests.checkpoint.save_case import save_replicas
from tests.engine.fault_case import run_with_a_flipped_bit
from tests.engine.run_case import write_recipe
from tests.processes import run_ranks

LAST = {1: "momentum.w"}
CASES = {
    "none": ({}, ""),
    "one": (LAST, "replicas on ranks 1 differ in momentum from those on 0, 2;"),
    "two in the same place": (
        {0: "model.decoder.b", 1: "model.decoder.b"},
        "replicas on ranks 2 differ in model from those on 0, 1;",
    ),
    "two in two places": (
        {0: "model.decoder.b", 2: "momentum.w"},
        "replicas on ranks 0, 1, 2 differ in model, momentum, and there is no majority",
    ),
}


@pytest.mark.gloo
def test_one_flipped_bit_is_named_on_every_rank_and_not_saved(tmp_path: Path) -> None:
    ranks = run_ranks(3, save_replicas, tmp_path, [case for case, _ in CASES.values()])
    assert ranks[0] == ranks[1] == ranks[2]
    for number, (told, (_, expected)) in enumerate(zip(ranks[0], CASES.values(), strict=True), 1):
        assert bool(told) == bool(expected) and expected in told, told
        assert not told or told.startswith(f"step {number} is not saved: ")
    assert [layout.step_of(folder) for folder in layout.list_checkpoints(tmp_path)] == [1]


@pytest.mark.gloo
@pytest.mark.parametrize("sharding", ["replicate", pytest.param("full", marks=pytest.mark.slow)])
def test_a_run_whose_replicas_diverge_ends_at_the_next_save(tmp_path: Path, sharding: str) -> None:
    recipe = write_recipe(tmp_path)
    overrides = [f"backend.sharding={sharding}", "checkpoint.every=2"]
    errors = run_ranks(2, run_with_a_flipped_bit, recipe, overrides, 3)
    steps = [layout.step_of(f) for f in layout.list_checkpoints(tmp_path / "run" / "checkpoints")]
    if sharding == "full":  # no other rank holds that value: there is nothing to compare it with
        assert errors == ["", ""]
        return
    assert errors[0] == errors[1]
    assert errors[0].startswith("step 4 is not saved: replicas on ranks 0, 1 differ in ")
    assert steps == [2]
