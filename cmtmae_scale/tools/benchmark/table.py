"""Results as a Markdown table and as JSON."""

import json
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from cmtmae_scale.runtime.storage import write_atomic
from cmtmae_scale.tools.benchmark.training import StepResult

PACKAGES = (
    "torch",
    "deepspeed",
    "timm",
    "open_clip_torch",
    "transformers",
    "torchvision",
    "Pillow",
)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def provenance(device: torch.device, ranks: int) -> dict[str, Any]:
    """Return command, device and versions, to be recorded with every measurement."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    versions: dict[str, str] = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "command": shlex.join(["python", *sys.argv]),
        "device": f"{ranks} x {name}",
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "versions": versions,
    }


def training_tables(results: Sequence[StepResult], on_gpu: bool) -> str:
    """Return two tables: rates, and time per stage of a step."""
    unit = "s" if on_gpu else "CPU-s"
    first = next((r for r in results if r.step_s), None)
    if first is None or first.step_s is None:
        return "\n".join(f"{result.label}: {result.fault}" for result in results)
    peak_names = list(first.mfu)
    header = ["variant", f"{unit} per step", "of the first", f"images/{unit}", f"masked/{unit}"]
    header += [f"MFU ({name})" for name in peak_names]
    header += [f"student MFU ({name})" for name in peak_names]
    header += ["peak GiB", "modelled", "data wait", "launches" if on_gpu else "operators"]
    rows: list[list[str]] = []
    for one in results:
        if one.step_s is None:
            rows.append([one.label, str(one.fault)] + [""] * (len(header) - 2))
            continue
        row = [one.label, str(one.step_s), f"{one.step_s.median / first.step_s.median:.3f}"]
        row += [f"{one.images_s:.4g}", f"{one.masked_samples_s:.4g}"]
        row += [f"{one.mfu.get(name, 0):.1%}" for name in peak_names]
        row += [f"{one.student_mfu.get(name, 0):.1%}" for name in peak_names]
        row += ["-" if one.peak_gib is None else f"{one.peak_gib:.2f}", f"{one.estimate_gib:.2f}"]
        rows.append([*row, f"{one.data_wait_fraction:.1%}", str(one.calls)])
    return markdown_table(header, rows) + "\n\n" + stage_table(results, unit)


def stage_table(results: Sequence[StepResult], unit: str) -> str:
    """Return time and fraction per stage; columns in the order of a step."""
    done = [one for one in results if one.step_s is not None]
    names = list(dict.fromkeys(name for one in done for name in one.parts_s))
    rows: list[list[str]] = []
    for one in done:
        total = sum(one.parts_s.values())
        row = [one.label]
        for name in names:
            value = one.parts_s.get(name)
            row.append("-" if value is None else f"{1e3 * value:.2f} ({value / total:.0%})")
        rows.append([*row, f"{1e3 * one.communication_s:.2f}"])
    header = [f"variant, {unit} x 1e-3 per step", *names, "collectives, busy"]
    return markdown_table(header, rows)


def save_tables(path: Path, facts: dict[str, Any], results: Any, text: str) -> None:
    """Write facts and results (dataclasses) to ``path`` with ``.json``, tables with ``.md``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = json.dumps({**facts, "results": results}, indent=1, default=asdict)
    write_atomic(path.with_suffix(".json"), whole + "\n")
    lines = [f"- {name}: {value}" for name, value in facts.items()]
    write_atomic(path.with_suffix(".md"), "\n".join(lines) + "\n\n" + text + "\n")
