"""Results as a Markdown table and as JSON."""

import platform
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from cmtmae_scale.runtime.bf16 import bf16_instructions
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
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else describe_cpu()
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


def describe_cpu() -> str:
    """Return the CPU's name, vector instructions and bf16 instructions."""
    found = torch.cpu.get_capabilities()
    name = found.get("cpu_name") or platform.machine()
    bf16 = ", ".join(bf16_instructions(found)) or "emulated"
    return f"{name} ({torch.backends.cpu.get_cpu_capability()}; bf16: {bf16})"


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
    header += ["loss"] + (["GPU idle", "ready, s"] if on_gpu else [])
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
        row += [f"{one.data_wait_fraction:.1%}", str(one.calls), f"{one.loss:.5f}"]
        row += [f"{one.idle_fraction:.1%}", f"{one.ready_s:.0f}"] if on_gpu else []
        rows.append(row)
    tables = [markdown_table(header, rows), stage_table(results, unit)]
    if on_gpu:
        tables.append(timeline_table(first))
    return "\n\n".join(tables)


def training_headline(results: Sequence[StepResult]) -> str:
    """Return one line: the first variant in full, and the rate of the others."""
    parts: list[str] = []
    for one in results:
        if one.step_s is None:
            parts.append(f"{one.label}: {one.fault}")
            continue
        text = f"{one.label}: {one.images_s:.4g} images/s"
        if one.masked_samples_s != one.images_s:
            text += f", {one.masked_samples_s:.4g} masked views/s"
        if not parts:
            text += "".join(f", MFU {share:.1%} of {name}" for name, share in one.mfu.items())
        if not parts and one.peak_gib is not None:
            text += f", GPU idle {one.idle_fraction:.1%}"
            text += f", peak {one.peak_gib:.1f} GiB ({one.estimate_gib:.1f} modelled)"
        if one.data_wait_fraction > 0.001:
            text += f", data wait {one.data_wait_fraction:.1%}"
        parts.append(text)
    return "; ".join(parts)


def timeline_table(one: StepResult) -> str:
    """Return the kernels that take most of a profiled step, then the longest gaps between them."""
    rows = [[each.name, f"{1e3 * each.seconds:.2f}", str(each.count)] for each in one.kernels]
    gaps = [[f"{1e3 * gap.seconds:.2f}", gap.before, gap.after] for gap in one.gaps]
    return (
        f"One profiled step of {one.label}:\n\n"
        + markdown_table(["kernel", "ms", "launches"], rows)
        + "\n\n"
        + markdown_table(["gap, ms", "after", "before"], gaps)
    )


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
