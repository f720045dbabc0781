"""Tiny runs with two teachers, one after the other in one process."""

import copy
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import yaml

from cmtmae_scale.cache.build import build_shards, make_builder
from cmtmae_scale.cache.format import SHARDS
from cmtmae_scale.commands.precompute import precompute_teacher
from cmtmae_scale.config.load import load_config
from cmtmae_scale.config.teachers import pick_teacher
from cmtmae_scale.errors import TeacherError
from tests.engine.run_case import build, run, write_recipe
from tests.pretraining.cached_run_case import observe

STEPS = 2
TEACHERS: list[dict[str, Any]] = [
    {"name": "first", "library": "timm", "model": "test_vit", "weights": "random", "depth": 1}
    | {"feature": "block"},
    {"name": "second", "library": "timm", "model": "test_vit", "weights": "random", "depth": 2}
    | {"feature": "ln_post", "image_size": 96, "attention_source": "mean_query"}
    | {"norm": "channel", "loss": 0.5, "map": 2.0},
]
"""The second's grid of 6 x 6 is resized to the student's 4 x 4."""
SHORT = [f"train.steps={STEPS}", f"checkpoint.every={STEPS}", "views.views_per_image=2"]


def write_several(folder: Path, teachers: list[dict[str, Any]] = TEACHERS) -> Path:
    """A recipe with several teachers, and its images."""
    recipe = write_recipe(folder, depth=1)
    tree = yaml.safe_load(recipe.read_text())
    del tree["teacher"]
    recipe.write_text(yaml.safe_dump(tree | {"teachers": copy.deepcopy(teachers)}))
    return recipe


def cache_of(folder: Path, *names: str) -> list[str]:
    """Overrides of a run in which some teachers are read from caches under a folder."""
    modes = [f"teachers.{name}.mode=cached" for name in names]
    return [*SHORT, *modes, f"cache.dir={folder}"]


def build_cache(recipe: Path, overrides: list[str], name: str) -> int:
    """Build the cache of a teacher as a user does; returns the exit code."""
    place = ["--config", str(recipe), *overrides, f"run.output_dir={recipe.parent / 'unused'}"]
    return precompute_teacher([*place, "--teacher", name])


def try_modes(recipe: Path) -> dict[str, Any]:
    """Runs with both teachers online, rounded and cached, and a teacher that fails."""
    folder, exact = recipe.parent, recipe.parent / "exact"
    drawn = [f"log.images_every={STEPS}", f"log.diagnostics_every={STEPS}"]
    own = [*SHORT, f"cache.dir={exact}", "cache.codec=bf16"]
    bare = [*cache_of(exact, "first", "second"), "cache.on_miss=stop"]
    return {
        "codes": [build_cache(recipe, own, one["name"]) for one in TEACHERS],
        "online": observe(recipe, folder / "online", [*SHORT, *drawn]),
        "rounded": observe(recipe, folder / "rounded", SHORT, "rounded"),
        "cached": observe(recipe, folder / "cached", bare, "alone"),
        "failure": fail_on_a_view(recipe, folder / "failing"),
    }


def try_more(recipe: Path) -> dict[str, Any]:
    """Runs after ``try_modes``: one teacher cached, a missing row, sidecars, and a resume."""
    folder, small = recipe.parent, recipe.parent / "small"
    build_cache(recipe, [*SHORT, f"cache.dir={small}"], "second")
    mixed = observe(recipe, folder / "mixed", cache_of(small, "second"))
    shutil.rmtree(small / "second" / SHARDS)
    stop = [*cache_of(small, "second"), "cache.on_miss=stop"]
    run(recipe, [f"run.output_dir={folder / 'resumed'}", *SHORT, "train.stop_after=1"])
    return {
        "mixed": mixed,
        "missing": observe(recipe, folder / "missing", stop),
        "sidecar": observe(recipe, folder / "sidecar", compute_ahead(recipe, folder / "sidecar")),
        "resumed": observe(recipe, folder / "resumed", cache_of(folder / "exact", "first")),
    }


def compute_ahead(recipe: Path, run_dir: Path) -> list[str]:
    """Compute the rows of all steps as the sidecar of each teacher; returns the run's overrides."""
    names = [one["name"] for one in TEACHERS]
    modes = [f"teachers.{name}.mode=sidecar" for name in names]
    settings = [*SHORT, *modes, "cache.codec=bf16"]
    config = load_config(recipe, [*settings, f"run.output_dir={run_dir}"])
    for name in names:
        alone = pick_teacher(config, name)
        builder = make_builder(alone, run_dir / "index", torch.device("cpu"), "positions")
        manifest = builder.begin_cache(run_dir / "cache" / name, "bf16", 8)
        build_shards(builder, run_dir / "cache" / name, manifest, range(STEPS + 1))
        builder.close()
    return settings


def fail_on_a_view(recipe: Path, run_dir: Path) -> str:
    """The error of a run whose second teacher fails on a view."""
    from cmtmae_scale.engine.loop import train

    with ExitStack() as stack:
        built = build(recipe, [f"run.output_dir={run_dir}", *SHORT], stack)
        second = built.task.models.teachers["second"]
        forward = second.forward_batch

        def fail(batch: Any) -> Any:
            view = forward(batch)
            features = torch.full_like(view.features, torch.nan)
            return view._replace(features=features)

        second.forward_batch = fail
        try:
            train(built)
        except TeacherError as error:
            return str(error)
    return ""


def same_as_single(folder: Path) -> tuple[Path, Path]:
    """Run a list of one teacher, and the same teacher in the single form."""
    (folder / "list").mkdir()
    (folder / "single").mkdir()
    one = TEACHERS[0] | {"loss": 3.0, "map": 0.5}
    recipe = write_several(folder / "list", [one])
    tree = yaml.safe_load(recipe.read_text())
    alone = tree | {"teacher": {k: v for k, v in TEACHERS[0].items() if k != "name"}}
    del alone["teachers"]
    other = folder / "single" / "recipe.yaml"
    other.write_text(yaml.safe_dump(alone))
    for recipe_of in (recipe, other):
        run(recipe_of, [f"run.output_dir={recipe_of.parent / 'run'}", *SHORT])
    return recipe.parent / "run", other.parent / "run"
