"""Made-up features and labelled photographs for tests of evaluation."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

from cmtmae_scale.evaluation.features import Column, FeatureTable
from cmtmae_scale.runtime.launch import World

COLUMN = Column("made up", "patches")
CLASSES, WIDTH = 7, 12


def clusters(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Overlapping clusters, off centre and of unequal scales; float32 and int64."""
    centres = np.random.default_rng(99).normal(size=(CLASSES, WIDTH))
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % CLASSES
    rows = centres[labels] + 1.5 * generator.normal(size=(count, WIDTH))
    rows = (rows + 0.5) * np.linspace(0.5, 3, WIDTH)
    return rows.astype(np.float32), labels


def table_of(rows: np.ndarray, labels: np.ndarray) -> FeatureTable:
    """This rank's share of rows, blocks of 4 as ``OnePass`` deals them out."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    places = torch.arange(len(rows))
    own = places[(places // 4) % size == rank]
    return FeatureTable(own, torch.tensor(labels)[own], {COLUMN: torch.tensor(rows)[own]})


def world() -> World:
    if not dist.is_initialized():
        return World(0, 1, 0, 1, "none")
    rank, size = dist.get_rank(), dist.get_world_size()
    return World(rank, size, rank, size, "test")


def labelled_photographs(folder: Path, count: int, seed: int, classes: int = 3) -> Path:
    """Images whose class can be learnt: each class has its own colour, with much noise."""
    generator = np.random.default_rng(seed)
    colours = np.random.default_rng(7).integers(60, 196, (classes, 3))
    for number in range(count):
        label = number % classes
        place = folder / f"class{label}"
        place.mkdir(parents=True, exist_ok=True)
        noise = generator.normal(0, 60, (6, 7, 3)) + generator.normal(0, 25, 3)
        coarse = (colours[label] + noise).clip(0, 255).astype(np.uint8)
        size = (80 + 3 * (number % 9), 96 - 2 * (number % 7))
        image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
        image.save(place / f"{number:03d}.jpg", quality=90)
    return folder


def command(*arguments: Any) -> str:
    """Evaluate as the command does inside an open process group; returns the printed text."""
    from cmtmae_scale.commands.evaluate import parse_options, run_method

    torch.set_num_threads(1)
    options = parse_options([str(word) for word in arguments])
    return run_method(options, world(), torch.device("cpu"))


def command_apart(*cases: list[list[str]]) -> list[str]:
    """Evaluate with each rank's own arguments; the errors, one per case."""
    from cmtmae_scale.errors import CmtMaeError

    found = []
    for arguments in cases:
        try:
            found.append(command(*arguments[dist.get_rank()]))
        except CmtMaeError as error:
            found.append(str(error))
    return found
