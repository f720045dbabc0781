"""Every number of every config is refused outside the range that its field's metadata gives."""

import copy
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from cmtmae_scale.config.check import check_ranges
from cmtmae_scale.config.finetune import Finetune, load_finetune
from cmtmae_scale.config.load import load_config
from cmtmae_scale.config.ranges import Range, walk_fields
from cmtmae_scale.config.schema import Config
from cmtmae_scale.errors import ConfigError

TEACHER = {"library": "timm", "model": "vit_small_patch14_dinov2", "weights": "random"}
TREE = {"run": {"output_dir": "runs/x"}, "data": {"path": "photos"}, "train": {"steps": 10}}
TASKS: list[tuple[type, Callable[..., Any], dict[str, Any]]] = [
    (Config, load_config, TREE | {"teacher": TEACHER}),
    (Finetune, load_finetune, TREE | {"data": {"path": "photos", "test_path": "test"}}),
]
every_task = pytest.mark.parametrize(
    ("schema", "load", "tree"), TASKS, ids=["pretrain", "finetune"]
)


def outside(legal: Range) -> Iterator[float]:
    """Numbers just outside a range."""
    if legal.above is not None:
        yield legal.above
    if legal.at_least is not None:
        yield legal.at_least - 1
    if legal.at_most is not None:
        yield legal.at_most + 1
    if legal.below is not None:
        yield legal.below


def put(config: Any, key: str, number: float) -> None:
    """Set a field, or each of its items, past every check."""
    *groups, name = key.split(".")
    owner = functools.reduce(getattr, groups, config)
    one = next(field for field in fields(owner) if field.name == name)
    setattr(owner, name, (number, number) if takes_several(one) else number)


def takes_several(one: "Field[Any]") -> bool:
    return re.match("tuple|list", str(one.type)) is not None


def written(one: "Field[Any]", number: float) -> str:
    """A number in the notation of a field's override."""
    text = {math.inf: ".inf", -math.inf: "-.inf"}.get(number, f"{number:g}")
    text = ".nan" if math.isnan(number) else text
    return f"[{text}, {text}]" if takes_several(one) else text


def takes_floats(one: "Field[Any]") -> bool:
    return "float" in str(one.type) or one.metadata.get("schedule", False)


@pytest.fixture
def recipe(tmp_path: Path, tree: dict[str, Any]) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def message(load: Callable[..., Any], recipe: Path, override: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(recipe, [override])
    return str(caught.value).removeprefix(f"{recipe}: ")


@every_task
def test_every_range_of_the_schema_is_checked(
    schema: type, load: Callable[..., Any], recipe: Path
) -> None:
    config = load(recipe)
    ranges = {key: one for key, one in walk_fields(schema) if "range" in one.metadata}
    assert len(ranges) > 20 and [*check_ranges(config)] == []
    for key, one in ranges.items():
        for number in outside(one.metadata["range"]):
            changed = copy.deepcopy(config)
            put(changed, key, number)
            (text,) = check_ranges(changed)
            assert text.startswith(f"{key}=") and text.endswith(f" {one.metadata['range']}")


@every_task
@pytest.mark.parametrize(
    "start", [0, *(pytest.param(start, marks=pytest.mark.slow) for start in (1, 2))]
)
def test_numbers_that_are_not_finite_are_refused(
    schema: type, load: Callable[..., Any], recipe: Path, start: int
) -> None:
    """Each key with one of three numbers in turn; the three starts try every pair."""
    numbers = {key: one for key, one in walk_fields(schema) if takes_floats(one)}
    assert len(numbers) > 10
    in_turn = itertools.islice(itertools.cycle((math.nan, math.inf, -math.inf)), start, None)
    for (key, one), number in zip(numbers.items(), in_turn, strict=False):
        text = message(load, recipe, f"{key}={written(one, number)}")
        assert text.startswith(f"{key}=") and text.endswith("must be finite")


@pytest.mark.parametrize(("schema", "load", "tree"), TASKS[:1])
@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("mask.ratio=1.5", "mask.ratio=1.5 must lie in (0, 1)"),
        ("train.steps=0", "train.steps=0 must be above 0"),
        ("loss.teacher=-1", "loss.teacher=-1.0 must not be negative"),
        ("optimizer.betas=[0.9, 1.0]", "optimizer.betas=(0.9, 1.0) must lie in [0, 1)"),
        ("views.crop_scale=[0.9, 0.2]", "views.crop_scale=(0.9, 0.2) must be in ascending order"),
        ("views.crop_scale=[0, 1]", "views.crop_scale=(0.0, 1.0) must lie in (0, 1]"),
        ("train.steps=.nan", "train.steps: Value 'nan'"),
        ("collaboration.alpha_target=2", "collaboration.alpha_target=2.0 must lie in [0, 1]"),
        (
            "mask.salient_fraction={kind: linear, start: 0, end: .nan}",
            "mask.salient_fraction.end=nan must be finite",
        ),
        (
            "mask.salient_fraction={kind: linear, start: 0, end: 2}",
            "mask.salient_fraction.end=2.0 must lie in [0, 1]",
        ),
    ],
)
def test_messages_of_ranges_have_one_form(
    load: Callable[..., Any], recipe: Path, schema: type, override: str, expected: str
) -> None:
    text = message(load, recipe, override)
    assert expected in text and "\n" not in text


@every_task
def test_none_is_allowed_where_the_type_allows_it(
    schema: type, load: Callable[..., Any], recipe: Path
) -> None:
    optional = [key for key, one in walk_fields(schema) if "float | None" in str(one.type)]
    for key in optional:
        load(recipe, [f"{key}=null", "train.steps=10"])
