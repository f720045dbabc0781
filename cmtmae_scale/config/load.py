"""From YAML and ``key=value`` overrides to one checked config.

Precedence: default < YAML < override. A YAML file is read alone: no inheritance, no interpolation.
"""

import copy
import dataclasses
import difflib
import re
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, cast, get_args, get_origin

import yaml
from omegaconf import MISSING, OmegaConf, SCMode
from omegaconf.errors import OmegaConfBaseException

from cmtmae_scale.config.check import find_problems
from cmtmae_scale.config.hints import key_hint
from cmtmae_scale.config.keys import (
    check_choice,
    check_keys,
    entry_type,
    field_types,
    key_fields,
    plain,
    schedule_keys,
)
from cmtmae_scale.config.schema import Config, NamedTeacher, Schedule, Trained
from cmtmae_scale.config.shipped import find_recipe
from cmtmae_scale.config.yaml_text import parse_yaml, read_yaml, refuse_interpolation
from cmtmae_scale.errors import ConfigError
from dataloading.addresses import hide_secrets
from dataloading.files import atomic_path

Recipe = TypeVar("Recipe")
PLAIN = (str, bool, int, float, type(None))
Check = Callable[[Recipe], Iterable[str]]
"""Function that yields the problems of a config."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a recipe of pre-training, apply overrides and check the whole; see ``load_recipe``."""
    return load_recipe(Config, find_problems, path, overrides)


def load_recipe(
    schema: type[Recipe], check: Check[Recipe], path: str | Path, overrides: Sequence[str] = ()
) -> Recipe:
    """Read a recipe, apply overrides and check the whole.

    Args:
        schema: dataclass of the config.
        check: yields the problems of a config.
        path: a YAML file with the groups of ``schema``, or the name of a shipped recipe.
        overrides: ``group.key=value``, values in YAML's notation; ``null`` means off.

    Returns:
        Plain dataclasses, every field set.

    Raises:
        ConfigError: names the file or override, the key, what was found and the remedy.
    """
    return read_recipe(schema, check, path).override(overrides).build()


def read_recipe(schema: type[Recipe], check: Check[Recipe], path: str | Path) -> "Draft[Recipe]":
    """Read a recipe's file without checking the whole, see ``load_recipe``."""
    tree = read_yaml(find_recipe(path))
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

    Each method returns another draft, so that many configs start from one that is read once.
    """

    schema: type[Recipe]
    check: Check[Recipe]
    place: str
    """Name of the recipe, for messages."""
    types: Any
    """OmegaConf's typed config of the schema, which converts values; its own values mean nothing.
    """
    values: dict[str, Any]
    """Converted value of each full key; ``MISSING`` where the recipe must give it."""
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
        """Return the draft with the values of a tree; a mapping is merged into the one before.

        A schedule with a ``kind`` replaces the whole of the one before.
        """
        with hidden_secrets():
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
        for override in overrides:
            update, place = parse_override(override, keys), name_override(override, keys)
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
        with hidden_secrets():
            for key in schedule_keys(self.schema):
                text = repr(values[key])
                if text not in self.schedules:
                    at = blame(key, self.place, self.overrides)
                    self.schedules[text] = parse_schedule(values[key], at, key)
                values[key] = self.schedules[text]
            config = instantiate(self.schema, values)
            for problem in self.check(config):
                at = f"{blame(problem, self.place, self.overrides)}: "
                raise ConfigError(f"{at}{problem.removeprefix(at)}")
        return config


@contextmanager
def hidden_secrets() -> Generator[None, None, None]:
    """Take users, passwords and queries of addresses out of errors, which repeat values."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(hide_secrets(str(error))) from None


