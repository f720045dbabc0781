"""Measures of the demo's student, beside those of random weights and raw pixels."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

METHODS = ("segmentation", "linear")
"""Methods of ``cmtmae evaluate`` that are run after the training."""
MEASURES = {
    "segmentation": ("textures of patches, linear, mIoU", "linear segmentation", "value"),
    "linear": ("photograph of a crop, linear probe", "linear", "accuracy"),
}
"""Method -> measure, beginning of the name of its rows, key of the number."""
REMEDY = "that takes far more images and views"
OTHERS = ("random weights", "raw pixels")


def find_measures(results: Sequence[Mapping[str, Any]], method: str) -> list[Mapping[str, Any]]:
    """Return the rows of a method's measure: the student's, random weights', raw pixels'."""
    _, begins, _ = MEASURES[method]
    rows = [
        row
        for row in results
        if row["method"].startswith(begins)
        and row["features"] in ("patches", "pixels")
        and row.get("measure", "mIoU") == "mIoU"
    ]
    others = [next(row for row in rows if row["weights"] == name) for name in OTHERS]
    return [next(row for row in rows if row["weights"] not in OTHERS), *others]


def learned_table(files: Mapping[str, Path]) -> str:
    """Return a table of the measures with intervals, and what they show.

    Args:
        files: method -> result file of ``cmtmae evaluate``, in the order of the table.
    """
    lines = ["", f"{'measure':36}{'student':>22}{'random weights':>22}{'raw pixels':>22}"]
    verdicts: list[str] = []
    for method, file in files.items():
        title, _, key = MEASURES[method]
        student, *others = find_measures(json.loads(file.read_text())["results"], method)
        cells = [
            "{:.3f} [{:.3f}, {:.3f}]".format(row[key], *row["interval_95"])
            for row in (student, *others)
        ]
        lines.append(f"{title:36}" + "".join(f"{cell:>22}" for cell in cells))
        low = student["interval_95"][0]
        unbeaten = [row["weights"] for row in others if row["interval_95"][1] >= low]
        clearly, more = ("NOT clearly", f"; {REMEDY}") if unbeaten else ("clearly", "")
        verdicts.append(f"{title}: {clearly} better than {' and '.join(unbeaten or OTHERS)}{more}")
    return "\n".join([*lines, "intervals: 95 %, over test images", *verdicts])
