"""The fraction of a device's rates that kernels reach, from a measured row of the suite."""

import json
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cmtmae_scale.config.load import load_config
from cmtmae_scale.config.schema import Config
from cmtmae_scale.errors import ConfigError
from cmtmae_scale.tools.plan.devices import Device
from cmtmae_scale.tools.plan.kernels import StepKernels, count_kernels, device_seconds
from cmtmae_scale.tools.plan.plan import peak_flops_s


def find_fraction(file: Path, config: Config, device: Device) -> tuple[float, str] | None:
    """Return the fraction that a measured step of the same student reaches, and where it is from.

    ``None``: the suite has no such row. A row with the same backend is preferred.

    Args:
        file: results of ``cmtmae benchmark suite``.
        config: settings of the run that is planned.
        device: the row's device must have its name.

    Raises:
        ConfigError: if the file holds something else.
    """
    try:
        rows = json.loads(file.read_text())["rows"]
        found = list(list_rows(rows, device))
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise ConfigError(
            f"--suite {file}: not a result of cmtmae benchmark suite; name another file"
        ) from error
    usable = [one for one in found if one[1].student.arch == config.student.arch]
    usable.sort(key=lambda one: one[1].backend.name != config.backend.name)
    if not usable:
        return None
    name, measured, images_s = usable[0]
    bound_s = shortest_step_s(measured, count_kernels(measured), device)
    step_s = measured.train.micro_batch_size / images_s
    return bound_s / step_s, f"row {name} of {file}, {images_s:,.0f} images/s measured on one GPU"


def list_rows(rows: dict[str, Any], device: Device) -> Iterator[tuple[str, Config, float]]:
    """Yield name, config and images per second of the training steps measured on a device."""
    for name, row in rows.items():
        is_own = device.name.split("-")[0] in str(row.get("device")).lower()
        results = row.get("results")
        if row["state"] != "done" or row["small"] or not is_own or not isinstance(results, list):
            continue
        words = shlex.split(row["command"])
        if "train" not in words or {"--against", "real"} & set(words):
            continue
        images_s = results[0].get("images_s", 0.0)
        if images_s > 0:
            yield name, load_config(*recipe_of(words[words.index("train") + 1 :])), images_s


def recipe_of(words: Sequence[str]) -> tuple[str, list[str]]:
    """Return the recipe and the overrides of a command whose options all take one value."""
    recipe, overrides, position = "", list[str](), 0
    while position < len(words):
        if words[position].startswith("--"):
            if words[position] == "--config":
                recipe = words[position + 1]
            position += 2
        else:
            overrides.append(words[position])
            position += 1
    return recipe, overrides


def shortest_step_s(config: Config, kernels: StepKernels, device: Device) -> float:
    """Return the seconds of the kernels of a step of one micro-batch at the full rates."""
    own = [*kernels.teacher, *kernels.micro, *kernels.update]
    views, flops_s = config.train.micro_batch_size, peak_flops_s(config, device)
    return device_seconds(own, views, flops_s, device.memory_bytes_s)