def leaves(
    tree: dict[str, Any], keys: Collection[str], prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """Yield the values of a tree by full key; ``keys`` are the schema's, all others are groups."""
    for name, value in tree.items():
        full = f"{prefix}{name}"
        if full in keys:
            yield full, value
        else:
            yield from leaves(value, keys, f"{full}.")


def merged(before: dict[str, Any], update: dict[str, Any]) -> dict[str, Any]:
    """Return a mapping with another one laid over it, recursively."""
    found = dict(before)
    for name, value in update.items():
        both = isinstance(found.get(name), dict) and isinstance(value, dict)
        found[name] = merged(found[name], cast(Any, value)) if both else value
    return found


@cache
def entry_types(entry: type) -> Any:
    """Return OmegaConf's typed config of an entry, which converts values."""
    return OmegaConf.structured(entry)


def convert_entries(
    before: list[dict[str, Any]],
    update: list[dict[str, Any]] | dict[str, dict[str, Any]],
    entry: type,
    place: str,
    key: str,
) -> list[dict[str, Any]]:
    """Return the entries of a key, in the types of their fields.

    Args:
        before: the entries before.
        update: all entries, or changes by the entry's name, see ``check_entries``.
        entry: dataclass of an entry.
        place: for messages.
        key: that lists the entries.

    Raises:
        ConfigError: for a name that no entry has, or a value of another type.
    """
    if isinstance(update, dict):
        found = {one["name"]: one for one in before}
        for name in update:
            if name not in found:
                listed = f"its entries are {', '.join(found)}" if found else "it has no entries"
                near = difflib.get_close_matches(str(name), found, 1, 0.5)
                hint = f"did you mean {near[0]}?" if near else f"{listed}; give the recipe one"
                raise ConfigError(f"{place}: {key} has no entry {name}; {hint}")
        update = [one | update.get(name, {}) for name, one in found.items()]
    else:
        update = [{**default_entry(entry), **one} for one in update]
    return [
        convert_values(entry_types(entry), one, entry, place, f"{key}.{one['name']}.")
        for one in update
    ]


def default_entry(entry: type) -> dict[str, Any]:
    """Return the values of an entry that gives none."""
    return {name: one.default for name, one in key_fields(entry).items()}


def convert_values(
    types: Any, values: dict[str, Any], schema: type, place: str, prefix: str = ""
) -> dict[str, Any]:
    """Return values by full key in the types of their keys, as plain Python.

    ``prefix`` begins the keys in messages.

    Raises:
        ConfigError: names the key, what was found and what is expected.
    """
    found: dict[str, Any] = {}
    for key, value in values.items():
        kind = key_fields(schema)[key].type
        if is_of_type(value, kind) or entry_type(kind) is not None:
            found[key] = value
            continue
        group, _, name = key.rpartition(".")
        owner = OmegaConf.select(types, group)
        if kind is Any:
            owner[name] = None  # else a mapping would be merged into the one before
        try:
            owner.merge_with({name: value})
        except OmegaConfBaseException as error:
            first = str(error.msg if error.msg else error).splitlines()[0]
            inner = error.full_key or ""
            at = inner if inner.startswith(key) else key + inner.removeprefix(name)
            at = key if inner in (group, "") else at
            if "ListConfig" in first and is_path_key(key):
                first = (
                    "is a list, expected one path: a pattern such as train-*.tar or {a,b}.tar, or "
                    "a folder with links to all"
                )
            else:
                first += expected_type(at, schema)
            raise ConfigError(f"{place}: {prefix}{at}: {first}") from error
        result = owner[name]
        found[key] = OmegaConf.to_container(result) if OmegaConf.is_config(result) else result
    return found


def is_of_type(value: Any, kind: Any) -> bool:
    """Return whether a value is a plain one of exactly a field's type, which nothing converts."""
    if get_origin(kind) is Literal:
        return any(type(value) is type(one) and value == one for one in get_args(kind))
    allowed = PLAIN if kind is Any else (kind, *get_args(kind))
    return type(value) in PLAIN and type(value) in allowed


def has_missing(value: Any) -> bool:
    """Return whether a value, or one that it holds, must still be given."""
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


def parse_override(text: str, keys: Collection[str] | None = None) -> dict[str, Any]:
    """Turn ``a.b=value`` into ``{"a": {"b": value}}``.

    Args:
        text: the override.
        keys: the schema's keys, to which hints are limited; ``None``: all hints.
    """
    key, sign, value = text.partition("=")
    place = name_override(text, keys or ())
    if not sign or ("." not in key and key.strip() not in (keys or ())):
        hint = key_hint(key.strip(), keys) or "expected group.key=value, without spaces"
        raise ConfigError(f"{place}: is not an override; {hint}")
    try:
        tree: Any = parse_yaml(value) if value else None
    except ValueError as error:
        if not is_path_key(key):
            reason = hide_secrets(" ".join(str(error).split()))
            raise ConfigError(f"{place}: the value is not YAML: {reason}") from error
        tree = value
    if is_path_key(key) and isinstance(cast(object, tree), dict):
        tree = value
    refuse_interpolation(tree, place)
    for part in reversed(key.strip().split(".")):
        tree = {part: tree}
    return cast(dict[str, Any], tree)


def name_override(text: str, keys: Collection[str]) -> str:
    """Return an override for messages, without the value of an unknown key: it may be a secret."""
    key, sign, _ = text.partition("=")
    first, _, rest = key.strip().partition(".")
    is_known = key.strip() in keys or (
        first in keys and rest.partition(".")[2] in field_types(NamedTeacher)
    )
    return hide_secrets(text) if is_known or not sign else f"{hide_secrets(key)}=..."


def is_path_key(key: str) -> bool:
    """Whether a key's value is a path, which may be a pattern such as ``*.tar`` or ``{a,b}.tar``.

    Such patterns are not YAML, or are YAML of another meaning.
    """
    return key.strip().endswith("path")


def other_length(update: dict[str, Any]) -> str | None:
    """Name the key that an override of ``train.epochs`` or ``train.steps`` clears."""
    given = cast(dict[str, Any], update.get("train") or {})
    for key, other in (("epochs", "steps"), ("steps", "epochs")):
        if given.get(key) is not None:
            return other
    return None


@cache
def default_values(schema: type) -> tuple[Any, dict[str, Any]]:
    """Return OmegaConf's typed config of a schema, and its values by full key.

    Drafts share both: they take longer to build than a recipe takes to be read.
    """
    types = OmegaConf.structured(schema)
    tree = OmegaConf.to_container(types, structured_config_mode=SCMode.DICT)
    return types, dict(leaves(cast(Any, tree), key_fields(schema)))


TYPES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text, in quotes where YAML reads a date",
}
"""Types of fields, for messages."""


