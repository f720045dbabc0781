"""Describe every key of a recipe, from the schema itself.

Python does not keep the docstrings of fields, so the source is parsed.
"""

import ast
import functools
import importlib
import inspect
import json
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from types import NoneType
from typing import Any, Literal, NamedTuple, cast, get_args, get_origin, get_type_hints

from cmtmae_scale.config.finetune import Finetune
from cmtmae_scale.config.ranges import Range
from cmtmae_scale.config.schema import MISSING, Config
from cmtmae_scale.config.shipped import PACKAGE

TASKS = {"pre-training": Config, "fine-tuning": Finetune}
"""Task -> its schema."""
NAMES = {bool: "true or false", int: "whole number", float: "number", str: "text", Any: "any value"}


class Key(NamedTuple):
    """One key."""

    name: str
    """``group.key``."""
    meaning: str
    values: str
    """Type and range."""
    default: str
    """In YAML's notation; ``required`` if the recipe must give the key."""
    owner: type
    """Dataclass of its group."""
    is_scheduled: bool
    """Whether it takes the fields of a ``Schedule`` too."""


class Group(NamedTuple):
    """One group of keys."""

    name: str
    meaning: str
    keys: list[Key]


def list_groups(schema: type) -> list[Group]:
    """Return the groups of a schema, each with all keys below it."""
    whole, kinds = schema(), get_type_hints(schema)
    found: list[Group] = []
    for one in fields(schema):
        group, prefix = getattr(whole, one.name), f"{one.name}."
        if isinstance(group, list):  # of named entries
            group, prefix = get_args(kinds[one.name])[0](), f"{one.name}.NAME."
        found.append(Group(one.name, first_line(group), list(list_keys(group, prefix))))
    return found


def list_keys(group: Any, prefix: str) -> Iterator[Key]:
    """Yield the keys of a group, an instance that holds the defaults."""
    owner: type[Any] = group.__class__
    docs, hints = dict[str, str](), get_type_hints(owner)
    for base in reversed(owner.__mro__[:-1]):
        docs |= field_docs(base.__module__)[base.__name__]
    for one in fields(group):
        value, name = getattr(group, one.name), f"{prefix}{one.name}"
        if is_dataclass(value):
            yield from list_keys(value, f"{name}.")
            continue
        is_scheduled = bool(one.metadata.get("schedule"))
        kind = "number, or a schedule" if is_scheduled else type_text(hints[one.name])
        legal: Range | None = one.metadata.get("range")
        values = kind if legal is None else f"{kind}; {legal}"
        if legal is not None and legal.ascending:
            values += ", ascending"
        default = "required" if value == MISSING else default_text(value)
        yield Key(name, docs[one.name], values, default, owner, is_scheduled)


def type_text(kind: Any) -> str:
    """Return the values that a type accepts, as text."""
    arguments = get_args(kind)
    if NoneType in arguments:
        rest = next(one for one in arguments if one is not NoneType)
        return f"{type_text(rest)}, or null"
    origin = get_origin(kind)
    if origin is Literal:
        return ", ".join(str(choice) for choice in arguments)
    if origin is tuple:
        return f"list of {len(arguments)} {NAMES[arguments[0]]}s"
    if origin is list:
        return f"list of {NAMES[arguments[0]]}s".replace("texts", "keys")
    return NAMES[kind]


def default_text(value: Any) -> str:
    """Return a default in YAML's notation."""
    if isinstance(value, dict):
        tree = cast(dict[str, Any], value)
        inner = ", ".join(f"{key}: {default_text(item)}" for key, item in tree.items())
        return f"{{{inner}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(default_text(item) for item in cast(list[Any], value))}]"
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)


@functools.cache
def field_docs(module: str) -> dict[str, dict[str, str]]:
    """Return the text under each field of each class of a module, as one line of Markdown."""
    tree = ast.parse(inspect.getsource(importlib.import_module(module)))
    return {node.name: dict(docs_of(node)) for node in tree.body if isinstance(node, ast.ClassDef)}


def docs_of(node: ast.ClassDef) -> Iterator[tuple[str, str]]:
    """Yield the fields of a class that a string follows, with that string."""
    for one, after in zip(node.body, node.body[1:], strict=False):
        if (
            isinstance(one, ast.AnnAssign)
            and isinstance(one.target, ast.Name)
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
        ):
            text = " ".join(str(after.value.value).split())
            yield one.target.id, text.replace("``None``", "``null``").replace("``", "`")


def first_line(group: Any) -> str:
    """Return the first line of the docstring of a group's dataclass."""
    return (group.__doc__ or "").splitlines()[0].replace("``", "`")


def find_uses(key: Key) -> list[str]:
    """Return the modules that read a key, relative to the package.

    A module reads ``mask.ratio`` if its code has ``mask.ratio``, or ``settings.ratio`` or
    ``entry.ratio`` and names the dataclass of the group.
    """
    *_, group, name = key.name.split(".")
    found: list[str] = []
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text()
        if f".{name}" not in text:  # parsing all modules would take seconds
            continue
        names_owner = key.owner.__name__ in text
        holders = {group, "settings", "entry"} if names_owner else {group}
        for node in ast.walk(ast.parse(text)):
            if (
                isinstance(node, ast.Attribute)
                and node.attr == name
                and ast.unparse(node.value).split(".")[-1] in holders
            ):
                found.append(str(path.relative_to(PACKAGE)))
                break
    return found
