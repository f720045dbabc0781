"""Build one checked config from YAML and ``key=value`` overrides.

Precedence: default < YAML < override. A YAML file is read alone: no inheritance, no interpolation.
"""

import copy
import dataclasses
import re
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import yaml
from omegaconf import MISSING, OmegaConf, SCMode

from cmtmae_scale.config.check import find_problems
from cmtmae_scale.config.convert import PLAIN, convert_entries, convert_values, parse_schedule
from cmtmae_scale.config.deepspeed import extra_keys
from cmtmae_scale.config.keys import (
    check_keys,
    entry_type,
    field_types,
    is_text_key,
    key_fields,
    plain,
    schedule_keys,
)
from cmtmae_scale.config.overrides import blame, name_override, other_length, parse_override
from cmtmae_scale.config.schema import Config, Schedule, Trained
from cmtmae_scale.config.shipped import find_recipe
from cmtmae_scale.config.yaml_text import read_yaml, refuse_interpolation
from cmtmae_scale.errors import ConfigError
from dataloading.addresses import hide_secrets
from dataloading.files import atomic_path

Recipe = TypeVar("Recipe")
Check = Callable[[Recipe], Iterable[str]]
"""Function that yields the problems of a config."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a recipe of pre-training, apply overrides and check the whole; see ``load_recipe``."""
    config = load_recipe(Config, find_problems, path, overrides)
    extra_keys(config.backend.deepspeed)
    return config


def load_recipe(
    schema: type[Recipe], check: Check[Recipe], path: str | Path, overrides: Sequence[str]
) -> Recipe:
    """Read a recipe, apply overrides and check the whole.

    Args:
        schema: dataclass of the config.
        check: yields the problems of a config.
        path: a YAML file with the groups of ``schema``, or the name of a shipped recipe.
        overrides: ``group.key=value``, values in YAML's notation, text as it is; ``null`` means
            off.

    Returns:
        Plain dataclasses, every field set.

    Raises:
        ConfigError: names the file or override, the key, what was found and the remedy.
    """
    return read_recipe(schema, check, path).override(overrides).build()


def read_recipe(schema: type[Recipe], check: Check[Recipe], path: str | Path) -> "Draft[Recipe]":
    """Read a recipe's file without checking the whole; see ``load_recipe``."""
    tree = read_yaml(find_recipe(path), partial(is_text_key, schema))
    return Draft[Recipe].of_defaults(schema, check, str(path)).merge(tree, str(path))


def config_from_dict(tree: dict[str, Any], place: str) -> Config:
    """Rebuild a config that ``config_to_dict`` wrote; for resuming and evaluation."""
    return recipe_from_dict(Config, find_problems, tree, place)


def recipe_from_dict(
    schema: type[Recipe], check: Check[Recipe], tree: dict[str, Any], place: str
) -> Recipe:
    """Rebuild the config of any task that ``config_to_dict`` wrote; ``place`` is for messages."""
    try:
        return Draft[Recipe].of_defaults(schema, check, place).merge(tree, place).build()
    except RecursionError as error:
        raise ConfigError(f"{place}: the config is nested too deeply") from error


