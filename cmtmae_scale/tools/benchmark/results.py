"""Results of a measurement as JSON and as Markdown; imports no torch."""

import json
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from cmtmae_scale.runtime.storage import write_atomic

ENDINGS = (".json", ".md")


def with_ending(path: Path, ending: str) -> Path:
    """Return a file of results, one of ``ENDINGS``; a dot in the name, as in ``v0.2``, stays."""
    name = path.stem if path.suffix in ENDINGS else path.name
    return path.with_name(name + ending)


def save_tables(path: Path, facts: Mapping[str, object], results: Any, text: str) -> None:
    """Write facts and results (dataclasses) to ``path`` with ``.json``, tables with ``.md``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = json.dumps({**facts, "results": results}, indent=1, default=plain)
    write_atomic(with_ending(path, ".json"), whole + "\n")
    lines = [f"- {name}: {value}" for name, value in facts.items()]
    write_atomic(with_ending(path, ".md"), "\n".join(lines) + "\n\n" + text + "\n")


def plain(value: Any) -> Any:
    """Return a dataclass as a dictionary, for ``json.dumps``."""
    if not is_dataclass(value) or isinstance(value, type):
        raise TypeError(f"{type(value).__name__} cannot be written as JSON")
    return asdict(value)
