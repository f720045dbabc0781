"""The tables of docs/backends.md: parity of all backends, and every pair of save and load.

``python -m pytest -m slow -s tests/backends/test_tables.py`` prints them.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cmtmae_scale.checkpoint import layout
from cmtmae_scale.checkpoint.chunks import ChunkReader
from tests.backends import backend_case as case
from tests.processes import run_ranks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.gloo,
    pytest.mark.deepspeed,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
]
STEPS = 10
# Name in the table -> kind of backend, ranks, views per micro-batch.
BACKENDS = {
    "FSDP2, 2 ranks": ("full", 2, 2),
    "FSDP2, 4 ranks": ("full", 4, 1),
    "HSDP, 2 x 2 ranks": ("node2", 4, 1),
    "replicated, 2 ranks": ("replicate", 2, 4),
    "ZeRO-1, 2 ranks": ("zero1", 2, 2),
    "ZeRO-1, 4 ranks": ("zero1", 4, 1),
    "ZeRO-2, 2 ranks": ("zero2", 2, 2),
    "ZeRO-2, 4 ranks": ("zero2", 4, 2),
    "ZeRO-3, 2 ranks": ("zero3gathered", 2, 2),
    "ZeRO-3, 4 ranks": ("zero3", 4, 1),
}


def run(kind: str, ranks: int, micro: int, changes: dict[str, Any]) -> Any:
    if kind == "plain":
        curve, parts = case.run_case("plain", micro, STEPS, changes)
        return np.array(curve)[:, :2], case.assemble([parts])
    results = run_ranks(ranks, case.run_case, kind, micro, STEPS, changes)
    return np.array(results[0][0])[:, :2], case.assemble([part for _, part in results])


def differences(found: Any, expected: Any) -> tuple[float, float, float, float]:
    """Largest relative difference of loss and norm, absolute one of weights and averages."""
    loss, norm = np.abs(found[0] / expected[0] - 1).max(0)
    largest = {"model": 0.0, "momentum": 0.0}
    for key, value in found[1].items():
        kind = key.partition(".")[0]
        if kind in largest:
            ours, theirs = case.trained(key, value), case.trained(key, expected[1][key])
            largest[kind] = max(largest[kind], float(np.abs(ours - theirs).max()))
    return float(loss), float(norm), largest["model"], largest["momentum"]


def test_table_of_parity(capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_num_threads(1)
    expected = run("plain", 1, 4, {})
    lines = [
        "| backend | loss | gradient norm | weights | momentum weights |",
        "|---|---|---|---|---|",
    ]
    for changes, bounds in (
        ({}, (1e-5, 1e-5, 1e-5, 1e-5)),
        ({"backend__precision": "bf16"}, (2e-2, 2e-1, 2e-2, 5e-3)),
    ):
        for name, (kind, ranks, micro) in BACKENDS.items():
            found = differences(run(kind, ranks, micro, changes), expected)
            label = name + (", bf16" if changes else "")
            lines.append(f"| {label} | " + " | ".join(f"{value:.1e}" for value in found) + " |")
            assert all(value <= bound for value, bound in zip(found, bounds, strict=True)), label
    with capsys.disabled():
        print("", *lines, sep="\n")


def test_table_of_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_num_threads(1)
    backends = {"one process": ("plain", 1, 4)} | BACKENDS
    folders = {name: tmp_path / str(number) for number, name in enumerate(backends)}
    losses: dict[str, float] = {}
    for name, (kind, ranks, micro) in backends.items():
        arguments = (case.save_after_two_steps, kind, micro, folders[name])
        losses[name] = (
            arguments[0](*arguments[1:]) if ranks == 1 else run_ranks(ranks, *arguments)[0]
        )
    lines = [
        "| saved by, read by | " + " | ".join(backends) + " |",
        "|---" * (len(backends) + 1) + "|",
    ]
    cells: dict[tuple[str, str], str] = {}
    for target, (kind, ranks, micro) in backends.items():
        arguments = (case.load_each, kind, micro, list(folders.values()))
        loaded = (
            [arguments[0](*arguments[1:])]
            if ranks == 1
            else run_ranks(ranks, *arguments, timeout_s=300)
        )
        for number, source in enumerate(backends):
            reader = ChunkReader(layout.folder_of(folders[source], 2))
            held = case.assemble([each[number][0] for each in loaded])
            assert held.keys() == reader.index.keys()
            same = all(
                np.array_equal(value, reader.read_tensor(key).numpy())
                for key, value in held.items()
            )
            difference = abs(loaded[0][number][1] / losses[source] - 1)
            assert same and difference < 1e-5, (source, target, difference)
            cells[source, target] = f"same bits, {difference:.0e}"
    for source in backends:
        lines.append(f"| {source} | " + " | ".join(cells[source, t] for t in backends) + " |")
    with capsys.disabled():
        print("", *lines, sep="\n")
