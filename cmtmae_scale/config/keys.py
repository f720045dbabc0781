"""List the keys of a schema, and refuse trees that do not have its form."""

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

from cmtmae_scale.config.hints import key_hint, value_hint
from cmtmae_scale.config.ranges import walk_fields
from cmtmae_scale.config.schema import Schedule
from cmtmae_scale.errors import ConfigError

NAME = r"[a-z][a-z0-9_]*"
"""Name of an entry of a list."""


@cache
def key_fields(schema: type) -> Mapping[str, "dataclasses.Field[Any]"]:
    """Return the fields of a schema by full key."""
    return dict(walk_fields(schema))


@cache
def field_types(group: type) -> Mapping[str, Any]:
    """Return the types of the fields of a group."""
    return get_type_hints(group)


@cache
def schedule_keys(schema: type) -> Sequence[str]:
    """Return the keys of a schema whose values are numbers or schedules."""
    return [key for key, one in key_fields(schema).items() if one.metadata.get("schedule")]


def entry_type(kind: Any) -> type | None:
    """Return the dataclass of the entries of a key that lists named entries, else ``None``."""
    item = get_args(kind)[0] if get_origin(kind) is list else None
    return cast(type, item) if dataclasses.is_dataclass(item) else None


def is_text_key(schema: type, key: str) -> bool:
    """Return whether a key takes text; a key of an entry may omit the entry's name."""
    own = key_fields(schema)
    listed = own.get(key.partition(".")[0])
    entry = None if listed is None else entry_type(listed.type)
    one = own.get(key) if entry is None else key_fields(entry).get(key.rpartition(".")[2])
    return one is not None and one.type in (str, str | None)


def check_keys(
    tree: dict[str, Any], group: type, schema: type, place: str, prefix: str = ""
) -> None:
    """Refuse keys that a group of the schema lacks; the error names the nearest key."""
    hints = field_types(group)
    scheduled = schedule_keys(schema)
    for key, value in tree.items():
        full = f"{prefix}{key}"
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, 1, 0.5)
            hint = f"did you mean {near[0]}?" if near else f"its keys are {', '.join(hints)}"
            hint = key_hint(full, key_fields(schema)) or hint
            name = prefix.rstrip(".") or "the config"
            raise ConfigError(f"{place}: {full} is not a key of {name}; {hint}")
        kind = Schedule if full in scheduled else hints[key]
        if dataclasses.is_dataclass(kind):
            if isinstance(value, dict):
                inner = cast(dict[str, Any], value)
                check_keys(inner, cast(type, kind), schema, place, full + ".")
            elif full not in scheduled:
                raise ConfigError(f"{place}: {full}={value!r} is a group; give {full}.KEY=value")
            continue
        if value is None and type(None) in get_args(kind):
            continue
        kind = next((one for one in get_args(kind) if get_origin(one)), kind)
        if get_origin(kind) is Literal:
            check_choice(place, full, value, get_args(kind))
        elif entry_type(kind) is not None:
            check_entries(place, full, value, cast(type, entry_type(kind)))
        elif get_origin(kind) in (list, tuple):
            check_list(place, full, value, kind, schema)
        elif bool in (kind, *get_args(kind)) and type(value) is int and value not in (0, 1):
            raise ConfigError(f"{place}: {full}={value} is neither true nor false")


def check_entries(place: str, key: str, value: Any, entry: type) -> None:
    """Refuse a value that is neither a list of named entries nor changes by the entry's name."""
    if isinstance(value, dict):
        entries = cast(dict[str, Any], value)
        for name, one in entries.items():
            if not isinstance(one, dict):
                raise ConfigError(f"{place}: {key}.{name} is an entry; give {key}.{name}.KEY=value")
            if "name" in one:
                raise ConfigError(
                    f"{place}: {key}.{name}.name: entries are not renamed; change the recipe"
                )
    else:
        entries = dict[str, Any]()
        if not isinstance(value, list):
            raise ConfigError(f"{place}: {key}={value!r} is not a list of entries {{name: ...}}")
        for number, one in enumerate(cast(list[Any], value)):
            name = cast(Any, one).get("name") if isinstance(one, dict) else None
            if not isinstance(name, str) or not re.fullmatch(NAME, name):
                found = "" if name is None else f"; found {name!r}"
                raise ConfigError(
                    f"{place}: {key}[{number}] needs a name of lower-case letters, digits and _, "
                    f"such as name: clip{found}"
                )
            if name in entries:
                raise ConfigError(f"{place}: {key} has two entries named {name}; rename one")
            entries[name] = one
    for name, one in entries.items():
        check_keys(one, entry, entry, place, f"{key}.{name}.")


def check_list(place: str, key: str, value: Any, kind: Any, schema: type) -> None:
    """Refuse a value that is not a flat list of the right length; the error shows the notation."""
    fixed = get_origin(kind) is tuple
    items = cast(list[Any], value) if isinstance(value, list) else None
    nested = any(isinstance(item, list | dict) for item in items or ())
    if items is not None and not nested and (not fixed or len(items) == len(get_args(kind))):
        return
    if fixed:
        default = plain(key_fields(schema)[key].default)
        raise ConfigError(
            f"{place}: {key}={value} is not a list of {len(get_args(kind))} numbers, such as "
            f"'{key}={default}'"
        )
    item = "" if value is None else re.sub(r"[\[\]{}'\"]|: [^,}]*", "", f"{value}")
    what = "is a list of lists" if nested else "is not a list"
    raise ConfigError(f"{place}: {key}={value} {what}; write '{key}=[{item}]'")


def check_choice(place: str, key: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Refuse a value outside a closed set; the error names the set and the nearest member."""
    if value in choices:
        return
    near = difflib.get_close_matches(str(value), [str(choice) for choice in choices], 1, 0.5)
    hint = f"; did you mean {near[0]}?" if near else ""
    remedy = value_hint(key, str(value))
    hint = f"; {remedy}" if remedy else hint
    listed = ", ".join(str(choice) for choice in choices)
    raise ConfigError(f"{place}: {key}={value!r} is not one of {listed}{hint}")


def plain(value: Any) -> Any:
    """Replace tuples by lists, recursively."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in cast(dict[str, Any], value).items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in cast(Sequence[Any], value)]
    return value
