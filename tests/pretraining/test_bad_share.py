"""How many undecodable images a run tolerates, and where it names them."""

import json
from pathlib import Path

import numpy as np
import pytest

from dataloading.order import sample_ids
from tests.engine.run_case import run, run_twice, write_recipe
from tests.processes import run_ranks

pytestmark = pytest.mark.gloo
SAMPLES = 20


def recipe_with_bad(folder: Path, positions: list[int]) -> tuple[Path, list[Path]]:
    """A recipe whose draws at some places of the first epoch are cut short."""
    recipe = write_recipe(folder)
    root = folder / "photos"
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.jpg"))
    ids, _ = sample_ids(SAMPLES, 0, np.array(positions))
    paths = [root / names[i] for i in ids]
    for path in paths:
        path.write_bytes(path.read_bytes()[:-400])
    return recipe, paths


def test_one_bad_picture_early_stops_nothing(tmp_path: Path) -> None:
    recipe, _ = recipe_with_bad(tmp_path, [3])
    assert run_ranks(1, run, recipe, ["train.stop_after=2"]) == ["train.stop_after=2"]
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["valid_rows"] for line in lines] == [7, 8]


def test_more_than_the_share_stops_with_counts_and_the_list(tmp_path: Path) -> None:
    recipe, _ = recipe_with_bad(tmp_path, [3, 9])
    with pytest.raises(AssertionError) as caught:
        run_ranks(1, run, recipe, ["data.max_bad_fraction=0.1"])
    expected = (
        "ConfigError: step 2: 2 of 16 views (12.50%) could not be decoded, more than "
        "data.max_bad_fraction=0.1; replace the files that "
        f"{tmp_path / 'run' / 'quarantine.jsonl'} names, or raise that key"
    )
    assert expected in str(caught.value)
    relaxed = [
        "data.max_bad_fraction=0.13",
        "train.stop_after=2",
        f"run.output_dir={tmp_path / 'relaxed'}",
    ]
    assert run_ranks(1, run, recipe, relaxed) == ["train.stop_after=2"]


def test_ranks_and_restarts_name_each_bad_picture_once(tmp_path: Path) -> None:
    """Over two epochs both ranks draw them; the second launch draws them again."""
    recipe, paths = recipe_with_bad(tmp_path, [3, 9, 14])
    always = "data.max_bad_fraction=0.9"
    run_ranks(2, run_twice, recipe, [always, "train.stop_after=4"], [always])
    lines = (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert sorted(record["path"] for record in records) == sorted(map(str, paths))
    assert all(record["offset"] is None and record["reason"] for record in records)
