"""Every recipe has a header, loads, and has a dry run without data."""

import re
import shlex
from pathlib import Path

import pytest

from cmtmae_scale.commands.dry_run import dry_run
from cmtmae_scale.commands.finetune import parse_options
from cmtmae_scale.config.finetune import load_finetune
from cmtmae_scale.config.hints import RENAMED
from cmtmae_scale.config.load import load_config
from cmtmae_scale.runtime.launch import World

ROOT = Path(__file__).resolve().parents[1]
ALL = sorted((ROOT / "configs").glob("*.yaml"))
TUNINGS = [path for path in ALL if path.stem.startswith("finetune_")]
RECIPES = [path for path in ALL if path not in TUNINGS]
HEADER = ("# Purpose:", "# Source and deviations:", "# Hardware and cost:", "# Command:")
NAMES = {
    *("vit_base", "vit_large", "vit_huge", "vit_base_hide", "vit_large_hide", "vit_huge_hide"),
    *(
        "vit_base_literal",
        "vit_large_448",
        "mae_base",
        "mae_large",
        "milan_base",
        "vit_base_no_decoder",
        "demo",
        "tiny_imagenet",
    ),
}
OFTEN = ("demo", "vit_huge", "mae_base")
"""Recipes whose dry run every ``make test`` tries."""
every_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
every_tuning = pytest.mark.parametrize("recipe", TUNINGS, ids=lambda path: path.stem)


def header(recipe: Path) -> str:
    lines = recipe.read_text().splitlines()
    return "\n".join(lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])


def commands(recipe: Path) -> list[list[str]]:
    """Arguments after ``--config`` of each command in the header."""
    text = header(recipe).split("# Command:")[1]
    lines = [line for line in text.splitlines() if "--config" in line]
    return [shlex.split(line.split("--config")[1]) for line in lines]


def test_the_recipes_are_those_of_the_readme() -> None:
    assert {recipe.stem for recipe in RECIPES} == NAMES
    readme = (ROOT / "README.md").read_text()
    assert all(f"`{path.stem}`" in readme for path in ALL)


@pytest.mark.parametrize("recipe", ALL, ids=lambda path: path.stem)
def test_a_recipe_opens_with_its_header(recipe: Path) -> None:
    marks = [mark for line in header(recipe).splitlines() for mark in HEADER if mark in line]
    assert marks == list(HEADER)


@every_recipe
def test_the_commands_of_the_header_load(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert commands(recipe)
    for path, *overrides in commands(recipe):
        assert load_config(path, overrides) is not None
        assert path == f"configs/{recipe.name}"


@every_tuning
def test_the_commands_of_a_tunings_header_load(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    text = header(recipe).split("# Command:")[1].replace("#", " ")
    lines = text.split("cmtmae_scale finetune")[1:]
    assert len(lines) == 2
    for line in lines:
        options = parse_options(shlex.split(re.split("torchrun|python", line)[0]))
        assert options.config == f"configs/{recipe.name}"
        assert load_finetune(options.config, options.overrides) is not None


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(one, id=one.stem, marks=() if one.stem in OFTEN else pytest.mark.slow)
        for one in RECIPES
    ],
)
def test_a_dry_run_needs_no_data(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(recipe)
    monkeypatch.chdir(tmp_path)
    if config.teacher.weights and config.teacher.weights.endswith(".safetensors"):
        config.teacher.weights = "random"  # the demo makes its teacher's file first
    text, _ = dry_run(config, World(0, 2, 0, 2, "none"))
    if config.data.expected_images is not None:
        assert f"{config.data.expected_images} (data.expected_images; not counted)" in text
    for part in ("encoder", "GFLOP per view", "at the peak", "would resume    nothing"):
        assert part in text


def test_no_comment_of_a_recipe_names_an_old_key() -> None:
    for path in (ROOT / "configs").rglob("*.yaml"):
        found = [key for key in RENAMED if f"{key}=" in path.read_text()]
        assert not found, (path, found)
