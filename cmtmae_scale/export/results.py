"""Evaluation results in ``RUN_DIR/evaluation/*.json`` for the model card."""

import re
from pathlib import Path
from typing import Any, NamedTuple

from cmtmae_scale.runtime.log import escape_controls
from cmtmae_scale.runtime.storage import read_inside, read_json

MARKS = re.compile(
    r"[\\`*<|~]"
    r"|\](?=[(\[:])"  # of a link
    r"|&(?=#?\w+;)"  # of a character reference
    r"|(?<!\w)_|_(?!\w)"  # of emphasis; names of models have them within words
    r"|:(?=//)|(?<=www)\."  # of a bare address
)
"""Characters with an effect in Markdown; each is replaced by its character reference."""


class Found(NamedTuple):
    """Evaluations of a run."""

    rows: list[str]
    """Lines of a Markdown table, for the exported weights."""
    others: list[str]
    """Files of other weights of the run, or without a known result."""


def find_results(run_dir: Path | None, sha256: str) -> Found:
    """Read every result file of a run.

    Args:
        run_dir: the run's folder; ``None``: unknown.
        sha256: of the exported weights, as ``evaluation.encoders.weights_digest`` returns it.
    """
    found = Found([], [])
    files = sorted((run_dir / "evaluation").glob("*.json")) if run_dir else []
    for file in files:
        try:
            tree = read_json(read_inside(file.parent, file))
        except (OSError, ValueError):
            found.others.append(f"{file.name}: cannot be read")
            continue
        subject = lookup(tree, "subject")
        if lookup(subject, "sha256") != sha256:
            found.others.append(f"{file.name}: {subject_text(subject)}")
            continue
        listed = lookup(tree, "results") or [tree]
        rows = [
            row
            for row in (listed if isinstance(listed, list) else [])
            if is_number(lookup(row, "accuracy"))
        ]
        found.rows.extend(markdown_row(tree, row) for row in rows)
        if not rows:
            found.others.append(f"{file.name}: no accuracy in it")
    return found


def lookup(tree: Any, key: str) -> Any:
    """Return a value of a JSON object, or ``None``."""
    return tree.get(key) if isinstance(tree, dict) else None


def is_number(value: Any) -> bool:
    """Return whether a JSON value is a finite number; Python reads and writes NaN too."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) < 1e300


def subject_text(subject: Any) -> str:
    """Name the weights of a result file."""
    facts = [f"{key} {lookup(subject, key)}" for key in ("weights", "step") if lookup(subject, key)]
    return f"other weights ({', '.join(facts)})" if facts else "does not name its weights"


def markdown_row(tree: Any, row: Any) -> str:
    """Return a row of the table: weights, features, method, accuracy, counts."""
    counts = f"{lookup(row, 'correct')} of {lookup(row, 'count')}" if lookup(row, "count") else ""
    interval = lookup(row, "interval_95")
    if isinstance(interval, list) and len(interval) == 2 and all(map(is_number, interval)):
        counts += f", 95 % interval {100 * interval[0]:.2f} to {100 * interval[1]:.2f}"
    cells = (
        lookup(row, "weights") or "",
        lookup(row, "features") or "",
        lookup(row, "method") or lookup(tree, "method") or "",
        f"{100 * row['accuracy']:.2f} %",
        counts,
    )
    return f"| {' | '.join(escape_markdown(str(cell)) for cell in cells)} |"


def escape_markdown(text: str) -> str:
    """Return a text on one line in which Markdown and HTML have no effect."""

    def escape_mark(found: re.Match[str]) -> str:
        return "".join(f"&#{ord(char)};" for char in found[0])

    return MARKS.sub(escape_mark, escape_controls(" ".join(text.split())))
