"""Runs that read the teacher from a cache: equal masks and losses, and misses."""

from pathlib import Path

import numpy as np
import pytest

from cmtmae_scale.cache.format import shard_path
from cmtmae_scale.checkpoint import layout
from dataloading.order import sample_ids
from tests.engine.run_case import STEPS, same, write_recipe
from tests.pretraining.cached_run_case import COUNT, VIEWS, cached, make_cache, observe_each
from tests.processes import run_ranks

pytestmark = pytest.mark.gloo
SAMPLES = 20
# Masks depend on the stored attention only, not on rounded features.
ALONE = "collaboration.alpha_attention=1"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("case"))


@pytest.fixture(scope="module")
def exact(recipe: Path) -> Path:
    folder = recipe.parent / "exact"
    make_cache(recipe, folder)
    return folder


def rows_of(step: int) -> np.ndarray:
    """Rows of the four micro-batches of a step, two each."""
    ids, epochs = sample_ids(SAMPLES, 0, np.arange(step * 8, step * 8 + 8))
    return (ids * COUNT + epochs % COUNT).reshape(4, 2)


def test_a_cached_run_equals_the_online_run_whose_teacher_is_rounded_alike(
    recipe: Path, exact: Path, tmp_path: Path
) -> None:
    online, bare = tmp_path / "online", tmp_path / "cached"
    stop = cached(exact, "cache.on_miss=stop")
    ((one, two),) = run_ranks(
        1, observe_each, recipe, [(online, [VIEWS], "rounded"), (bare, stop, "alone")]
    )
    assert (one.error, two.error) == ("", "") and one.masks == two.masks
    same(online, bare)
    losses = [[entry["loss/total"] for entry in seen.log] for seen in (one, two)]
    assert losses[0] == losses[1] and len(losses[0]) == STEPS
    assert all("cache/hit" not in entry for entry in one.log)
    assert all(entry["cache/hit"] == 1 for entry in two.log)


@pytest.mark.parametrize("steps", [10, pytest.param(50, marks=pytest.mark.slow)])
def test_int8_features_keep_the_masks_and_the_losses(
    recipe: Path, tmp_path: Path, steps: int
) -> None:
    make_cache(recipe, tmp_path / "cache", "int8")
    long = [f"train.steps={steps}", "train.global_batch_size=4", ALONE, "checkpoint.every=50"]
    ways = [
        (tmp_path / "online", [VIEWS, *long], "rounded"),
        (tmp_path / "cached", cached(tmp_path / "cache", "cache.on_miss=stop", *long), "alone"),
    ]
    ((one, two),) = run_ranks(1, observe_each, recipe, ways)
    assert one.masks == two.masks and len(two.log) == steps
    for online, read in zip(one.log, two.log, strict=True):
        # A cosine of 0.9999 per token changes 2 - 2 cos by at most 0.03, evenly both ways.
        assert read["loss/teacher"] == pytest.approx(online["loss/teacher"], rel=2e-3)
        assert read["loss/total"] == pytest.approx(online["loss/total"], rel=2e-3)
        assert read["mask/visible_mass"] == online["mask/visible_mass"]


def test_the_micro_batches_of_a_missing_shard_are_forwarded_online(
    recipe: Path, tmp_path: Path
) -> None:
    manifest = make_cache(recipe, tmp_path / "cache")
    shard_path(tmp_path / "cache", manifest, 2).unlink()
    ways = [
        (tmp_path / "online", [VIEWS], "rounded"),
        (tmp_path / "cached", cached(tmp_path / "cache"), "rounded"),
    ]
    ((_, seen),) = run_ranks(1, observe_each, recipe, ways)
    assert seen.error == ""
    missed = [
        sum(any(row in manifest.shard_rows(2) for row in rows) for rows in rows_of(step))
        for step in range(STEPS)
    ]
    assert 0 < sum(missed) < 4 * STEPS
    assert [entry["cache/hit"] for entry in seen.log] == [1 - n / 4 for n in missed]
    same(tmp_path / "online", tmp_path / "cached")


def test_a_row_that_one_rank_misses_stops_all_of_them_and_an_online_teacher_continues(
    recipe: Path, tmp_path: Path
) -> None:
    manifest = make_cache(recipe, tmp_path / "cache", rows_per_shard=1)
    row = int(rows_of(1)[2, 0])  # the second micro-batch of rank 0 in the second step
    away = shard_path(tmp_path / "cache", manifest, row).rename(tmp_path / "away")
    run_dir, whole = tmp_path / "run", tmp_path / "whole"
    stop = (run_dir, cached(tmp_path / "cache", "cache.on_miss=stop"), "alone")
    for (seen,) in run_ranks(2, observe_each, recipe, [stop]):
        assert seen.error == (
            f"78 step 2 was not taken: the teacher cache failed on ranks 0: cache.dir="
            f"{tmp_path / 'cache'}: row {row} (image {row // 2}, view {row % 2}) of shard {row}: "
            "it is not complete; complete the cache with cmtmae precompute, or set "
            "cache.on_miss=online"
        )
    assert layout.list_checkpoints(run_dir / "checkpoints")[0].name == "step-00000001"
    ways = [(run_dir, cached(tmp_path / "cache"), "rounded"), (whole, [VIEWS], "rounded")]
    for seen, _ in run_ranks(2, observe_each, recipe, ways):
        assert (seen.reason, seen.error) == (None, "")
    same(run_dir, whole)
    assert away.exists()


def test_a_cache_that_another_teacher_filled_stops_the_run_at_a_spot_check(
    recipe: Path, tmp_path: Path
) -> None:
    make_cache(recipe, tmp_path / "cache", "int8", rows_of=("run.seed=1",))
    way = (tmp_path / "run", cached(tmp_path / "cache", "cache.spot_check=0.5"), "")
    ((seen,),) = run_ranks(1, observe_each, recipe, [way])
    assert seen.error.startswith("78 step 1 was not taken: the teacher cache failed on ranks 0: ")
    assert "the online teacher differs: standardised cosine " in seen.error
    assert seen.log == []
