"""Errors of study files name the mistake and its place."""

from pathlib import Path
from typing import Any

import pytest

from cmtmae_scale.errors import ConfigError
from cmtmae_scale.tools.study.file import load_study
from tests.tools.study.study_case import study_tree, write_study


def changed(tree: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    *groups, last = key.split(".")
    place = tree
    for group in groups:
        place = place[group]
    place[last] = value
    return tree


def test_settings_of_a_row_come_after_the_studys_and_after_those_of_like(tmp_path: Path) -> None:
    study = load_study(write_study(tmp_path, study_tree(tmp_path)))
    assert study.settings_of("half") == [
        *("train.steps=4", "views.views_per_image=1", "teacher.mode=cached", "mask.ratio=0.5")
    ]
    assert (study.seeds_of("cmt"), study.seeds_of("half")) == ([0, 1], [0])
    assert (study.evaluation.features, study.evaluation.weights) == ("patches", "student")


MISTAKES = [
    ("recipy", "x", "recipy is not a key of a study; did you mean recipe?"),
    ("seeds", None, "seeds must be given"),
    ("seeds", [0, 0], "rows.mae: seeds=[0, 0] must be distinct integers"),
    ("seeds", 3, "rows.mae: seeds=3 must be distinct integers"),
    ("rows", {}, "rows={} is a group; give it keys"),
    ("rows.mae.seed", 1, "rows.mae.seed is not a key of a study; did you mean seeds?"),
    ("rows.mae.like", "cmt", "rows.mae.like=cmt is not a row above it"),
    ("rows.half.seeds", [True], "rows.half: seeds=[True] must be distinct integers"),
    ("rows.cmt.settings", "a.b=1", "rows.cmt.settings='a.b=1' must be a list of group.key=value"),
    ("rows.cmt.settings", ["ratio"], "rows.cmt.settings: ratio: is not an override"),
    ("settings", ["run.seed=3"], "settings: run.seed=3: the study sets run"),
    ("settings", ["cache.dir=x"], "settings: cache.dir=x: the study sets cache.dir"),
    ("evaluation", None, "evaluation must be given"),
    ("evaluation", "train", "evaluation='train' is a group; give it keys"),
    ("evaluation.test", None, "evaluation.test must be given"),
    ("evaluation.features", "patch", "evaluation.features='patch' is not one of patches, cls"),
    ("evaluation.epochs", 0, "evaluation.epochs=0 must be a whole number above 0"),
    ("evaluation.epochs", "many", "evaluation.epochs='many' must be a whole number above 0"),
    ("evaluation.train", 5, "evaluation: train=5 is not text; put it in quotes"),
    ("evaluation.segmentation", ["a"], "evaluation: segmentation=['a'] is not text"),
    ("rows.mae.note", 2024, "rows.mae: note=2024 is not text; put it in quotes"),
    ("recipe", 3, "recipe=3 is not text"),
    ("comparisons", [["cmt", "may"]], "comparisons: may is not a row"),
    ("comparisons", [["cmt"]], "comparisons: ['cmt'] must be two rows, [better, other]"),
    ("comparisons", [["cmt", "mae"]] * 2, "comparisons: ['cmt', 'mae'] is named twice"),
    ("comparisons", None, "comparisons=None must be a list of [better, other]"),
    ("comparisons", 3, "comparisons=3 must be a list of [better, other]"),
]


@pytest.mark.parametrize(("key", "value", "expected"), MISTAKES)
def test_a_mistake_is_named(tmp_path: Path, key: str, value: Any, expected: str) -> None:
    path = write_study(tmp_path, changed(study_tree(tmp_path), key, value))
    with pytest.raises(ConfigError) as caught:
        load_study(path)
    assert expected in str(caught.value) and str(path) in str(caught.value)
