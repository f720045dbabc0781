"""Overrides ``group.key=value``: the values that they set, and their names in messages."""

import re
from collections.abc import Collection, Sequence
from typing import Any, cast

from cmtmae_scale.config.hints import key_hint
from cmtmae_scale.config.keys import field_types
from cmtmae_scale.config.schema import NamedTeacher
from cmtmae_scale.config.yaml_text import IsText, parse_yaml, refuse_interpolation
from cmtmae_scale.errors import ConfigError
from dataloading.addresses import hide_secrets


def parse_override(
    text: str, keys: Collection[str] | None = None, is_text: IsText | None = None
) -> dict[str, Any]:
    """Turn ``a.b=value`` into ``{"a": {"b": value}}``.

    Args:
        text: the override.
        keys: the schema's keys, to which hints are limited; ``None``: all hints.
        is_text: see ``parse_yaml``.
    """
    key, sign, value = text.partition("=")
    place = name_override(text, keys or ())
    if not sign or ("." not in key and key.strip() not in (keys or ())):
        hint = key_hint(key.strip(), keys) or "expected group.key=value, without spaces"
        raise ConfigError(f"{place}: is not an override; {hint}")
    try:
        tree: Any = parse_yaml(value, is_text, key.strip()) if value else None
    except ValueError as error:
        if not is_path_key(key):
            reason = hide_secrets(" ".join(str(error).split()))
            raise ConfigError(f"{place}: the value is not YAML: {reason}") from error
        tree = value
    if is_path_key(key) and isinstance(cast(object, tree), dict):
        tree = value
    if is_text is not None and is_text(key.strip()) and is_unquoted(tree, value):
        tree = value.strip()  # in an override `` #`` does not begin a comment
    refuse_interpolation(tree, place)
    for part in reversed(key.strip().split(".")):
        tree = {part: tree}
    return cast(dict[str, Any], tree)


def is_unquoted(tree: Any, value: str) -> bool:
    """Return whether the value of an override is text without quotes; ``tree`` is its YAML."""
    start = value.lstrip()[:1]
    return start == "#" or (isinstance(tree, str) and start not in ("'", '"'))


def name_override(text: str, keys: Collection[str]) -> str:
    """Return an override for messages, without the value of an unknown key: it may be a secret."""
    key, sign, _ = text.partition("=")
    first, _, rest = key.strip().partition(".")
    is_known = key.strip() in keys or (
        first in keys and rest.partition(".")[2] in field_types(NamedTeacher)
    )
    return hide_secrets(text) if is_known or not sign else f"{hide_secrets(key)}=..."


def is_path_key(key: str) -> bool:
    """Return whether a key takes a path, which may be a pattern such as ``{a,b}.tar``.

    Some patterns are not YAML, or are YAML with another meaning.
    """
    return key.strip().endswith("path")


def other_length(update: dict[str, Any]) -> str | None:
    """Return the key that an override of ``train.epochs`` or ``train.steps`` clears."""
    given = cast(dict[str, Any], update.get("train") or {})
    for key, other in (("epochs", "steps"), ("steps", "epochs")):
        if given.get(key) is not None:
            return other
    return None


def blame(problem: str, place: str, overrides: Sequence[str]) -> str:
    """Return the overrides that set a key of a problem, or ``place`` if there are none."""

    def names(override: str) -> bool:
        key = re.escape(override.partition("=")[0].strip())
        return re.search(rf"(?<![\w.]){key}(?!\w)", problem) is not None

    last = {override.partition("=")[0]: override for override in overrides if names(override)}
    return " ".join(last.values()) or place
