"""Convert the values of a recipe to the types of their keys."""

import difflib
import re
from functools import cache
from typing import Any, Literal, cast, get_args, get_origin

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cmtmae_scale.config.keys import check_choice, entry_type, key_fields
from cmtmae_scale.config.overrides import is_path_key
from cmtmae_scale.config.schema import Schedule
from cmtmae_scale.errors import ConfigError

EXPONENT = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+", re.ASCII)
"""Numbers as JSON and Python write them; YAML requires a point and a sign, as in 5.0e+8."""
PLAIN = (str, bool, int, float, type(None))
TYPES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
"""Types of fields, for messages."""


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
        key: the key that lists the entries.

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
    """Return the default values of an entry."""
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
        if kind is Any:
            value = with_numbers(value)
        if is_of_type(value, kind) or entry_type(kind) is not None:
            found[key] = value
            continue
        group, _, name = key.rpartition(".")
        owner = OmegaConf.select(types, group)
        if kind is Any:
            owner[name] = None  # else a mapping would be merged into the previous mapping
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


def with_numbers(value: Any) -> Any:
    """Return a value of a key of any type with numbers where YAML reads 5e8 or 1.0e6 as text."""
    if isinstance(value, dict):
        tree = cast(dict[str, Any], value)
        return {name: with_numbers(item) for name, item in tree.items()}
    if isinstance(value, list):
        return [with_numbers(item) for item in cast(list[Any], value)]
    return float(value) if isinstance(value, str) and EXPONENT.fullmatch(value) else value


def is_of_type(value: Any, kind: Any) -> bool:
    """Return whether a plain value has exactly a field's type and needs no conversion."""
    if get_origin(kind) is Literal:
        return any(type(value) is type(one) and value == one for one in get_args(kind))
    allowed = PLAIN if kind is Any else (kind, *get_args(kind))
    return type(value) in PLAIN and type(value) in allowed


def expected_type(key: str, schema: type) -> str:
    """Return what a key takes, as the end of a message; empty for a key with a set of values."""
    one = key_fields(schema).get(key.partition("[")[0])
    kinds = () if one is None else (one.type, *get_args(one.type))
    name = next((text for kind, text in TYPES.items() if kind in kinds), None)
    if name is None:
        return ""
    return f"; expected {name}" + (", or null" if type(None) in kinds else "")


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
