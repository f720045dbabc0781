"""From YAML and ``key=value`` overrides to one checked config.

Precedence: default < YAML < override. A YAML file is read alone: no inheritance, no interpolation.
"""

import dataclasses
import difflib
import functools
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

import yaml

from cmtmae_scale.config.check import find_problems
from cmtmae_scale.config.hints import key_hint, value_hint
from cmtmae_scale.config.schema import MISSING, Config, Schedule, Trained, walk_fields
from cmtmae_scale.config.shipped import find_recipe
from cmtmae_scale.errors import ConfigError
from dataloading.files import atomic_path

Recipe = TypeVar("Recipe")
MAX_YAML_BYTES = 2**20
"""Largest YAML file that is read."""
MAX_YAML_VALUES = 100_000
"""Most values of a YAML text, with its aliases written out."""
CONSTRUCTOR_ERRORS = (ValueError, LookupError, AttributeError, TypeError, ArithmeticError)
"""Raised by PyYAML for values such as ``2024-13-01`` or ``!!bool x``."""
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
    keys = [key for key, _ in walk_fields(schema)]
    config = schema()
    merge(config, read_yaml(find_recipe(path)), schema, str(path))
    for override in overrides:
        update = parse_override(override, keys)
        merge(config, update, schema, override)
        cleared = other_length(update)
        if cleared:
            merge(config, {"train": {cleared: None}}, schema, override)
    return build_config(config, schema, check, str(path), overrides)


def config_from_dict(tree: dict[str, Any], place: str) -> Config:
    """Rebuild a config that ``config_to_dict`` wrote; for resuming and evaluation."""
    config = Config()
    try:
        merge(config, tree, Config, place)
    except RecursionError as error:
        raise ConfigError(f"{place}: the config is nested too deeply") from error
    return build_config(config, Config, find_problems, place)


def config_to_dict(config: Trained) -> dict[str, Any]:
    """Turn a config into plain lists, dicts and numbers, fit for YAML and JSON."""
    return cast(dict[str, Any], plain(dataclasses.asdict(cast(Any, config))))


def save_config(config: Trained, path: Path) -> None:
    """Write a resolved config as YAML that ``load_recipe`` reads back."""
    with atomic_path(path) as draft:
        draft.write_text(yaml.safe_dump(config_to_dict(config), sort_keys=False))


def plain(value: Any) -> Any:
    """Replace tuples by lists, recursively."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in cast(dict[str, Any], value).items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in cast(Sequence[Any], value)]
    return value


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping; an absent, broken or interpolating file is a ``ConfigError``."""
    try:
        with path.open("rb") as opened:
            data = opened.read(MAX_YAML_BYTES + 1)
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}); give --config FILE"
        ) from error
    if len(data) > MAX_YAML_BYTES:
        raise ConfigError(
            f"{path}: has more than {MAX_YAML_BYTES} bytes, which no recipe has; give --config FILE"
        )
    try:
        tree = parse_yaml(data.decode())
    except ValueError as error:
        raise ConfigError(f"{path}: is not YAML: {' '.join(str(error).split())}") from error
    refuse_interpolation(tree, str(path))
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: has no groups; expected 'run:', 'data:' and so on")
    return cast(dict[str, Any], tree)


def parse_yaml(text: str) -> Any:
    """Parse YAML whose aliases, written out, hold at most ``MAX_YAML_VALUES`` values.

    Raises:
        ValueError: if it is not YAML, is nested too deeply, holds more values, or repeats a key.
    """
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        if root is None:
            return None
        count_nodes(root, {})
        return cast(Any, loader).construct_document(root)
    except (yaml.YAMLError, *CONSTRUCTOR_ERRORS) as error:
        raise ValueError(str(error)) from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def count_nodes(node: yaml.Node, known: dict[int, int]) -> int:
    """Return the number of values of a node with its aliases written out.

    Args:
        node: of the graph that YAML's composer returns.
        known: counts by the identity of the node; 0 while a node is being counted.

    Raises:
        ValueError: if there are more than ``MAX_YAML_VALUES``, or a node holds itself.
    """
    if id(node) in known:
        if not known[id(node)]:
            raise ValueError("an alias holds itself")
        return known[id(node)]
    known[id(node)] = 0
    count = 1
    if isinstance(node, yaml.MappingNode):
        refuse_repeated_keys(node)
        count += sum(count_nodes(item, known) for pair in node.value for item in pair)
    elif isinstance(node, yaml.SequenceNode):
        count += sum(count_nodes(item, known) for item in node.value)
    if count > MAX_YAML_VALUES:
        raise ValueError(f"more than {MAX_YAML_VALUES} values; write aliases out")
    known[id(node)] = count
    return count


def refuse_repeated_keys(node: yaml.MappingNode) -> None:
    """Refuse a key that is given twice: PyYAML drops all values but the last.

    Raises:
        ValueError: names the key and both lines.
    """
    lines: dict[str, int] = {}
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode):
            line = key.start_mark.line + 1
            if key.value in lines:
                raise ValueError(
                    f"{key.value} is given twice, in lines {lines[key.value]} and {line}; keep one"
                )
            lines[key.value] = line


