"""A study file: runs, their evaluation, and comparisons, all fixed in advance."""

import difflib
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from itertools import chain
from pathlib import Path
from typing import Any, Literal, cast, get_args

from cmtmae_scale.config.overrides import parse_override
from cmtmae_scale.config.shipped import STUDIES, find_recipe
from cmtmae_scale.config.yaml_text import read_yaml
from cmtmae_scale.errors import ConfigError

Features = Literal["patches", "cls"]
Weights = Literal["student", "momentum", "random"]


@dataclass
class Evaluation:
    """Evaluation of every finished run."""

    train: str
    """Labelled images for training the probe and choosing its settings, as ``data.path``."""
    test: str
    """Labelled images for the test."""
    features: Features = "patches"
    """The primary measure: the linear probe on these features of the test images."""
    weights: Weights = "student"
    """Evaluated weights, of rows that do not name others."""
    epochs: int = 100
    """Epochs of the probe over the features."""
    finetune: str | None = None
    """Recipe of a fine-tuning of every run on the same images; ``None``: none."""
    segmentation: str | None = None
    """Images with masks for segmentation on frozen features, train and test in one folder;
    ``None``: none."""


@dataclass
class RowFile:
    """One row of the table."""

    settings: list[str] = field(default_factory=list[str])
    """``group.key=value`` on top of the study's and of ``like``."""
    like: str | None = None
    """An earlier row whose settings apply first; ``None``: none."""
    seeds: list[int] | None = None
    """Values of ``run.seed``; ``None``: the study's."""
    weights: Weights | None = None
    """Evaluated weights; ``None``: the study's. ``random``: the initial weights of a run
    that loads none."""
    note: str = ""
    """Description in the table."""


@dataclass
class Study:
    """A whole study file."""

    recipe: str
    """Recipe of every run."""
    dir: str
    """Folder of runs and results."""
    seeds: list[int]
    """Values of ``run.seed``."""
    evaluation: Evaluation
    """Evaluation of the runs."""
    rows: dict[str, RowFile]
    """Rows of the table, most important first."""
    settings: list[str] = field(default_factory=list[str])
    """``group.key=value`` on top of the recipe, in every row."""
    comparisons: list[list[str]] = field(default_factory=list[list[str]])
    """Pairs of rows ``[better, other]``, as expected in advance."""

    def settings_of(self, name: str) -> list[str]:
        """Return all settings of a row, in the order in which they apply."""
        found: list[list[str]] = []
        like: str | None = name
        while like is not None:
            found.append(self.rows[like].settings)
            like = self.rows[like].like
        return [*self.settings, *chain.from_iterable(reversed(found))]

    def seeds_of(self, name: str) -> list[int]:
        """Return the seeds of a row."""
        own = self.rows[name].seeds
        return self.seeds if own is None else own


def load_study(path: str | Path) -> Study:
    """Read and check a study file, given by its path or its shipped name.

    Raises:
        ConfigError: names the file, the key, the found and the expected value.
    """
    place = str(path)
    tree = read_yaml(find_recipe(path, STUDIES))
    check_keys(tree, Study, place, "")
    evaluation = require_group(tree["evaluation"], place, "evaluation")
    check_keys(evaluation, Evaluation, place, "evaluation.")
    rows = require_group(tree["rows"], place, "rows")
    for name, row in rows.items():
        if row != {}:  # a row may be the recipe as it is
            check_keys(require_group(row, place, f"rows.{name}"), RowFile, place, f"rows.{name}.")
    study = Study(
        **{key: value for key, value in tree.items() if key not in ("evaluation", "rows")},
        evaluation=Evaluation(**evaluation),
        rows={str(name): RowFile(**row) for name, row in rows.items()},
    )
    check_study(study, place)
    return study


def require_group(value: Any, place: str, key: str) -> dict[str, Any]:
    """Return a non-empty mapping.

    Raises:
        ConfigError: if the value is another type, or empty.
    """
    if not isinstance(value, dict) or not value:
        raise ConfigError(f"{place}: {key}={value!r} is a group; give it keys")
    return cast(dict[str, Any], value)


