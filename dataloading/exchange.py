"""An index as bytes, for ranks that take it from another rank: JSON and an array, no pickle."""

import dataclasses
import io
import json
from typing import Any, cast

import numpy as np

from dataloading.entries import ENTRY, Passed
from dataloading.index import Index
from dataloading.shards import TarNames
from dataloading.stores import as_root, place_from_text, place_to_text

APART = ("entries", "names", "root", "shards")
"""Fields that are not plain JSON, or are computed from others."""


def index_to_bytes(index: Index) -> bytes:
    """Return an index as a line of JSON and the array of its entries."""
    fields = {field.name: getattr(index, field.name) for field in dataclasses.fields(index)}
    facts = {name: value for name, value in fields.items() if name not in APART}
    facts["root"] = str(index.root)
    facts["shards"] = [place_to_text(place) for place in index.shards]
    names = index.names
    facts["tars"] = list(names.shards) if isinstance(names, TarNames) else None
    facts["names"] = [] if isinstance(names, TarNames) else list(names)
    array = io.BytesIO()
    np.save(array, index.entries, allow_pickle=False)
    return json.dumps(facts).encode("ascii") + b"\n" + array.getvalue()


def index_from_bytes(data: bytes) -> Index:
    """Rebuild what ``index_to_bytes`` returned.

    Raises:
        ValueError: if the bytes are not an index.
    """
    line, _, array = data.partition(b"\n")
    facts: dict[str, Any] = {name: to_tuples(value) for name, value in json.loads(line).items()}
    entries = np.load(io.BytesIO(array), allow_pickle=False)
    if entries.dtype != ENTRY:
        raise ValueError("the entries of an index have other columns")
    facts["root"] = as_root(facts["root"])
    facts["passed_over"] = tuple(Passed(*one) for one in facts["passed_over"])
    facts["shards"] = tuple(map(place_from_text, facts["shards"]))
    tars = facts.pop("tars")
    if tars is not None:
        facts["names"] = TarNames(tars, entries)
    return Index(entries=entries, **facts)


def to_tuples(value: Any) -> Any:
    """Replace the lists of JSON by the tuples of an index, recursively."""
    if not isinstance(value, list):
        return value
    return tuple(to_tuples(one) for one in cast(list[Any], value))
