"""A tiny fine-tuning on labelled generated photographs, through the real command's functions."""

from pathlib import Path
from typing import Any

import torch
import yaml

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
    """A ``test_vit`` for pictures of 64 pixels, as ``launchers/export.py`` writes it."""
    from safetensors.torch import save_file

    from cmtmae_scale.config.schema import Config
    from cmtmae_scale.method.initialisation import initialise
    from cmtmae_scale.method.student import build_student

    config = Config()
    config.student.arch, config.views.image_size = "test_vit", 64
    student = build_student(config)
    initialise(student, seed)
    save_file(student.state_dict(), file)


def arguments(recipe: Path, *overrides: str, encoder: str = "encoder.safetensors") -> list[str]:
    """Command line, from the method on."""
    start = ["--checkpoint", str(recipe.parent / encoder), "--arch", "test_vit"]
    return ["finetune", "--config", str(recipe), *start, *overrides]


def tune(recipe: Path, *overrides: str, encoder: str = "encoder.safetensors") -> tuple[str, int]:
    """Fine-tune on every rank of an open process group; what is said, and the exit code."""
    from cmtmae_scale.commands.evaluate import parse

    torch.set_num_threads(1)
    options = parse(arguments(recipe, *overrides, encoder=encoder))
    return options.run(options, world(), torch.device("cpu"))


def tune_each(recipe: Path, *starts: list[str]) -> list[tuple[str, int]]:
    """Several starts one after the other in the same processes."""
    return [tune(recipe, *overrides) for overrides in starts]
