"""A tiny fine-tuning on labelled generated photographs, through the real command's functions."""

import io
import json
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import yaml

from cmtmae_scale.runtime.launch import World
from tests.evaluation.evaluation_case import labelled_photographs, world

STEPS = 6
BASE: dict[str, Any] = {
    "head": {"drop_path": 0.2},
    "optimizer": {"base_lr": 0.03, "warmup_epochs": 0.5, "grad_clip": 1.0},
    "train": {"global_batch_size": 8, "micro_batch_size": 2, "steps": STEPS},
    "backend": {"precision": "fp32"},
    "checkpoint": {"every": 2},
    "log": {"every": 1},
    "data": {"workers": 2},
}


def write_recipe(folder: Path, train: int = 20, test: int = 13, classes: int = 3) -> Path:
    """Photographs, an encoder and a recipe under a folder; returns the recipe's path."""
    paths = {
        "path": str(labelled_photographs(folder / "train", train, 0, classes)),
        "test_path": str(labelled_photographs(folder / "test", test, 1, classes)),
    }
    write_encoder(folder / "encoder.safetensors", 0)
    tree = BASE | {"run": {"output_dir": str(folder / "run")}, "data": BASE["data"] | paths}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def write_encoder(file: Path, seed: int) -> None:
    """A ``test_vit`` for images of 64 pixels, as ``cmtmae export`` writes it."""
    from safetensors.torch import save_file

    from cmtmae_scale.config.schema import Config
    from cmtmae_scale.method.build import build_student
    from cmtmae_scale.method.initialisation import initialise

    config = Config()
    config.student.arch, config.views.image_size = "test_vit", 64
    student = build_student(config)
    initialise(student, seed)
    save_file(student.state_dict(), file)


def write_eva(file: Path) -> None:
    """Write a tiny EVA-02 for images of 64 pixels, as ``cmtmae export`` writes it."""
    from safetensors.torch import save_file

    from cmtmae_scale.config.schema import Config
    from cmtmae_scale.config.schema import Student as StudentConfig
    from cmtmae_scale.method.build import build_student
    from cmtmae_scale.method.initialisation import initialise

    config = Config()
    config.student = StudentConfig("eva02_base_patch14_224", 16, 96, 2, 2)
    config.views.image_size = 64
    student = build_student(config)
    initialise(student, 0)
    sizes = {name: value for name, value in vars(config.student).items() if value is not None}
    save_file(student.state_dict(), file, {"student": json.dumps(sizes), "image_size": "64"})


def arguments(
    recipe: Path, *overrides: str, encoder: str = "encoder.safetensors", words: Sequence[str] = ()
) -> list[str]:
    """Command line of ``cmtmae finetune``; ``words`` name the encoder in place of a file."""
    given = ["--checkpoint", str(recipe.parent / encoder), "--arch", "test_vit"]
    return ["--config", str(recipe), *(words or given), *overrides]


def make_task(recipe: Path, overrides: list[str], world: World, device: torch.device) -> Any:
    """The fine-tuning that the command line names."""
    from cmtmae_scale.commands.finetune import parse_options
    from cmtmae_scale.config.finetune import load_finetune
    from cmtmae_scale.evaluation.subject import open_subject
    from cmtmae_scale.finetuning.encoder import take_encoder, weight_options
    from cmtmae_scale.finetuning.task import Finetuning

    options = parse_options(arguments(recipe, *overrides))
    config = load_finetune(options.config, options.overrides)
    options.seed, given = config.run.seed, weight_options(options)

    def open_encoder() -> Any:
        return take_encoder(open_subject(options, world, device), given)

    return Finetuning(config, given, open_encoder, world, device)


def tune(
    recipe: Path, *overrides: str, encoder: str = "encoder.safetensors", words: Sequence[str] = ()
) -> tuple[str, int]:
    """The command on every rank of an open process group: output with reason, and exit code."""
    from cmtmae_scale.commands import finetune
    from tests.checkpoint.save_case import Lines
    from tests.engine.fault_case import ready_group, run_dir_of

    torch.set_num_threads(1)
    printed, log = io.StringIO(), Lines()
    with ExitStack() as stack:
        stack.enter_context(redirect_stdout(printed))
        for place, stand_in in (
            ("commands.finetune.find_world", world),
            ("commands.finetune.set_up_logging", lambda *_: None),
            ("engine.run.process_group", ready_group),
        ):
            stack.enter_context(mock.patch(f"cmtmae_scale.{place}", stand_in))
        code = finetune.finetune(arguments(recipe, *overrides, encoder=encoder, words=words))
    if code not in (0, 75):
        raise RuntimeError("\n".join(log.lines))
    dist.barrier()  # rank 0 writes the outcome
    reason = json.loads((run_dir_of(recipe, [*overrides]) / "exit.json").read_text())["reason"]
    return f"{printed.getvalue()}\n{reason}", code


def failure_of(recipe: Path, *overrides: str) -> str:
    """The log of a launch that must fail on this rank."""
    try:
        return f"no failure: {tune(recipe, *overrides)}"
    except RuntimeError as error:
        return str(error)


def tune_each(recipe: Path, *launches: list[str]) -> list[tuple[str, int]]:
    """Several launches one after the other in the same processes."""
    return [tune(recipe, *overrides) for overrides in launches]