def refuse_interpolation(tree: Any, place: str, key: str = "") -> None:
    """Refuse ``${...}``, which other programs resolve, in every parsed text of a tree.

    A recipe is read as it is: neither variables of the environment nor other keys are inserted.

    Raises:
        ConfigError: naming the place and the key; the text itself is not repeated.
    """
    if isinstance(tree, str) and "${" in tree:
        name = f"{key}: " if key else ""
        raise ConfigError(
            f"{place}: {name}interpolation ${{...}} is not supported; write the value out"
        )
    if isinstance(tree, dict):
        for name, value in cast(dict[Any, Any], tree).items():
            refuse_interpolation(name, place, key)
            refuse_interpolation(value, place, f"{key}.{name}" if key else str(name))
    elif isinstance(tree, list | tuple | set | frozenset):
        for item in cast(Sequence[Any], tree):
            refuse_interpolation(item, place, key)


def parse_override(text: str, keys: Collection[str] | None = None) -> dict[str, Any]:
    """Turn ``a.b=value`` into ``{"a": {"b": value}}``.

    Args:
        text: the override.
        keys: the schema's keys, to which hints are limited; ``None``: all hints.
    """
    key, sign, value = text.partition("=")
    if not sign or "." not in key:
        hint = key_hint(key.strip(), keys) or "expected group.key=value"
        raise ConfigError(f"{text}: is not an override; {hint}")
    try:
        tree: Any = parse_yaml(value) if value else None
    except ValueError as error:
        if not is_path_key(key):
            raise ConfigError(
                f"{text}: the value is not YAML: {' '.join(str(error).split())}"
            ) from error
        tree = value
    if is_path_key(key) and isinstance(cast(object, tree), dict):
        tree = value
    refuse_interpolation(tree, text)
    for part in reversed(key.strip().split(".")):
        tree = {part: tree}
    return cast(dict[str, Any], tree)


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


def check_keys(
    tree: dict[str, Any], group: type, schema: type, place: str, prefix: str = ""
) -> None:
    """Refuse keys that a group of the schema lacks, with the nearest key that it has."""
    hints = get_type_hints(group)
    scheduled = schedule_keys(schema)
    for key, value in tree.items():
        full = f"{prefix}{key}"
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, 1, 0.5)
            hint = f"did you mean {near[0]}?" if near else f"its keys are {', '.join(hints)}"
            hint = key_hint(full, [known for known, _ in walk_fields(schema)]) or hint
            name = prefix.rstrip(".") or "the config"
            raise ConfigError(f"{place}: {full} is not a key of {name}; {hint}")
        kind = Schedule if full in scheduled else hints[key]
        if dataclasses.is_dataclass(kind):
            if isinstance(value, dict):
                inner = cast(dict[str, Any], value)
                check_keys(inner, cast(type, kind), schema, place, full + ".")
            elif full not in scheduled:
                raise ConfigError(f"{place}: {full}={value!r} is a group; give {full}.KEY=value")
        elif get_origin(kind) is Literal:
            check_choice(place, full, value, get_args(kind))
        elif get_origin(kind) in (list, tuple):
            check_list(place, full, value, kind, schema)
        elif bool in (kind, *get_args(kind)) and type(value) is int and value not in (0, 1):
            raise ConfigError(f"{place}: {full}={value} is neither true nor false")


def check_list(place: str, key: str, value: Any, kind: Any, schema: type) -> None:
    """Refuse what is no flat list, or one of another length, with the notation that works."""
    fixed = get_origin(kind) is tuple
    items = cast(list[Any], value) if isinstance(value, list) else None
    nested = any(isinstance(item, list | dict) for item in items or ())
    if items is not None and not nested and (not fixed or len(items) == len(get_args(kind))):
        return
    if fixed:
        default = plain(dict(walk_fields(schema))[key].default)
        raise ConfigError(
            f"{place}: {key}={value} is not a list of {len(get_args(kind))} numbers, such as "
            f"'{key}={default}'"
        )
    item = "" if value is None else re.sub(r"[\[\]{}'\"]|: [^,}]*", "", f"{value}")
    what = "is a list of lists" if nested else "is not a list"
    raise ConfigError(f"{place}: {key}={value} {what}; write '{key}=[{item}]'")


def schedule_keys(schema: type) -> list[str]:
    """Return the keys of a schema whose values are numbers or schedules."""
    return [key for key, one in walk_fields(schema) if one.metadata.get("schedule")]


