"""CPU time of `cmtmae study --dry-run`, `cmtmae report` and a save as their input grows.

    python tests/growth.py study 250 500 1000
    python tests/growth.py like 250 500 1000
    python tests/growth.py report 25000 50000 100000
    python tests/growth.py save 8 64 512

``study``: rows of one learning rate each, three seeds in turn, over a teacher cache that all rows
of a seed share. ``like``: each row applies the settings of the row before. ``report``: lines of the
log of a run with 15 logged values and an evaluation each tenth line, beside 8 finished runs of
other settings with as many lines. ``save``: writers of a checkpoint that has the names of ViT-H's
tensors and moments, but one value per row, so that only names and chunks have a cost;
the seconds are rank 0's, which publishes the checkpoint when the other shards are there, and then
those of the processes that it starts. Prints CPU seconds of this process without its imports, and
the exponent: 1 is linear.
"""

import argparse
import contextlib
import io
import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from cmtmae_scale.backends.base import Fragment
from cmtmae_scale.checkpoint.layout import folder_of
from cmtmae_scale.checkpoint.writer import Writer
from cmtmae_scale.commands import report, study
from cmtmae_scale.config.load import load_config
from cmtmae_scale.tools.report import page, ranges, run  # noqa: F401  imports of a report
from tests.checkpoint.save_case import state_of
from tests.tools.report.report_case import entries, write_lines, write_run

SIBLINGS = 8
ROWS = 5120
"""Rows of a matrix in ViT-H's MLP."""
BLOCK = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
KINDS = ("model.encoder", "exp_avg.encoder", "exp_avg_sq.encoder", "momentum")


def write_study(folder: Path, rows: int, chained: bool) -> list[str]:
    """Write a study of ``rows`` rows; returns the arguments of its dry run."""
    own = [f"optimizer.base_lr={1e-4 * (1 + k / rows):.10f}" for k in range(rows)]
    table: dict[str, Any] = {
        f"row{k}": {"settings": [own[k]], "seeds": [k % 3]} for k in range(rows)
    }
    if chained:
        for k in range(1, rows):
            table[f"row{k}"]["like"] = f"row{k - 1}"
    tree = yaml.safe_load(Path("configs/studies/cpu.yaml").read_text())
    tree |= {"dir": str(folder / "study"), "comparisons": [], "rows": table}
    tree["settings"] += ["teacher.mode=cached"]
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(tree, sort_keys=False))
    return [str(file), "--dry-run"]


def write_logs(folder: Path, lines: int) -> list[str]:
    """Write a run with a log of ``lines`` lines, and siblings; returns the report's arguments."""
    for k in range(SIBLINGS + 1):
        place = write_run(folder / f"run{k}", f"optimizer.base_lr={1e-3 * (1 + k)}")
        write_lines(place / "log.jsonl", entries(2 * lines * 5 // 6, seed=k)[:lines])
        exit_file = {"code": 0, "step": 10**9, "reason": "done"}
        (place / "exit.json").write_text(json.dumps(exit_file))
    return [str(folder / "run0")]


def fragments_of(rank: int, writers: int) -> dict[str, Fragment]:
    """Return a rank's share of the rows of every tensor, a value per row."""
    rows = -(-ROWS // writers)
    low = min(rank * rows, ROWS)
    local = torch.ones(min(rows, ROWS - low))
    names = [f"blocks.{k}.{part}.{one}" for k in range(32) for part in BLOCK for one in "wb"]
    return {
        f"{kind}.{name}": Fragment(low, (ROWS,), local, True) for kind in KINDS for name in names
    }


def measure_save(writers: int) -> float:
    """Return the CPU seconds of rank 0 while it publishes a checkpoint; print all seconds."""

    def write(place: str, rank: int) -> None:
        writer = Writer(Path(place), rank, writers, 1, background=True, token=1)
        writer.save(1, fragments_of(rank, writers), state_of(1))
        writer.settle()

    with tempfile.TemporaryDirectory() as place:
        for rank in range(1, writers):
            write(place, rank)
        begun = os.times()
        write(place, 0)
        ended = os.times()
        if not folder_of(Path(place), 1).exists():
            raise SystemExit("the checkpoint was not published")
    user, system, child_user, child_system, clock = (
        after - before for before, after in zip(begun, ended, strict=True)
    )
    children = child_user + child_system
    print(f"{clock:.2f} s by the clock, {children:.2f} s in processes of rank 0", end="; ")
    return user + system


def measure(prepare: Callable[[Path, int], list[str]], command: Any, size: int) -> float:
    """Return the CPU seconds of a command on input of a size."""
    with tempfile.TemporaryDirectory() as folder:
        words = prepare(Path(folder), size)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            begun = time.process_time()
            code = command(words)
            seconds = time.process_time() - begun
    if code:
        raise SystemExit(f"exit code {code}: {printed.getvalue()}")
    return seconds


def main() -> None:
    cases: dict[str, Callable[[int], float]] = {
        "study": partial(measure, partial(write_study, chained=False), study.run_study),
        "like": partial(measure, partial(write_study, chained=True), study.run_study),
        "report": partial(measure, write_logs, report.write_report),
        "save": measure_save,
    }
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=tuple(cases))
    parser.add_argument("sizes", nargs="+", type=int)
    options = parser.parse_args()
    load_config("demo")  # what a first call imports and caches
    before: tuple[int, float] | None = None
    for size in options.sizes:
        seconds = cases[options.what](size)
        text = f"{options.what} {size}: {seconds:.2f} s"
        if before is not None:
            text += f", exponent {math.log(seconds / before[1]) / math.log(size / before[0]):.2f}"
        before = size, seconds
        print(text, flush=True)


if __name__ == "__main__":
    logging.disable(logging.INFO)
    main()
