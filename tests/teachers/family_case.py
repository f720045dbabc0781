"""One small teacher of each family through cache, sidecar, three steps and export."""

import math
from pathlib import Path

import pytest
import torch

from cmtmae_scale.cache.build import build_shards, make_builder
from cmtmae_scale.commands.export import export_weights
from cmtmae_scale.config.load import load_config
from cmtmae_scale.config.teachers import cache_folder
from cmtmae_scale.teachers.build import build_teacher
from tests.engine.run_case import write_recipe
from tests.pretraining.cached_run_case import Seen, observe
from tests.teachers.cases import random_images
from tests.teachers.families import FAMILIES, Family

COLUMNS = ("built", "cached", "sidecar", "trained three steps", "exported")
STEPS, BATCH = 3, 4
SIZES = [f"train.steps={STEPS}", f"train.global_batch_size={BATCH}", "train.micro_batch_size=4"]
SMALL = ["student.depth=1", "checkpoint.every=3", "views.views_per_image=1"]


def try_families(folder: Path) -> dict[str, dict[str, str]]:
    """Try every family on the rank of an open process group; cells are ``yes`` or what failed."""
    recipe = write_recipe(folder)
    found = {}
    for number, (name, family) in enumerate(FAMILIES.items()):
        place = folder / str(number)
        place.mkdir()
        found[name] = try_family(recipe, place, family)
    return found


def try_family(recipe: Path, folder: Path, family: Family) -> dict[str, str]:
    overrides = [*SIZES, *SMALL, *family.overrides(folder)]
    seen: dict[str, Seen] = {}
    losses: dict[str, list[float]] = {}
    cells = {"built": try_building(recipe, overrides)}
    for mode in ("online", "cached", "sidecar"):
        run_dir = folder / mode
        settings = [*overrides, f"run.output_dir={run_dir}", f"teacher.mode={mode}"]
        if mode != "online":
            settings += ["cache.codec=bf16", f"cache.dir={folder / 'rows' / mode}"]
            write_rows(recipe, settings, mode)
        seen[mode] = observe(recipe, run_dir, settings, "rounded" if mode == "online" else "")
        losses[mode] = [entry["loss/total"] for entry in seen[mode].log if "loss/total" in entry]
        if mode != "online":
            hits = [entry["cache/hit"] for entry in seen[mode].log if "cache/hit" in entry]
            masks = seen[mode].masks == seen["online"].masks
            same = masks and losses[mode] == pytest.approx(losses["online"], rel=1e-4)
            is_right = same and hits == [1.0] * STEPS
            cells[mode] = "yes" if is_right else f"{seen[mode].error} {hits} {losses} {masks}"
    finite = len(losses["online"]) == STEPS and all(map(math.isfinite, losses["online"]))
    cells["trained three steps"] = "yes" if finite else f"{seen['online'].error} {losses}"
    arguments = ["timm", "--checkpoint", str(folder / "online"), "--output", str(folder / "out")]
    code = export_weights(arguments)
    cells["exported"] = "yes" if code == 0 else f"exit code {code}"
    return cells


def try_building(recipe: Path, overrides: list[str]) -> str:
    teacher = build_teacher(load_config(recipe, overrides), "cpu", torch.float32)
    assert teacher is not None
    view = teacher(random_images(2, teacher.image_size))
    assert view.attention is not None and view.features is not None
    shapes = tuple(view.attention.shape), tuple(view.features.shape)
    wanted = (2, 16), (2, 16 + teacher.has_cls, teacher.width)
    finite = bool(view.attention.isfinite().all() and view.features.isfinite().all())
    return "yes" if shapes == wanted and finite else f"{shapes}, finite: {finite}"


def write_rows(recipe: Path, overrides: list[str], mode: str) -> None:
    """Compute the rows of a run, or of its first steps, as ``cmtmae precompute`` does."""
    config = load_config(recipe, overrides)
    keyed = "views" if mode == "cached" else "positions"
    builder = make_builder(config, Path(config.run.output_dir), torch.device("cpu"), keyed)
    try:
        folder = cache_folder(config)
        manifest = builder.begin_cache(folder, config.cache.codec, BATCH)
        shards = range(manifest.num_shards if mode == "cached" else STEPS + 1)
        build_shards(builder, folder, manifest, shards)
    finally:
        builder.close()
