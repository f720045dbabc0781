"""A run moves between backends and world sizes, and is killed on any of them."""

import random
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from cmtmae_scale.checkpoint.layout import folder_of
from tests.backends.backend_case import trained
from tests.engine.run_case import read_log, run, run_noting, same, tensors, write_recipe
from tests.processes import kill_ranks, run_ranks, started

pytestmark = pytest.mark.gloo

needs_deepspeed = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="DeepSpeed is not installed"
)
ZERO_MARKS = (needs_deepspeed, pytest.mark.deepspeed)
FSDP, HSDP, REPLICATED = (
    ["backend.name=fsdp", f"backend.sharding={s}"] for s in ("full", "hybrid", "replicate")
)
ZERO1, ZERO2, ZERO3 = (["backend.name=deepspeed", f"backend.zero_stage={s}"] for s in (1, 2, 3))
GATHER_ANEW = "backend.deepspeed.zero_optimization.stage3_param_persistence_threshold=0"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("case"), depth=2)


def losses(run_dir: Path) -> list[float]:
    return [entry["loss/total"] for entry in read_log(run_dir)]


def draws(ranks: list[list[int]], micro: int) -> list[int]:
    """Sample ids in the order of the global stream, from what each rank drew."""
    blocks = [np.array(ids).reshape(-1, micro) for ids in ranks]
    return np.stack(blocks, axis=1).reshape(-1).tolist()


@needs_deepspeed
@pytest.mark.deepspeed
@pytest.mark.slow
def test_a_run_moves_between_backends_and_world_sizes(recipe: Path, tmp_path: Path) -> None:
    whole = ["train.steps=20", "checkpoint.every=100"]
    rank_draws = run_ranks(
        2, run_noting, recipe, [f"run.output_dir={tmp_path / 'whole'}", *whole, *FSDP]
    )
    expected = draws(rank_draws, 2)
    where = f"run.output_dir={tmp_path / 'moved'}"
    moved: list[int] = []
    for stop, size, backend in [
        (5, 2, FSDP),
        (10, 4, [*ZERO3, GATHER_ANEW]),
        (15, 2, ZERO1),
        (20, 1, FSDP),
    ]:
        overrides = [where, *whole, f"train.stop_after={stop}", *backend]
        moved += draws(run_ranks(size, run_noting, recipe, overrides), 2)
    assert moved == expected
    np.testing.assert_allclose(
        losses(tmp_path / "moved"), losses(tmp_path / "whole"), rtol=1e-5, atol=0
    )
    one, two = tensors(tmp_path / "moved", 20), tensors(tmp_path / "whole", 20)
    for key, value in one.items():
        ours, theirs = (trained(key, each.numpy()) for each in (value, two[key]))
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=5e-5, err_msg=key)


@pytest.mark.parametrize(
    "backend",
    [
        pytest.param(ZERO1, marks=ZERO_MARKS),
        pytest.param(ZERO2, marks=(*ZERO_MARKS, pytest.mark.slow)),
        pytest.param([*ZERO3, GATHER_ANEW], marks=(*ZERO_MARKS, pytest.mark.slow)),
    ],
    ids=["zero1", "zero2", "zero3"],
)
def test_stopping_and_going_on_is_bit_identical(
    recipe: Path, tmp_path: Path, backend: list[str]
) -> None:
    run_ranks(2, run, recipe, [f"run.output_dir={tmp_path / 'whole'}", *backend])
    where = [f"run.output_dir={tmp_path / 'run'}", *backend]
    run_ranks(2, run, recipe, [*where, "train.stop_after=3"])
    run_ranks(2, run, recipe, where)
    same(tmp_path / "run", tmp_path / "whole")


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, tuple[Path, float]]:
    """Folder and duration of a whole run of each backend, filled when asked for."""
    return {}


def kill_and_finish(
    recipe: Path,
    run_dir: Path,
    undisturbed: dict[str, tuple[Path, float]],
    backend: list[str],
    moment: float,
) -> None:
    """Kill all ranks at a share of the run's duration, start again, and compare the end."""
    key = " ".join(backend)
    settings = ["checkpoint.every=1", *backend]
    if key not in undisturbed:
        folder = recipe.parent / f"whole-{len(undisturbed)}"
        began = time.monotonic()
        run_ranks(2, run, recipe, [f"run.output_dir={folder}", *settings])
        undisturbed[key] = (folder, time.monotonic() - began)
    folder, duration_s = undisturbed[key]
    line = [f"run.output_dir={run_dir}", *settings]
    kill_ranks(2, run, recipe, line, after_s=moment * duration_s)
    run_ranks(2, run, recipe, line)
    same(run_dir, folder)


KILLED = [FSDP, pytest.param(ZERO1, marks=ZERO_MARKS), pytest.param(ZERO3, marks=ZERO_MARKS)]


@pytest.mark.slow
@pytest.mark.parametrize("backend", KILLED, ids=["fsdp", "zero1", "zero3"])
def test_killed_and_started_again_is_bit_identical(
    recipe: Path, tmp_path: Path, undisturbed: dict[str, tuple[Path, float]], backend: list[str]
) -> None:
    kill_and_finish(recipe, tmp_path / "run", undisturbed, backend, 0.7)


@pytest.mark.slow
@pytest.mark.parametrize("backend", KILLED, ids=["fsdp", "zero1", "zero3"])
def test_killed_at_twenty_moments_is_bit_identical(
    recipe: Path, tmp_path: Path, undisturbed: dict[str, tuple[Path, float]], backend: list[str]
) -> None:
    moments = random.Random(0)
    for number in range(20):
        moment = moments.uniform(0.1, 1.0)
        kill_and_finish(recipe, tmp_path / str(number), undisturbed, backend, moment)


WIDE = [
    *("student.width=2048", "student.heads=32", "student.depth=1"),
    *("train.global_batch_size=2", "train.micro_batch_size=1", "train.steps=8"),
    *("checkpoint.every=2", "checkpoint.keep=4"),
]
"""A block of a student of 2 billion parameters, for eight steps."""


def kill_after_save(recipe: Path, run_dir: Path, overrides: list[str]) -> None:
    """Kill all ranks once the run holds the checkpoint of step 2, before it is done."""
    with started(2, run, recipe, [f"run.output_dir={run_dir}", *overrides]) as (children, _):
        while not folder_of(run_dir / "checkpoints", 2).exists():
            assert all(child.is_alive() for child in children)
            time.sleep(0.05)
        for child in children:
            child.kill()


@pytest.mark.slow
@pytest.mark.parametrize("backend", [FSDP, ZERO3], ids=["fsdp", "zero3"])
@needs_deepspeed
@pytest.mark.deepspeed
def test_a_wide_model_is_killed_resumed_and_moved(
    recipe: Path, tmp_path: Path, backend: list[str]
) -> None:
    other = ZERO3 if backend is FSDP else FSDP
    whole = [f"run.output_dir={tmp_path / 'whole'}", *WIDE]
    run_ranks(2, run, recipe, [*whole, *backend], timeout_s=600)
    kill_after_save(recipe, tmp_path / "run", [*WIDE, *backend])
    where = [f"run.output_dir={tmp_path / 'run'}", *WIDE]
    run_ranks(2, run, recipe, [*where, *backend, "train.stop_after=4"], timeout_s=600)
    same(tmp_path / "run", tmp_path / "whole", 4)
    run_ranks(2, run, recipe, [*where, *other], timeout_s=600)
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(tmp_path / "whole"), rtol=1e-5)
