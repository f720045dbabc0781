"""A small cache of generated photographs and a small random teacher."""

import os
import signal
from pathlib import Path
from typing import Any

import torch
import yaml

from cmtmae_scale.cache.build import Builder, build_parts
from cmtmae_scale.cache.format import Manifest
from cmtmae_scale.config.derive import needs
from cmtmae_scale.config.load import load_config
from cmtmae_scale.teachers.build import assemble
from dataloading.index import build_index
from tests.engine.run_case import BASE, make_photographs

PHOTOGRAPHS, VIEWS, ROWS_A_PART = 10, 2, 6


def write_cache_recipe(folder: Path) -> Path:
    """A recipe whose views are fixed, and its photographs."""
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
    teacher = assemble(config, need, load=True)
    return Builder(config, build_index(config.data.path), teacher, torch.device("cpu"))


def build_cache(
    recipe: Path, folder: Path, overrides: list[str] | None = None, share: tuple[int, int] = (0, 1)
) -> Manifest:
    """Build a share of the parts."""
    builder = make_builder(recipe, overrides)
    try:
        manifest = builder.begin(folder, builder.config.cache.codec, ROWS_A_PART)
        parts = range(share[0], manifest.num_parts, share[1])
        build_parts(builder, folder, manifest, parts, lambda done: None)
    finally:
        builder.close()
    return manifest


def build_until_killed(recipe: Path, folder: Path) -> None:
    """Build, and end without a word when the second part has been computed."""
    builder = make_builder(recipe)
    manifest = builder.begin(folder, "int8", ROWS_A_PART)

    def tell(done: int) -> None:
        if done >= 2 * ROWS_A_PART:
            os.kill(os.getpid(), signal.SIGKILL)

    build_parts(builder, folder, manifest, range(manifest.num_parts), tell)


def begin_and_count(recipe: Path, folder: Path) -> int:
    """Begin a cache; returns how often this process calibrated."""
    builder = make_builder(recipe)
    calls = []
    calibrate = builder.calibrate

    def counted(live: Any) -> Any:
        calls.append(1)
        return calibrate(live)

    builder.calibrate = counted  # pyright: ignore
    builder.begin(folder, "int8", ROWS_A_PART)
    builder.close()
    return len(calls)


def content(folder: Path) -> dict[str, bytes]:
    """Every file that counts."""
    names = [p for p in sorted(folder.rglob("*")) if p.is_file() and not p.name.startswith(".")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in names}
