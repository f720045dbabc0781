"""What ``RUN_DIR/evaluation/*.json`` says of weights; whatever else lies there is named."""

import json
from pathlib import Path
from typing import Any, NamedTuple


class Found(NamedTuple):
    """Evaluations of a run."""

    rows: list[str]
    """Lines of a Markdown table: those of the weights that are exported."""
    others: list[str]
    """Files about other weights of the run, or in which nothing was recognised."""


def find_results(run_dir: Path | None, sha256: str) -> Found:
    """Read every result file of a run.

    Args:
        run_dir: the run's folder; ``None``: it is not known.
        sha256: of the exported weights, as ``evaluation.encoders.weights_digest`` gives it.
    """
    found = Found([], [])
    files = sorted((run_dir / "evaluation").glob("*.json")) if run_dir else []
    for file in files:
        try:
            tree = json.loads(file.read_text())
        except (OSError, ValueError):
            found.others.append(f"{file.name}: cannot be read")
            continue
        subject = at(tree, "subject")
        if at(subject, "sha256") != sha256:
            found.others.append(f"{file.name}: {about(subject)}")
            continue
        rows = [row for row in at(tree, "results") or [tree] if is_number(at(row, "accuracy"))]
        found.rows.extend(line(tree, row) for row in rows)
        if not rows:
            found.others.append(f"{file.name}: no accuracy in it")
    return found


def at(tree: Any, key: str) -> Any:
    """A value of an object, or ``None``."""
    return tree.get(key) if isinstance(tree, dict) else None


def is_number(value: Any) -> bool:
    """Whether a value is one."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def about(subject: Any) -> str:
    """Which weights a file is about, as far as it says."""
    told = [f"{key} {at(subject, key)}" for key in ("weights", "step") if at(subject, key)]
    return f"other weights ({', '.join(told)})" if told else "does not say of which weights"


def line(tree: Any, row: Any) -> str:
    """A row of the table: whose features, method, accuracy, counts."""
    counts = f"{at(row, 'correct')} of {at(row, 'count')}" if at(row, "count") else ""
    interval = at(row, "interval_95")
    if isinstance(interval, list) and len(interval) == 2 and all(map(is_number, interval)):
        counts += f", 95 % interval {100 * interval[0]:.2f} to {100 * interval[1]:.2f}"
    cells = (
        at(row, "weights") or "",
        at(row, "features") or "",
        at(row, "method") or at(tree, "method") or "",
        f"{100 * row['accuracy']:.2f} %",
        counts,
    )
    return f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |"