def check_keys(tree: dict[str, Any], schema: type, place: str, prefix: str) -> None:
    """Refuse unknown keys, and require those without a default.

    Raises:
        ConfigError: with the nearest key, or the missing one.
    """
    known = {key_field.name: key_field for key_field in fields(schema)}
    for key in tree:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1, 0.5)
            hint = f"did you mean {near[0]}?" if near else f"its keys are {', '.join(known)}"
            raise ConfigError(f"{place}: {prefix}{key} is not a key of a study; {hint}")
    for name, key_field in known.items():
        required = key_field.default is MISSING and key_field.default_factory is MISSING
        if required and tree.get(name) is None:
            raise ConfigError(f"{place}: {prefix}{name} must be given")


def check_study(study: Study, place: str) -> None:
    """Refuse values that can never work.

    Raises:
        ConfigError: the first problem.
    """
    check_texts(study, ("recipe", "dir"), place)
    check_texts(
        study.evaluation, ("train", "test", "finetune", "segmentation"), f"{place}: evaluation"
    )
    epochs = study.evaluation.epochs
    if not isinstance(epochs, int) or isinstance(epochs, bool) or epochs < 1:
        raise ConfigError(f"{place}: evaluation.epochs={epochs!r} must be a whole number above 0")
    check_choice(study.evaluation.features, Features, f"{place}: evaluation.features")
    check_choice(study.evaluation.weights, Weights, f"{place}: evaluation.weights")
    check_settings(study.settings, place, "settings")
    earlier: set[str] = set()
    for name, row in study.rows.items():
        key = f"rows.{name}"
        check_texts(row, ("note", "like"), f"{place}: {key}")
        check_settings(row.settings, place, f"{key}.settings")
        if row.weights is not None:
            check_choice(row.weights, Weights, f"{place}: {key}.weights")
        if row.like is not None and row.like not in earlier:
            raise ConfigError(f"{place}: {key}.like={row.like} is not a row above it")
        seeds = study.seeds_of(name)
        if not is_list_of(seeds, int) or not seeds or len(set(seeds)) < len(seeds):
            raise ConfigError(f"{place}: {key}: seeds={seeds} must be distinct integers")
        earlier.add(name)
    if not is_list_of(study.comparisons, list):
        raise ConfigError(
            f"{place}: comparisons={study.comparisons!r} must be a list of [better, other]; omit "
            "the key for none"
        )
    for pair in study.comparisons:
        if not is_list_of(pair, str) or len(pair) != 2 or pair[0] == pair[1]:
            raise ConfigError(f"{place}: comparisons: {pair} must be two rows, [better, other]")
        for name in pair:
            if name not in study.rows:
                raise ConfigError(f"{place}: comparisons: {name} is not a row")
        if study.comparisons.count(pair) > 1:
            raise ConfigError(f"{place}: comparisons: {pair} is named twice; name it once")


def check_texts(group: Any, names: Sequence[str], place: str) -> None:
    """Refuse values that are not text; ``None`` where a key may be omitted.

    Raises:
        ConfigError: names the key.
    """
    for one in fields(group):
        value = getattr(group, one.name)
        if one.name in names and not (isinstance(value, str) or value is one.default is None):
            raise ConfigError(f"{place}: {one.name}={value!r} is not text; put it in quotes")


def check_choice(found: Any, allowed: Any, key: str) -> None:
    """Refuse a value that is not of a closed set.

    Raises:
        ConfigError: with the choices.
    """
    if found not in get_args(allowed):
        raise ConfigError(f"{key}={found!r} is not one of {', '.join(get_args(allowed))}")


def check_settings(settings: list[str], place: str, key: str) -> None:
    """Refuse values other than overrides, and overrides of keys that the study sets itself.

    Raises:
        ConfigError: names the value or override.
    """
    if not is_list_of(settings, str):
        raise ConfigError(f"{place}: {key}={settings!r} must be a list of group.key=value")
    for text in settings:
        try:
            parse_override(text)
        except ConfigError as error:
            raise ConfigError(f"{place}: {key}: {error}") from None
        for reserved in ("run.", "cache.dir=", "train.stop_after="):
            if text.startswith(reserved):
                raise ConfigError(f"{place}: {key}: {text}: the study sets {reserved.rstrip('=.')}")


def is_list_of(value: Any, kind: type) -> bool:
    """Return whether a value is a list of one type."""
    return isinstance(value, list) and all(
        isinstance(item, kind) and not isinstance(item, bool) for item in cast(list[Any], value)
    )
