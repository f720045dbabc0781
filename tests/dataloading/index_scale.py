"""Bytes and CPU-seconds of a kept index by its number of rows; rows are synthetic.

python -m tests.dataloading.index_scale FOLDER 1000000 10000000 100000000

Each number of rows is written to ``FOLDER`` (25 bytes per row) and opened, drawn from and resumed
in a process of its own.
"""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from dataloading.columns import new_columns
from dataloading.index import open_kept
from dataloading.index_file import new_file, publish
from dataloading.plan import Planner

_PER_TAR = 10_000
_AT_ONCE = 1_000_000


def write_rows(folder: Path, rows: int) -> None:
    """Keep an index of tars of ``_PER_TAR`` samples each."""
    with new_file(folder, "0" * 64) as new_buffer:
        entries, _ = new_columns(rows, 0, new_buffer)
        for at in range(0, rows, _AT_ONCE):
            ids = np.arange(at, min(at + _AT_ONCE, rows))
            some = entries[at : at + len(ids)]
            some["shard"], some["offset"] = ids // _PER_TAR, ids % _PER_TAR * 102_400 + 512
            some["size"], some["width"], some["height"] = 100_000, 500, 375
            some["label"] = -1
    facts = {"settings": [], "listing": "0" * 64, "contents": "", "source": "webdataset"}
    facts |= {"digest": "0" * 64, "images": rows, "name_bytes": 0}
    publish(folder, facts | {"labels": [], "excluded": [], "passed_over": []})


def resident_bytes() -> int:
    """Return this process's resident memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def measure_use(folder: Path, rows: int) -> dict[str, Any]:
    """Open an index, draw 100 micro-batches, and draw the last of them again as a resume does."""
    shards = [(f"{i}.tar", f"/data/{i}.tar") for i in range(-(-rows // _PER_TAR))]
    before, began = resident_bytes(), time.process_time()
    index = open_kept("/data", folder, "0" * 64, shards)
    opened_s = time.process_time() - began
    opened = resident_bytes() - before

    def make_plan() -> Planner:
        return Planner(
            index,
            seed=0,
            scale=(0.2, 1.0),
            ratio=(0.75, 1.33),
            flip=True,
            count=None,
            shuffle="full",
        )

    plan = make_plan()
    began = time.process_time()
    for step in range(100):
        last = plan(np.arange(step * 256, (step + 1) * 256))
    drawn_s = time.process_time() - began
    again = make_plan()(np.arange(99 * 256, 100 * 256))
    return {
        "open_cpu_s": opened_s,
        "open_bytes_per_row": opened / rows,
        "draw_cpu_ms": 10 * drawn_s,
        "bytes_per_row": (resident_bytes() - before) / rows,
        "resumed": all(np.array_equal(a, b) for a, b in zip(last, again, strict=True)),
    }


def main() -> None:
    """Measure each number of rows."""
    folder, *numbers = sys.argv[1:]
    if numbers[0] == "--use":
        sys.stdout.write(json.dumps(measure_use(Path(folder), int(numbers[1]))) + "\n")
        return
    for rows in map(int, numbers):
        place = Path(folder) / str(rows)
        began = time.process_time()
        write_rows(place, rows)
        sys.stdout.write(f"{rows} rows: written in {time.process_time() - began:.2f} CPU-s; ")
        sys.stdout.flush()
        command = [sys.executable, "-m", "tests.dataloading.index_scale", str(place), "--use"]
        subprocess.run([*command, str(rows)], check=True)
        for path in place.iterdir():
            path.unlink()


if __name__ == "__main__":
    main()
