"""The fraction of a device's rates that kernels reach, from a measured row of the suite."""

import json
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cmtmae_scale.config.load import load_config
from cmtmae_scale.config.schema import Config
from cmtmae_scale.errors import ConfigError
from cmtmae_scale.tools.plan.devices import Device
from cmtmae_scale.tools.plan.kernels import StepKernels, device_seconds
from cmtmae_scale.tools.plan.plan import peak_flops_s


class MeasuredStep(NamedTuple):
    """A training step that the suite measured on one GPU."""

    row: str
    config: Config
    images_s: float


def find_step(file: Path, config: Config, device: Device) -> MeasuredStep | None:
    """Return the measured step of the same student, if any; one of the same backend is preferred.

    Args:
        file: results of ``cmtmae benchmark suite``.
        config: settings of the run that is planned.
        device: the row's device must have its name.

    Raises:
        ConfigError: if the file holds something else.
    """
    try:
        found = list(list_steps(json.loads(file.read_text())["rows"], device))
    except OSError as error:
        raise ConfigError(f"--suite {file}: {error.strerror}; name another file") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"--suite {file}: not a result of cmtmae benchmark suite; name another file"
        ) from error
    usable = [one for one in found if one.config.student.arch == config.student.arch]
    usable.sort(key=lambda one: one.config.backend.name != config.backend.name)
    return usable[0] if usable else None


def list_steps(rows: dict[str, Any], device: Device) -> Iterator[MeasuredStep]:
    """Yield the training steps measured on a device."""
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
            recipe, overrides = recipe_of(words[words.index("train") + 1 :])
            # The suite runs in a clone; elsewhere its path stands for the shipped recipe.
            found = recipe if Path(recipe).exists() else Path(recipe).stem
            yield MeasuredStep(name, load_config(found, overrides), images_s)


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
    own = [*kernels.teacher, *kernels.micro, *kernels.update]
    views, flops_s = step.config.train.micro_batch_size, peak_flops_s(step.config, device)
    return device_seconds(own, views, flops_s, device.memory_bytes_s) / (views / step.images_s)
