"""A study file: which runs, how they are judged, and what is compared; all named beforehand."""

import difflib
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, cast, get_args

from cmtmae_scale.config.load import parse_override, read_yaml
from cmtmae_scale.errors import ConfigError

Features = Literal["patches", "cls"]
Weights = Literal["student", "momentum"]


@dataclass
class Evaluation:
    """How every run is judged when it is done."""

    train: str
    """Labelled images that the probe learns from and chooses its settings on, as ``data.path``."""
    test: str
    """Labelled images that it is tested on, once."""
    features: Features = "patches"
    """The primary measure: the linear probe on these features of the test images."""
    weights: Weights = "student"
    """Whose weights are judged, in every row."""
    epochs: int = 100
    """Passes of the probe over the features."""


@dataclass
class RowFile:
    """One line of the table."""

    settings: list[str] = field(default_factory=list[str])
    """``group.key=value`` on top of the study's and of ``like``."""
    like: str | None = None
    """An earlier row whose settings come first; ``None``: none."""
    seeds: list[int] | None = None
    """Values of ``run.seed``; ``None``: the study's."""
    note: str = ""
    """A few words for the table."""


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
    """How runs are judged."""
    rows: dict[str, RowFile]
    """The table, in order of worth."""
    settings: list[str] = field(default_factory=list[str])
    """``group.key=value`` on top of the recipe, in every row."""
    comparisons: list[list[str]] = field(default_factory=list[list[str]])
    """Pairs of rows; the first is expected to be better."""

    def settings_of(self, name: str) -> list[str]:
        """All settings of a row, in the order in which they apply."""
        row = self.rows[name]
        before = self.settings if row.like is None else self.settings_of(row.like)
        return [*before, *row.settings]

    def seeds_of(self, name: str) -> list[int]:
        """Seeds of a row."""
        own = self.rows[name].seeds
        return self.seeds if own is None else own


def load_study(path: str | Path) -> Study:
    """Read and check a study file.

    Raises:
        ConfigError: names the file, the key, what was found and what would do.
    """
    place = str(path)
    tree = read_yaml(Path(path))
    check_keys(tree, Study, place, "")
    check_keys(group(tree["evaluation"], place, "evaluation"), Evaluation, place, "evaluation.")
    rows = group(tree["rows"], place, "rows")
    for name, row in rows.items():
        if row != {}:  # a row may be the recipe as it is
            check_keys(group(row, place, f"rows.{name}"), RowFile, place, f"rows.{name}.")
    study = Study(
        **{key: value for key, value in tree.items() if key not in ("evaluation", "rows")},
        evaluation=Evaluation(**tree["evaluation"]),
        rows={str(name): RowFile(**row) for name, row in rows.items()},
    )
    check_study(study, place)
    return study


def group(value: Any, place: str, key: str) -> dict[str, Any]:
    """A mapping that is not empty.

    Raises:
        ConfigError: if it is none.
    """
    if not isinstance(value, dict) or not value:
        raise ConfigError(f"{place}: {key}={value!r} is a group; give it keys")
    return cast(dict[str, Any], value)


def check_keys(tree: dict[str, Any], schema: type, place: str, prefix: str) -> None:
    """Refuse keys that a group lacks, and demand those that it needs.

    Raises:
        ConfigError: with the nearest key, or the missing one.
    """
    known = {one.name: one for one in fields(schema)}
    for key in tree:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1, 0.5)
            hint = f"did you mean {near[0]}?" if near else f"its keys are {', '.join(known)}"
            raise ConfigError(f"{place}: {prefix}{key} is not a key of a study; {hint}")
    for name, one in known.items():
        needed = one.default is MISSING and one.default_factory is MISSING
        if needed and tree.get(name) is None:
            raise ConfigError(f"{place}: {prefix}{name} must be given")


def check_study(study: Study, place: str) -> None:
    """Refuse what can never work.

    Raises:
        ConfigError: the first problem.
    """
    for key, allowed in (("features", Features), ("weights", Weights)):
        found = getattr(study.evaluation, key)
        if found not in get_args(allowed):
            choices = ", ".join(get_args(allowed))
            raise ConfigError(f"{place}: evaluation.{key}={found!r} is not one of {choices}")
    check_settings(study.settings, place, "settings")
    earlier: list[str] = []
    for name, row in study.rows.items():
        key = f"rows.{name}"
        check_settings(row.settings, place, f"{key}.settings")
        if row.like is not None and row.like not in earlier:
            raise ConfigError(f"{place}: {key}.like={row.like} is not a row above it")
        seeds = study.seeds_of(name)
        if not is_list(seeds, int) or not seeds or len(set(seeds)) < len(seeds):
            raise ConfigError(f"{place}: {key}: seeds={seeds} must be different whole numbers")
        earlier.append(name)
    for pair in study.comparisons:
        if not is_list(pair, str) or len(pair) != 2 or pair[0] == pair[1]:
            raise ConfigError(f"{place}: comparisons: {pair} must be two rows, [better, other]")
        for name in pair:
            if name not in study.rows:
                raise ConfigError(f"{place}: comparisons: {name} is not a row")


def check_settings(settings: list[str], place: str, key: str) -> None:
    """Refuse what is no list of overrides, or sets what the study itself sets.

    Raises:
        ConfigError: naming it.
    """
    if not is_list(settings, str):
        raise ConfigError(f"{place}: {key}={settings!r} must be a list of group.key=value")
    for text in settings:
        try:
            parse_override(text)
        except ConfigError as error:
            raise ConfigError(f"{place}: {key}: {error}") from None
        for own in ("run.", "cache.dir=", "train.stop_after="):
            if text.startswith(own):
                raise ConfigError(f"{place}: {key}: {text}: the study sets {own.rstrip('=.')}")


def is_list(value: Any, kind: type) -> bool:
    """Whether a value is a list of one kind."""
    return isinstance(value, list) and all(
        isinstance(item, kind) and not isinstance(item, bool) for item in cast(list[Any], value)
    )
