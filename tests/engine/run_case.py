"""Whole tiny runs of both tasks on generated images, through the real loop."""

import json
import shutil
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from cmtmae_scale.checkpoint import layout
from cmtmae_scale.checkpoint.chunks import ChunkReader
from cmtmae_scale.config.load import load_config, save_config
from cmtmae_scale.runtime.launch import World

STEPS = 6
BASE: dict[str, Any] = {
    "views": {"image_size": 64},
    "student": {"arch": "test_vit"},
    "decoder": {"depth": 1, "width": 32, "heads": 2},
    "teacher": {"library": "timm", "model": "test_vit", "weights": "random", "feature": "block"},
    "collaboration": {"alpha_attention": 0.5, "alpha_target": 0.7},
    "optimizer": {"base_lr": 0.03, "warmup_fraction": 0.2, "grad_clip": 1.0},
    "train": {"global_batch_size": 8, "micro_batch_size": 2, "steps": STEPS},
    "momentum": {"start": 0.9},
    "backend": {"precision": "fp32"},
    "checkpoint": {"every": 2},
    "log": {"every": 1},
    "data": {"workers": 2},
}


def make_photographs(folder: Path, count: int = 20) -> Path:
    """Smooth coloured images of different sizes; 20 make an epoch edge within step 3."""
    generator = np.random.default_rng(0)
    for number in range(count):
        place = folder / f"class{number % 3}"
        place.mkdir(parents=True, exist_ok=True)
        coarse = generator.integers(0, 256, (5, 6, 3), dtype=np.uint8)
        size = (80 + 4 * (number % 20), 110 - 2 * (number % 20))
        picture = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
        picture.save(place / f"{number:03d}.jpg", quality=90)
    return folder


def write_recipe(folder: Path, depth: int | None = None) -> Path:
    """Photographs and a recipe under a folder; returns the recipe's path.

    Args:
        folder: of both.
        depth: blocks of student and teacher; ``None``: all six of the model.
    """
    photographs = make_photographs(folder / "photos")
    tree = BASE | {
        "run": {"output_dir": str(folder / "run")},
        "data": BASE["data"] | {"path": str(photographs)},
        "student": BASE["student"] | {"depth": depth},
        "teacher": BASE["teacher"] | {"depth": depth},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def read_log(run_dir: Path) -> list[dict[str, Any]]:
    """The entries of a run's log."""
    return [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]


def read_losses(run_dir: Path) -> list[float]:
    """The loss of each logged step."""
    return [entry["loss/total"] for entry in read_log(run_dir) if "loss/total" in entry]


def run(recipe: Path, overrides: list[str]) -> str | None:
    """Build and train on every rank of an open process group; returns why it stopped."""
    import torch.distributed as dist

    from cmtmae_scale.engine.loop import train
    from cmtmae_scale.tools.figures.during import open_figures

    with ExitStack() as stack:
        built = build(recipe, overrides, stack)
        if dist.get_rank() == 0:
            save_config(built.task.config, built.run_dir / "config.yaml")
        built.task.side_tasks += open_figures(built)
        return train(built)


TASKS = ("pre-training", "fine-tuning")


def write_task_recipe(task: str, folder: Path) -> Path:
    """A small recipe of a task with its images under a folder; its run is ``folder/run``."""
    from tests.finetuning import finetune_case

    return (
        write_recipe(folder, depth=2)
        if task == "pre-training"
        else finetune_case.write_recipe(folder)
    )


def is_finetuning(recipe: Path) -> bool:
    return "test_path" in yaml.safe_load(recipe.read_text())["data"]


def this_world() -> World:
    """The rank of an open process group."""
    import torch.distributed as dist

    rank, size = dist.get_rank(), dist.get_world_size()
    return World(rank, size, rank, size, "test")


def build(recipe: Path, overrides: list[str], stack: ExitStack, lock: Any = None) -> Any:
    """Build a run of the recipe's task on every rank of an open process group."""
    from cmtmae_scale.engine.build import build_run
    from cmtmae_scale.pretraining.task import Pretraining
    from tests.finetuning import finetune_case

    torch.set_num_threads(1)
    world, device = this_world(), torch.device("cpu")
    if is_finetuning(recipe):
        task: Any = finetune_case.make_task(recipe, overrides, world, device)
    else:
        task = Pretraining(load_config(recipe, overrides), world, device)
    return build_run(task, task.config, world, device, stack, lock)


def run_noting(recipe: Path, overrides: list[str]) -> list[int]:
    """As ``run``; returns the sample ids that this rank drew, in order."""
    from cmtmae_scale.engine.loop import train

    drawn: list[int] = []
    with ExitStack() as stack:
        built = build(recipe, overrides, stack)
        built.stream = noting(built.stream, drawn)
        train(built)
    return drawn


def noting(stream: Any, drawn: list[int]) -> Any:
    for batch in stream:
        drawn += batch.sample_id.tolist()
        yield batch


def run_twice(recipe: Path, first: list[str], second: list[str]) -> tuple[str | None, str | None]:
    """Two starts one after the other in the same processes."""
    return run(recipe, first), run(recipe, second)


def resume_each(
    recipe: Path, first: list[str], ways: list[list[str]]
) -> list[tuple[str, dict[str, Any], list[str]]]:
    """Run, then resume copies of the run in several ways.

    Returns:
        For each way the error, if any, the newest checkpoint's state, and the warnings.
    """
    from cmtmae_scale.errors import CmtMaeError
    from tests.checkpoint.save_case import Lines

    origin = recipe.parent / "origin"
    run(recipe, [f"run.output_dir={origin}", *first])
    log = Lines()
    found = []
    for number, way in enumerate(ways):
        place = recipe.parent / f"way{number}"
        shutil.copytree(origin, place)
        log.lines.clear()
        error = ""
        try:
            run(recipe, [f"run.output_dir={place}", *way])
        except CmtMaeError as refused:
            error = f"{refused.exit_code} {refused}"
        newest = layout.list_checkpoints(place / "checkpoints")[0]
        lines = [line for line in log.lines if not line.startswith("teacher.weights=random")]
        found.append((error, layout.read_state(newest), lines))
    return found


def run_on_a_slow_store(recipe: Path) -> list[str]:
    """A run with a save per step, whose store blocks until the last step; its log lines."""
    from cmtmae_scale.checkpoint import writer
    from tests.checkpoint.save_case import Lines

    log, gate = Lines(), threading.Event()
    write, finish = writer.write_chunks, writer.Writer.finish

    def slow_write(*arguments: Any) -> Any:
        gate.wait()
        return write(*arguments)

    def opening_finish(*arguments: Any) -> None:
        gate.set()
        finish(*arguments)

    writer.write_chunks, writer.Writer.finish = slow_write, opening_finish
    run(recipe, ["checkpoint.every=1"])
    return log.lines


def tensors(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    """Everything that a checkpoint holds, whole."""
    folder = layout.folder_of(run_dir / "checkpoints", step)
    assert layout.find_damage(folder) is None
    reader = ChunkReader(folder)
    return {key: reader.read_tensor(key) for key in reader.index}


def same(a: Path, b: Path, step: int = STEPS) -> None:
    """Assert that two runs hold the same bits at a step."""
    one, two = tensors(a, step), tensors(b, step)
    assert one.keys() == two.keys()
    different = [key for key in one if not torch.equal(one[key], two[key])]
    assert not different