def check_choice(place: str, key: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Refuse a value outside a closed set, with the set and the nearest member."""
    if value in choices:
        return
    near = difflib.get_close_matches(str(value), [str(choice) for choice in choices], 1, 0.5)
    hint = f"; did you mean {near[0]}?" if near else ""
    remedy = value_hint(key, str(value))
    hint = f"; {remedy}" if remedy else hint
    listed = ", ".join(str(choice) for choice in choices)
    raise ConfigError(f"{place}: {key}={value!r} is not one of {listed}{hint}")


def merge(config: Any, tree: dict[str, Any], schema: type, place: str) -> None:
    """Lay a tree over a config, in place; a schedule replaces the whole of the one before."""
    refuse_interpolation(tree, place)
    check_keys(tree, schema, schema, place)
    assign(config, tree, place, schedule_keys(schema))


def assign(
    group: Any, tree: dict[str, Any], place: str, schedules: Collection[str], prefix: str = ""
) -> None:
    """Set the fields of a dataclass, and of those below it, from a tree of its keys."""
    owner: type[Any] = type(group)
    hints = get_type_hints(owner)
    for name, value in tree.items():
        key, present = f"{prefix}{name}", getattr(group, name)
        if dataclasses.is_dataclass(present):
            assign(present, value, place, schedules, f"{key}.")
            continue
        value = convert(value, hints[name], place, key)
        whole = key in schedules and isinstance(value, dict) and "kind" in value
        setattr(group, name, value if whole else overlay(present, value))


def overlay(below: Any, above: Any) -> Any:
    """Return ``above``, laid over ``below`` key by key where both are mappings."""
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    merged = dict(cast(dict[str, Any], below))
    for key, value in cast(dict[str, Any], above).items():
        merged[key] = overlay(merged.get(key), value)
    return merged


TYPES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text, in quotes where YAML reads a date",
}
"""Types of fields, for messages."""
ACCEPTED = {
    bool: (bool, int),
    int: (int, str),
    float: (float, int, str),
    str: (str, int, float, bool),
}
"""Type of a field -> types of values that are converted; YAML reads ``1e-4`` as text."""


def convert(value: Any, kind: Any, place: str, key: str) -> Any:
    """Return a value in the type of its field.

    Raises:
        ConfigError: naming the key, the value and what the key takes.
    """
    optional = NoneType in get_args(kind)
    if optional:
        kind = next(one for one in get_args(kind) if one is not NoneType)
        if value is None:
            return None
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        refuse_odd_values(value, place, key)
        return value
    if origin is Literal:
        return arguments[arguments.index(value)]
    if origin in (list, tuple):
        items = enumerate(cast(list[Any], value))
        found = [convert(item, arguments[0], place, f"{key}[{i}]") for i, item in items]
        return found if origin is list else tuple(found)
    try:
        if type(value) in ACCEPTED[kind]:
            return kind(value)
    except (ValueError, OverflowError):
        pass  # a text that is no number, or a number without a float
    if is_path_key(key) and isinstance(value, list):
        raise ConfigError(
            f"{place}: {key}: is a list, expected one path: a pattern such as train-*.tar or "
            "{a,b}.tar, or a folder with links to all"
        )
    expected = TYPES[kind] + (", or null" if optional else "")
    raise ConfigError(f"{place}: {key}={value!r}: expected {expected}")


def refuse_odd_values(value: Any, place: str, key: str) -> None:
    """Refuse what YAML has and JSON has not, such as a date, in the value of a key of any type.

    Raises:
        ConfigError: naming the key and the value.
    """
    if isinstance(value, dict):
        tree = cast(dict[Any, Any], value)
        odd = [name for name in tree if not isinstance(name, str)]
        for name, item in tree.items():
            refuse_odd_values(item, place, f"{key}.{name}")
    elif isinstance(value, list):
        odd: list[Any] = []
        for number, item in enumerate(cast(list[Any], value)):
            refuse_odd_values(item, place, f"{key}[{number}]")
    else:
        odd = [] if isinstance(value, str | int | float | None) else [value]
    if odd:
        raise ConfigError(f"{place}: {key}: {odd[0]!r} is no text; write it in quotes")


def blame(problem: str, place: str, overrides: Sequence[str]) -> str:
    """Return the overrides that set a key of a problem; ``place`` where none did."""

    def names(override: str) -> bool:
        key = re.escape(override.partition("=")[0].strip())
        return re.search(rf"(?<![\w.]){key}(?!\w)", problem) is not None

    last = {override.partition("=")[0]: override for override in overrides if names(override)}
    return " ".join(last.values()) or place


def value_at(config: Any, key: str) -> Any:
    """Return the value of ``group.key``."""
    return functools.reduce(getattr, key.split("."), config)


def build_config(
    config: Recipe,
    schema: type[Recipe],
    check: Check[Recipe],
    place: str,
    overrides: Sequence[str] = (),
) -> Recipe:
    """Refuse missing keys, resolve schedules, run the checks; returns the config.

    An error names the overrides that set its keys, else ``place``.
    """
    absent = sorted(key for key, _ in walk_fields(schema) if value_at(config, key) == MISSING)
    if absent:
        raise ConfigError(f"{place}: {', '.join(absent)} must be given")
    for key in schedule_keys(schema):
        group, name = key.split(".")
        owner = getattr(config, group)
        at = blame(key, place, overrides)
        setattr(owner, name, parse_schedule(getattr(owner, name), at, key))
    for problem in check(config):
        raise ConfigError(f"{blame(problem, place, overrides)}: {problem}")
    return config


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
    schedule = Schedule()
    assign(schedule, fields, place, (), f"{key}.")
    if schedule.start == MISSING:
        raise ConfigError(f"{place}: {key}.start must be given")
    return schedule