@dataclasses.dataclass(frozen=True)
class Draft(Generic[Recipe]):
    """A config to which settings are still added; its combinations are not checked yet.

    Each method returns another draft, so that many configs share a recipe that is read once.
    """

    schema: type[Recipe]
    check: Check[Recipe]
    place: str
    """Name of the recipe, for messages."""
    types: Any
    """OmegaConf's typed config of the schema, which converts values; its own values are unused."""
    values: dict[str, Any]
    """Converted value of each full key; ``MISSING`` where the recipe must give a value."""
    overrides: tuple[str, ...] = ()
    schedules: dict[str, Schedule | float] = dataclasses.field(
        default_factory=dict[str, Schedule | float]
    )
    """Parsed schedules by their text, which the drafts of a recipe share."""

    @classmethod
    def of_defaults(cls, schema: type[Recipe], check: Check[Recipe], place: str) -> "Draft[Recipe]":
        """Return the draft of a recipe without keys."""
        return cls(schema, check, place, *default_values(schema))

    def merge(self, tree: dict[str, Any], place: str) -> "Draft[Recipe]":
        """Return the draft with the values of a tree; mappings are merged into earlier mappings.

        A schedule with a ``kind`` replaces the earlier schedule as a whole.
        """
        with tidy_errors():
            values = self.values | self.convert(tree, place)
        return dataclasses.replace(self, values=values)

    def convert(self, tree: dict[str, Any], place: str) -> dict[str, Any]:
        """Return the values of a tree by full key, in the types of their keys; see ``merge``."""
        refuse_interpolation(tree, place)
        check_keys(tree, self.schema, self.schema, place)
        given: dict[str, Any] = {}
        for key, value in leaves(tree, key_fields(self.schema)):
            before = self.values[key]
            entry = entry_type(field_types(self.schema).get(key))
            if entry is not None:
                given[key] = convert_entries(before, value, entry, place, key)
                continue
            if isinstance(value, dict) and isinstance(before, dict):
                whole, update = cast(dict[str, Any], before), cast(dict[str, Any], value)
                replaces = key in schedule_keys(self.schema) and "kind" in update
                value = update if replaces else merged(whole, update)
            if value != MISSING:
                given[key] = value
        return convert_values(self.types, given, self.schema, place)

    def override(self, overrides: Sequence[str]) -> "Draft[Recipe]":
        """Return the draft with ``group.key=value`` applied, in order."""
        draft, keys = self, key_fields(self.schema)
        is_text = partial(is_text_key, self.schema)
        for override in overrides:
            update = parse_override(override, keys, is_text)
            place = name_override(override, keys)
            draft = draft.merge(update, place)
            cleared = other_length(update)
            if cleared:
                draft = draft.merge({"train": {cleared: None}}, place)
        return dataclasses.replace(draft, overrides=(*self.overrides, *overrides))

    def build(self) -> Recipe:
        """Build the dataclasses, resolve schedules, refuse missing keys, run the checks.

        Raises:
            ConfigError: names the overrides that set the keys of a problem, else the recipe.
        """
        absent = sorted(key for key, value in self.values.items() if has_missing(value))
        if absent:
            raise ConfigError(f"{self.place}: {', '.join(absent)} must be given")
        values = dict(self.values)
        with tidy_errors():
            for key in schedule_keys(self.schema):
                text = repr(values[key])
                if text not in self.schedules:
                    at = blame(key, self.place, self.overrides)
                    self.schedules[text] = parse_schedule(values[key], at, key)
                values[key] = self.schedules[text]
            config = instantiate(self.schema, values)
            for problem in self.check(config):
                raise ConfigError(f"{blame(problem, self.place, self.overrides)}: {problem}")
        return config


@contextmanager
def tidy_errors() -> Generator[None, None, None]:
    """Remove users, passwords and queries of addresses from errors, which repeat values.

    A place that repeats the override with which the problem begins is named once.
    """
    try:
        yield
    except ConfigError as error:
        text = re.sub(r"^(.+=.*?): (?=\1[ :,])", "", str(error))
        raise ConfigError(hide_secrets(text)) from None


def leaves(
    tree: dict[str, Any], keys: Collection[str], prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """Yield the values of a tree by full key; ``keys`` are the schema's, all others groups."""
    for name, value in tree.items():
        full = f"{prefix}{name}"
        if full in keys:
            yield full, value
        else:
            yield from leaves(value, keys, f"{full}.")


def merged(before: dict[str, Any], update: dict[str, Any]) -> dict[str, Any]:
    """Return a mapping updated recursively with another mapping."""
    found = dict(before)
    for name, value in update.items():
        both = isinstance(found.get(name), dict) and isinstance(value, dict)
        found[name] = merged(found[name], cast(Any, value)) if both else value
    return found


def has_missing(value: Any) -> bool:
    """Return whether a value, or a value inside it, must still be given."""
    if isinstance(value, dict):
        return any(map(has_missing, cast(dict[Any, Any], value).values()))
    if isinstance(value, list | tuple):
        return any(map(has_missing, cast(Sequence[Any], value)))
    return isinstance(value, str) and value == MISSING


def instantiate(schema: type[Recipe], values: dict[str, Any], prefix: str = "") -> Recipe:
    """Build the dataclasses of a schema from values by full key."""
    given: dict[str, Any] = {}
    for name, kind in field_types(schema).items():
        key = f"{prefix}{name}"
        if key not in values:
            given[name] = instantiate(kind, values, f"{key}.")
        else:
            value = values[key]  # drafts share lists and schedules
            given[name] = value if isinstance(value, PLAIN) else copy.deepcopy(value)
            entry = entry_type(kind)
            if entry is not None:
                given[name] = [entry(**one) for one in given[name]]
    return schema(**given)


def config_to_dict(config: Trained) -> dict[str, Any]:
    """Turn a config into plain lists, dicts and numbers, fit for YAML and JSON."""
    return cast(dict[str, Any], plain(dataclasses.asdict(cast(Any, config))))


def save_config(config: Trained, path: Path) -> None:
    """Write a resolved config as YAML that ``load_recipe`` reads back."""
    with atomic_path(path) as draft:
        draft.write_text(yaml.safe_dump(config_to_dict(config), sort_keys=False))


@cache
def default_values(schema: type) -> tuple[Any, dict[str, Any]]:
    """Return OmegaConf's typed config of a schema, and its values by full key.

    Drafts share both, because building them takes longer than reading a recipe.
    """
    types = OmegaConf.structured(schema)
    tree = OmegaConf.to_container(types, structured_config_mode=SCMode.DICT)
    return types, dict(leaves(cast(Any, tree), key_fields(schema)))
