"""Storage that fails on one rank stops the run at a step that is taken again, bit for bit."""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from cmtmae_scale.checkpoint import layout
from dataloading.order import sample_ids
from dataloading.stream import Stream
from tests.engine.run_case import (
    STEPS,
    TASKS,
    build,
    is_finetuning,
    read_log,
    run,
    same,
    write_task_recipe,
)
from tests.finetuning.finetune_case import arguments
from tests.processes import run_ranks

pytestmark = pytest.mark.gloo
SAMPLES = 20


@pytest.fixture(scope="module")
def recipe(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_task_recipe(request.param, tmp_path_factory.mktemp("case"))


@pytest.fixture(scope="module")
def undisturbed(recipe: Path) -> Path:
    folder = recipe.parent / "whole"
    run_ranks(2, run, recipe, [f"run.output_dir={folder}"])
    return folder


@contextmanager
def moved_away(path: Path) -> Iterator[None]:
    """A file that one rank finds missing and that is back afterwards, time and all."""
    away = path.with_name(f".{path.name}")
    path.rename(away)
    try:
        yield
    finally:
        away.rename(path)


def run_without(recipe: Path, overrides: list[str], position: int) -> tuple[str | None, int, bool]:
    """Train while the sample of a position is gone; returns reason, step, and whether it failed.

    The index is complete: the file is moved once it is built, before anything is read.
    """
    import torch.distributed as dist

    from cmtmae_scale.engine.loop import train

    with ExitStack() as stack:
        for place in ("pretraining.build", "finetuning.task"):
            impatient = functools.partial(Stream, patience_s=0.2)
            stack.enter_context(mock.patch(f"cmtmae_scale.{place}.Stream", impatient))
        built = build(recipe, overrides, stack)
        (sample,), _ = sample_ids(SAMPLES, built.config.run.seed, np.array([position]))
        dist.barrier()
        if dist.get_rank() == 0:
            name = built.index.names[int(sample)]
            stack.enter_context(moved_away(Path(built.config.data.path) / name))
        dist.barrier()
        reason = train(built)
        dist.barrier()
        return reason, built.progress.step, built.stop.failure is not None


# A step is 8 positions in blocks of 2, which the two ranks take in turns.
@pytest.mark.parametrize(
    ("recipe", "position"),
    [
        pytest.param(TASKS[0], 10, id="pre-training, drawn ahead by rank 1"),
        pytest.param(TASKS[0], 2, id="pre-training, first block of rank 1", marks=pytest.mark.slow),
        pytest.param(TASKS[0], 12, id="pre-training, second of rank 0", marks=pytest.mark.slow),
        pytest.param(TASKS[1], 2, id="fine-tuning, first of rank 1", marks=pytest.mark.slow),
        pytest.param(TASKS[1], 12, id="fine-tuning, second of rank 0", marks=pytest.mark.slow),
    ],
    indirect=["recipe"],
)
def test_one_rank_without_data_stops_all_and_the_step_is_taken_again(
    recipe: Path, undisturbed: Path, tmp_path: Path, position: int
) -> None:
    run_dir, step, rank = tmp_path / "run", position // 8, position // 2 % 2
    outcomes = run_ranks(2, run_without, recipe, [f"run.output_dir={run_dir}"], position)
    reasons = {reason for reason, *_ in outcomes}
    assert len(reasons) == 1 and [at for _, at, _ in outcomes] == [step, step]
    (reason,) = reasons
    assert reason is not None
    assert reason.startswith(
        f"step {step + 1} was not taken: data could not be read on ranks {rank}: "
    )
    assert "No such file or directory" in reason and reason.endswith("then launch again")
    assert [was_without for *_, was_without in outcomes] == [k == rank for k in range(2)]
    assert layout.list_checkpoints(run_dir / "checkpoints")[0].name == f"step-{step:08d}"
    assert not (run_dir / "quarantine.jsonl").exists()
    assert run_ranks(2, run, recipe, [f"run.output_dir={run_dir}"]) == [None, None]
    same(run_dir, undisturbed)
    entries = [entry for entry in read_log(run_dir) if "loss/total" in entry]
    assert [entry["step"] for entry in entries] == list(range(1, STEPS + 1))
    assert all(entry["valid_rows"] == 8 for entry in entries)


FALTERING = """
import functools, sys
import cmtmae_scale.finetuning.task as finetuning
import cmtmae_scale.pretraining.build as pretraining
from cmtmae_scale.commands.main import run_command
from dataloading.sources import FolderSource

read = FolderSource.read

def falter(source, i):
    if i == 7 and source._root.name != "test":
        raise OSError(5, "Input/output error")
    return read(source, i)

FolderSource.read = falter
for module in (pretraining, finetuning):
    module.Stream = functools.partial(module.Stream, patience_s=0.2)
sys.exit(run_command(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("recipe", TASKS, indirect=True)
def test_the_program_exits_with_75_and_names_the_file(recipe: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    line = ["pretrain", "--config", str(recipe)]
    if is_finetuning(recipe):
        line = ["finetune", *arguments(recipe)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", FALTERING, *line, f"run.output_dir={run_dir}"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 75 and "Traceback" not in done.stderr
    record = json.loads((run_dir / "exit.json").read_text())
    assert record["code"] == 75
    assert ".jpg: Input/output error" in record["reason"]
    assert layout.list_checkpoints(run_dir / "checkpoints")[0].name == f"step-{record['step']:08d}"