def expected_type(key: str, schema: type) -> str:
    """Return what a key takes, as the end of a message; empty for a key with a set of values."""
    one = key_fields(schema).get(key.partition("[")[0])
    kinds = () if one is None else (one.type, *get_args(one.type))
    name = next((text for kind, text in TYPES.items() if kind in kinds), None)
    if name is None:
        return ""
    return f"; expected {name}" + (", or null" if type(None) in kinds else "")


def blame(problem: str, place: str, overrides: Sequence[str]) -> str:
    """Return the overrides that set a key of a problem; ``place`` where none did."""

    def names(override: str) -> bool:
        key = re.escape(override.partition("=")[0].strip())
        return re.search(rf"(?<![\w.]){key}(?!\w)", problem) is not None

    last = {override.partition("=")[0]: override for override in overrides if names(override)}
    return " ".join(last.values()) or place


@cache
def typed_schedule() -> Any:
    """Return OmegaConf's typed config of a schedule, for ``OmegaConf.merge``, which copies it."""
    return OmegaConf.structured(Schedule)


def parse_schedule(value: Any, place: str, key: str) -> Schedule | float:
    """Turn a number, or the fields of a ``Schedule``, into a number or a ``Schedule``."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, dict):
        raise ConfigError(
            f"{place}: {key}={value!r} is neither a number nor a schedule {{kind: ...}}"
        )
    fields = cast(dict[str, Any], value)
    check_choice(
        place, f"{key}.kind", fields.get("kind"), ("constant", "two_stage", "linear", "cosine")
    )
    try:
        schedule = OmegaConf.merge(typed_schedule(), OmegaConf.create(fields))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{place}: {key}: {str(error).splitlines()[0]}") from error
    if OmegaConf.missing_keys(schedule):
        raise ConfigError(f"{place}: {key}.start must be given")
    return cast(Schedule, OmegaConf.to_object(schedule))
