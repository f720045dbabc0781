"""A small cache of generated images and a small random teacher."""

import os
import signal
from pathlib import Path
from typing import Any

import torch
import yaml

from cmtmae_scale.cache.build import Builder, build_shards
from cmtmae_scale.cache.format import Manifest
from cmtmae_scale.config.load import load_config
from cmtmae_scale.config.needs import needs
from cmtmae_scale.teachers.build import assemble_teacher
from dataloading.index import build_index
from tests.engine.run_case import BASE, make_photographs

PHOTOGRAPHS, VIEWS, ROWS_PER_SHARD = 10, 2, 6


def write_cache_recipe(folder: Path) -> Path:
    """A recipe with fixed views, and its images."""
    photographs = make_photographs(folder / "photos", PHOTOGRAPHS)
    tree = BASE | {
        "run": {"output_dir": str(folder / "run")},
        "data": BASE["data"] | {"path": str(photographs)},
        "views": BASE["views"] | {"views_per_image": VIEWS},
        "cache": {"dir": str(folder / "cache")},
        "train": {"global_batch_size": 8, "micro_batch_size": 4, "steps": 6},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def make_builder(recipe: Path, overrides: list[str] | None = None) -> Builder:
    config = load_config(recipe, overrides or [])
    need = needs(config)
    if config.cache.codec == "attention":
        need = need._replace(teacher_features=False)
    teacher = assemble_teacher(config, need, load=True)
    return Builder(config, build_index(config.data.path), teacher, torch.device("cpu"))


def build_cache(
    recipe: Path, folder: Path, overrides: list[str] | None = None, share: tuple[int, int] = (0, 1)
) -> Manifest:
    """Build a share of the shards."""
    builder = make_builder(recipe, overrides)
    try:
        manifest = builder.begin_cache(folder, builder.config.cache.codec, ROWS_PER_SHARD)
        shards = range(share[0], manifest.num_shards, share[1])
        build_shards(builder, folder, manifest, shards)
    finally:
        builder.close()
    return manifest


def build_until_killed(recipe: Path, folder: Path) -> None:
    """Build, and kill this process when the second shard has been computed."""
    builder = make_builder(recipe)
    manifest = builder.begin_cache(folder, "int8", ROWS_PER_SHARD)

    def kill(rows: int) -> None:
        if rows >= 2 * ROWS_PER_SHARD:
            os.kill(os.getpid(), signal.SIGKILL)

    build_shards(builder, folder, manifest, range(manifest.num_shards), kill)


def begin_and_count(recipe: Path, folder: Path) -> int:
    """Begin a cache; return how often this process calibrated."""
    builder = make_builder(recipe)
    calls = []
    calibrate = builder.calibrate_channels

    def counted(keep_alive: Any) -> Any:
        calls.append(1)
        return calibrate(keep_alive)

    builder.calibrate_channels = counted  # pyright: ignore
    builder.begin_cache(folder, "int8", ROWS_PER_SHARD)
    builder.close()
    return len(calls)


def content(folder: Path) -> dict[str, bytes]:
    """Every file except drafts."""
    names = [p for p in sorted(folder.rglob("*")) if p.is_file() and not p.name.startswith(".")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in names}
