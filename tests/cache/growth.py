"""Cost of a teacher cache as the number of its shards grows, 100 small rows each.

    TMPDIR=/dev/shm python -m tests.cache.growth 1000 10000 100000

Prints CPU seconds of this process, attempts to open a file, listed folders, and the exponent of the
CPU seconds: 1 is linear, 0 does not grow.

``missing`` finds what is missing of a complete cache. ``full`` and ``window`` read 20
micro-batches of 128 rows in the order of ``data.shuffle``. ``absent`` reads 100 micro-batches of a
sidecar's cache whose rows are missing, with all shards elsewhere. ``write`` writes 100 more shards.
``save`` deletes the ten shards that a save has passed, with all others ahead. Shards of which no
row is read are copies of the first shard.
"""

import argparse
import math
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cmtmae_scale.cache.format import ENDLESS, Manifest, missing_shards, shard_path, write_shard
from cmtmae_scale.cache.reader import CacheReader
from cmtmae_scale.cache.sidecar import delete_shards_before
from dataloading.order import sample_ids, window_ids
from dataloading.plan import Plan

ROWS, BATCH, STEPS, MORE = 100, 128, 100, 100
READ = 20 * BATCH
LISTINGS = ("os.scandir", "os.listdir")


class Cost(NamedTuple):
    seconds: float
    opens: int
    listings: int


def measure(work: Callable[[], object], counts: Counter[str]) -> Cost:
    counts.clear()
    begun = time.process_time()
    work()
    seconds = time.process_time() - begun
    return Cost(seconds, counts["open"], sum(counts[name] for name in LISTINGS))


def read_rows(folder: Path, manifest: Manifest, rows: NDArray[np.int64], count: int | None) -> int:
    """Read rows micro-batch by micro-batch; returns how many could not be used."""
    reader = CacheReader(folder, manifest, count, pin=False)
    faults = 0
    for some in np.split(rows, range(BATCH, len(rows), BATCH)):
        zeros = np.zeros(len(some), np.int64)
        plan = Plan(some, some, zeros, np.zeros((len(some), 4), np.int32), zeros > 0)
        reader.submit(plan)
        faults += sum(fault is not None for fault in reader.collect(plan).faults)
    reader.close()
    return faults


def write(
    folder: Path, manifest: Manifest, shards: Iterable[int], fields: dict[str, Tensor]
) -> None:
    for shard in shards:
        write_shard(folder, manifest, shard, fields)


def fill(folder: Path, manifest: Manifest) -> None:
    """Copy the first shard to all that are missing."""
    data = shard_path(folder, manifest, 0).read_bytes()
    for shard in missing_shards(folder, manifest):
        path = shard_path(folder, manifest, shard)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)


def measure_cache(folder: Path, shards: int, counts: Counter[str]) -> dict[str, Cost]:
    """Make a cache of so many shards and use it; returns the cost of each use."""
    manifest = Manifest({}, {}, "attention", shards * ROWS, ROWS, 16, 0, 0, None)
    endless = Manifest({}, {}, "attention", ENDLESS, ROWS, 16, 0, 0, None)
    fields = {
        "attention": torch.rand(ROWS, 16).half(),
        "valid": torch.ones(ROWS, dtype=torch.uint8),
    }
    positions = np.arange(READ, dtype=np.int64)
    full, window = (order(manifest.num_rows, 0, positions)[0] for order in (sample_ids, window_ids))
    write(folder, manifest, {0, *(np.concatenate([full, window]) // ROWS).tolist()}, fields)
    fill(folder, manifest)
    absent = manifest.num_rows + np.arange(STEPS * BATCH, dtype=np.int64)

    def read(rows: NDArray[np.int64], count: int | None, expected: int) -> None:
        used = manifest if count else endless
        if read_rows(folder, used, rows, count) != expected:
            raise SystemExit("rows cannot be used as they should be")

    uses: dict[str, Callable[[], object]] = {
        "missing": lambda: missing_shards(folder, manifest),
        "full": lambda: read(full, 1, 0),
        "window": lambda: read(window, 1, 0),
        "absent": lambda: read(absent, None, len(absent)),
        "write": lambda: write(folder, endless, range(shards, shards + MORE), fields),
        "save": lambda: delete_shards_before(folder, 10),
    }
    return {name: measure(use, counts) for name, use in uses.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shards", nargs="+", type=int)
    options = parser.parse_args()
    counts: Counter[str] = Counter()
    sys.addaudithook(lambda name, _: counts.update([name]))
    before: tuple[int, dict[str, Cost]] | None = None
    for shards in options.shards:
        with tempfile.TemporaryDirectory() as folder:
            costs = measure_cache(Path(folder), shards, counts)
            files = sum(len(names) for _, _, names in os.walk(folder))
        print(f"{shards} shards, {shards * ROWS} rows, {files} files after the save")
        for name, cost in costs.items():
            text = f"  {name:8} {cost.seconds:9.4f} s, {cost.opens} opened, {cost.listings} listed"
            if before is not None:
                ratio = cost.seconds / max(before[1][name].seconds, 1e-6)
                text += f", exponent {math.log(ratio) / math.log(shards / before[0]):.2f}"
            print(text, flush=True)
        before = shards, costs


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
