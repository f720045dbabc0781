"""An index as bytes, for ranks that receive it from another rank: JSON and arrays, no pickle."""

import dataclasses
import json
from typing import Any, cast

import numpy as np

from dataloading.columns import FileNames
from dataloading.entries import ENTRY, Passed
from dataloading.index import Index
from dataloading.shard_names import TarNames
from dataloading.stores import as_root, place_from_text, place_to_text

APART = ("entries", "names", "root", "shards")
"""Fields that are not plain JSON, or are computed from others."""


def index_to_bytes(index: Index) -> bytes:
    """Return an index as a line of JSON and its columns."""
    fields = {field.name: getattr(index, field.name) for field in dataclasses.fields(index)}
    facts = {name: value for name, value in fields.items() if name not in APART}
    facts["root"] = str(index.root)
    facts["shards"] = [place_to_text(place) for place in index.shards]
    names = index.names
    facts["tars"] = list(names.shards) if isinstance(names, TarNames) else None
    facts["images"] = len(index)
    data = [index.entries.tobytes()]
    if isinstance(names, FileNames):
        data += [names.ends.tobytes(), names.text.tobytes()]
    return b"".join([json.dumps(facts).encode("ascii"), b"\n", *data])


def index_from_bytes(data: bytes) -> Index:
    """Rebuild what ``index_to_bytes`` returned.

    Raises:
        ValueError: if the bytes are not an index.
    """
    line, _, columns = data.partition(b"\n")
    facts: dict[str, Any] = {name: to_tuples(value) for name, value in json.loads(line).items()}
    images: int = facts.pop("images")
    entries = np.frombuffer(columns, ENTRY, images)
    at = entries.nbytes
    facts["root"] = as_root(facts["root"])
    facts["passed_over"] = tuple(Passed(*one) for one in facts["passed_over"])
    facts["shards"] = tuple(map(place_from_text, facts["shards"]))
    tars = facts.pop("tars")
    if tars is not None:
        facts["names"] = TarNames(tars, entries)
    else:
        ends = np.frombuffer(columns, np.uint64, images, at)
        facts["names"] = FileNames(np.frombuffer(columns, np.uint8, offset=at + ends.nbytes), ends)
    return Index(entries=entries, **facts)


def to_tuples(value: Any) -> Any:
    """Replace the lists of JSON by the tuples of an index, recursively."""
    if not isinstance(value, list):
        return value
    return tuple(to_tuples(one) for one in cast(list[Any], value))
