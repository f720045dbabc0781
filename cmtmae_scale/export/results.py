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
    """Files of other weights of the run, or without a known result, each with the reason."""


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
            if is_number(lookup(row, "accuracy")) or is_number(lookup(row, "value"))
        ]
        found.rows.extend(markdown_row(tree, row) for row in rows)
        if not rows:
            found.others.append(f"{file.name}: no result in it")
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
    """Return a row of the table: weights, features, method, accuracy or measure, counts."""
    is_dense = not is_number(lookup(row, "accuracy"))
    counts = "" if is_dense else f"{lookup(row, 'correct')} of "
    counts = f"{counts}{lookup(row, 'count')}" if lookup(row, "count") else ""
    interval = lookup(row, "interval_95")
    if isinstance(interval, list) and len(interval) == 2 and all(map(is_number, interval)):
        ends = (f"{end:.4g}" if is_dense else f"{100 * end:.2f}" for end in interval)
        counts += f", 95 % interval {' to '.join(ends)}"
    if is_dense:
        result = f"{lookup(row, 'measure') or 'value'} {row['value']:.4g}"
    else:
        result = f"top-1 {100 * row['accuracy']:.2f} %"
    cells = (
        lookup(row, "weights") or "",
        lookup(row, "features") or "",
        lookup(row, "method") or lookup(tree, "method") or "",
        result,
        counts,
    )
    return f"| {' | '.join(escape_markdown(str(cell)) for cell in cells)} |"


def escape_markdown(text: str) -> str:
    """Return a text on one line in which Markdown and HTML have no effect."""

    def escape_mark(found: re.Match[str]) -> str:
        return "".join(f"&#{ord(char)};" for char in found[0])

    return MARKS.sub(escape_mark, escape_controls(" ".join(text.split())))
