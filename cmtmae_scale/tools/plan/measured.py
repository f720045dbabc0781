"""The fraction of a device's rates that kernels reach, from a measured row of the suite."""

import json
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cmtmae_scale.config.load import load_config
from cmtmae_scale.config.schema import Config
from cmtmae_scale.errors import ConfigError
from cmtmae_scale.tools.plan.devices import Device
from cmtmae_scale.tools.plan.kernels import Kernel, StepKernels, device_seconds, online_fractions
from cmtmae_scale.tools.plan.plan import peak_flops_s


class MeasuredStep(NamedTuple):
    """A training step that the suite measured on one GPU."""

    row: str
    config: Config
    images_s: float
    device: str


class Found(NamedTuple):
    """Measurements of the suite for a run."""

    step: MeasuredStep | None
    """Of the same student, of the same backend if there is one."""
    outdated: list[str]
    """Rows of the device whose settings this version does not know."""


def find_step(file: Path, config: Config, device: Device) -> Found:
    """Find the measured step of the same student.

    Args:
        file: results of ``cmtmae benchmark suite``.
        config: settings of the run that is planned.
        device: the row's device must be this one.

    Raises:
        ConfigError: if the file holds something else.
    """
    outdated: list[str] = []
    try:
        found = list(list_steps(json.loads(file.read_text())["rows"], device, outdated))
    except OSError as error:
        raise ConfigError(f"--suite {file}: {error.strerror}; name another file") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"--suite {file}: not a result of cmtmae benchmark suite; name another file"
        ) from error
    usable = [one for one in found if student_size(one.config) == student_size(config)]
    usable.sort(key=lambda one: one.config.backend.name != config.backend.name)
    return Found(usable[0] if usable else None, outdated)


def student_size(config: Config) -> tuple[str | int | None, ...]:
    """Return the settings that determine the sizes of the student's matrix products."""
    student = config.student
    return student.arch, student.patch_size, student.width, student.depth, student.heads


def list_steps(rows: dict[str, Any], device: Device, outdated: list[str]) -> Iterator[MeasuredStep]:
    """Yield the training steps measured on a device; appends the names of outdated rows."""
    for name, row in rows.items():
        results = row.get("results")
        if row["state"] != "done" or row["small"] or not isinstance(results, list) or not results:
            continue
        words = shlex.split(row["command"])
        if "train" not in words or {"--against", "real"} & set(words):
            continue
        images_s, measured = results[0].get("images_s", 0.0), str(row.get("device"))
        if images_s > 0 and is_device(measured, device):
            recipe, overrides = recipe_of(words[words.index("train") + 1 :])
            # The suite runs in a clone; elsewhere its path means the shipped recipe.
            found = recipe if Path(recipe).exists() else Path(recipe).stem
            try:
                config = load_config(found, overrides)
            except ConfigError:
                outdated.append(name)
                continue
            yield MeasuredStep(name, config, images_s, measured)


def is_device(measured: str, device: Device) -> bool:
    """Return whether a name such as ``1 x NVIDIA A100-SXM4-80GB`` is that of a device.

    Both must have the same size of memory, where the name has one.
    """
    words = set(re.split(r"[^a-z0-9]+", measured.lower()))
    sizes = {word for word in words if re.fullmatch(r"\d+gb", word)}
    return set(device.name.split("-")) <= words and sizes <= {f"{device.memory_bytes / 1e9:.0f}gb"}


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


def reached_fraction(step: MeasuredStep, kernels: StepKernels, device: Device) -> float:
    """Return the seconds of a step's kernels at the full rates, divided by those measured.

    Args:
        step: one micro-batch on one GPU.
        kernels: of its config.
        device: that of the measurement.
    """
    views, flops_s = step.config.train.micro_batch_size, peak_flops_s(step.config, device)

    def run(group: Sequence[Kernel]) -> float:
        return device_seconds(group, views, flops_s, device.memory_bytes_s)

    seconds = run(kernels.micro) + run(kernels.update)
    for name, fraction in online_fractions(step.config).items():
        seconds += fraction * run(kernels.teachers[name])
    return seconds / (views / step.images_s)
