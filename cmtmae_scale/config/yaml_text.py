"""Read YAML of bounded size, with distinct keys and without interpolation."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import yaml

from cmtmae_scale.errors import ConfigError, remedy_for

MAX_YAML_BYTES = 2**20
"""Largest YAML file that is read."""
MAX_YAML_VALUES = 100_000
"""Largest number of values of a YAML text, with its aliases expanded."""
CONSTRUCTOR_ERRORS = (ValueError, LookupError, AttributeError, TypeError, ArithmeticError)
"""Raised by PyYAML for values such as ``2024-13-01`` or ``!!bool x``."""
NOT_TEXT = tuple(f"tag:yaml.org,2002:{kind}" for kind in ("bool", "int", "float", "timestamp"))
TEXT = "tag:yaml.org,2002:str"
"""Tags that YAML gives to unquoted values, and the tag of text."""
IsText = Callable[[str], bool]
"""Whether a key takes text."""


def read_yaml(path: Path, is_text: IsText | None = None) -> dict[str, Any]:
    """Read a YAML mapping; an absent, broken or interpolating file is a ``ConfigError``.

    ``is_text``: see ``parse_yaml``.
    """
    try:
        with path.open("rb") as opened:
            data = opened.read(MAX_YAML_BYTES + 1)
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}); {remedy_for(error, 'give --config FILE')}"
        ) from error
    if len(data) > MAX_YAML_BYTES:
        raise ConfigError(
            f"{path}: has more than {MAX_YAML_BYTES} bytes, which no recipe has; give --config FILE"
        )
    try:
        tree = parse_yaml(data.decode(), is_text)
    except ValueError as error:
        raise ConfigError(f"{path}: is not YAML: {' '.join(str(error).split())}") from error
    refuse_interpolation(tree, str(path))
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: has no groups; expected 'run:', 'data:' and so on")
    return cast(dict[str, Any], tree)


def parse_yaml(text: str, is_text: IsText | None = None, key: str = "") -> Any:
    """Parse YAML that holds at most ``MAX_YAML_VALUES`` values, with its aliases expanded.

    Args:
        text: the YAML.
        is_text: whether the value of a full key is kept as written; ``None``: no value is. YAML
            reads ``1.10`` as 1.1, ``0700`` as 448 and ``no`` as false.
        key: full key of the text; empty: the keys in the text are full keys.

    Raises:
        ValueError: if it is not YAML, is nested too deeply, holds more values, or repeats a key.
    """
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        if root is None:
            return None
        count_nodes(root, {})
        if is_text is not None:
            keep_texts(root, is_text, key)
        return cast(Any, loader).construct_document(root)
    except (yaml.YAMLError, *CONSTRUCTOR_ERRORS) as error:
        raise ValueError(str(error)) from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def count_nodes(node: yaml.Node, known: dict[int, int]) -> int:
    """Return the number of values of a node with its aliases expanded.

    Args:
        node: node of the graph that YAML's composer returns.
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


def keep_texts(node: yaml.Node, is_text: IsText, key: str) -> None:
    """Turn numbers, booleans and dates of text keys into text as written, in place.

    An entry of a list has the key of the list.
    """
    if isinstance(node, yaml.ScalarNode):
        if node.tag in NOT_TEXT and is_text(key):
            node.tag = TEXT
    elif isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            keep_texts(value, is_text, f"{key}.{name.value}" if key else str(name.value))
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            keep_texts(item, is_text, key)


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
    """Refuse ``${...}`` in every parsed text of a tree, so that nothing is ever resolved.

    OmegaConf would insert variables of the environment, which end up in logs and checkpoints.

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
