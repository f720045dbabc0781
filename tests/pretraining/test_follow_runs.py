"""A run with a sidecar equals the run without; both are killed, and disk stays bounded."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from cmtmae_scale.cache.build import make_builder
from cmtmae_scale.commands.precompute import precompute_teacher
from cmtmae_scale.config.load import load_config
from cmtmae_scale.errors import ConfigError
from cmtmae_scale.runtime.progress_file import read_published_progress
from tests.engine.run_case import run, same, write_recipe
from tests.pretraining.follow_case import (
    ROWS_PER_SHARD,
    follow_run,
    shards_on_storage,
    train_beside,
)
from tests.processes import CONTEXT, run_ranks, started

pytestmark = pytest.mark.gloo
STEPS, BATCH, AHEAD = 20, 4, 3
MODE = ["teacher.mode=sidecar", "cache.codec=bf16"]
SIZE = ["train.micro_batch_size=4", f"train.global_batch_size={BATCH}", f"train.steps={STEPS}"]
OVERRIDES = [*MODE, *SIZE, "checkpoint.every=2"]
MOST = AHEAD + 2 * (2 * BATCH // ROWS_PER_SHARD) + 1


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("case"))


def sidecar(*arguments: Any) -> Any:
    process = CONTEXT.Process(target=follow_run, args=arguments, daemon=True)
    process.start()
    return process


def test_both_are_killed_and_resume_and_the_run_equals_the_run_without_a_sidecar(
    recipe: Path, tmp_path: Path
) -> None:
    run_dir, alone = tmp_path / "run", tmp_path / "alone"
    killed = sidecar(run_dir, "0/1", AHEAD, 9 + AHEAD)
    dying = (recipe, run_dir, OVERRIDES, 1, 9)
    with started(1, train_beside, *dying) as (children, _):
        most = 0
        while children[0].is_alive():
            most = max(most, len(shards_on_storage(run_dir / "cache")))
            time.sleep(0.01)
    killed.join(20)
    assert killed.exitcode == -9
    progress = read_published_progress(run_dir)
    assert progress is not None and progress.saved < progress.end
    # Resumed with two sidecars instead of one; more than three epochs in all.
    others = [sidecar(run_dir, f"{number}/2", AHEAD) for number in range(2)]
    with started(1, train_beside, recipe, run_dir, OVERRIDES, 9, None) as (children, results):
        while results.empty():
            most = max(most, len(shards_on_storage(run_dir / "cache")))
            time.sleep(0.01)
        _, fine, hits = results.get()
        assert fine, hits
    for other in others:
        other.join(20)
        assert other.exitcode == 0
    assert len(hits) == STEPS and hits[5:8] + hits[10:] == [1.0] * (3 + STEPS - 10)
    assert 0 < most <= MOST and not shards_on_storage(run_dir / "cache")
    run_ranks(1, run, recipe, [f"run.output_dir={alone}", *OVERRIDES])
    same(run_dir, alone, STEPS)


def test_the_cache_of_another_run_is_refused_at_launch(recipe: Path, tmp_path: Path) -> None:
    own = [*OVERRIDES, f"cache.dir={tmp_path / 'cache'}", f"run.output_dir={tmp_path / 'run'}"]
    other = load_config(recipe, [*own, "data.shuffle=window"])
    builder = make_builder(other, tmp_path / "index", torch.device("cpu"), "positions")
    builder.begin_cache(tmp_path / "cache", "bf16", ROWS_PER_SHARD)
    builder.close()
    with pytest.raises(AssertionError, match=r"data.shuffle: the cache was built with window"):
        run_ranks(1, run, recipe, own)


def test_a_run_that_cannot_be_followed_is_refused(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(
        ConfigError, match=r"teacher.mode=sidecar runs the teacher where a row is missing"
    ):
        load_config(recipe, ["teacher.mode=sidecar", "cache.on_miss=stop"])
    with pytest.raises(ConfigError, match=r"teacher.mode=sidecar, but neither the mask nor"):
        load_config(recipe, ["teacher.mode=sidecar", "mask.sampler=random", "loss.teacher=0"])
    assert precompute_teacher(["--follow", str(tmp_path), "--config", str(recipe)]) == 78
    assert (
        "the run has teacher.mode=online; --follow needs teacher.mode=sidecar"
        in capsys.readouterr().err
    )
