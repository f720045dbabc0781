"""Pre-train from Python: ``cmtmae pretrain`` as a function."""

import json
import logging
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cmtmae_scale.config.load import load_config
from cmtmae_scale.config.schema import Config
from cmtmae_scale.engine.run import run_task
from cmtmae_scale.engine.stop import SIGNALS, LaunchInterrupted, interrupt_launch
from cmtmae_scale.errors import EXIT_DONE, ConfigError, RunStoppedError
from cmtmae_scale.pretraining.task import Pretraining
from cmtmae_scale.runtime.collectives import pick_device
from cmtmae_scale.runtime.launch import World, find_world
from cmtmae_scale.runtime.log import set_up_logging
from cmtmae_scale.tools.estimate import peak_bytes
from cmtmae_scale.tools.figures.during import open_figures


def pretrain(config: str | Path, **overrides: Mapping[str, Any] | list[Any]) -> Path:
    """Pre-train a student in this process, or resume; call from the main thread.

    Each process of a launcher, such as torchrun, is a rank. Ctrl-C, SIGTERM and SIGUSR1 save a
    checkpoint, once there is something to save, and stop the run. The caller's handlers are
    restored afterwards. Log records go to standard error, unless the caller has set up logging.

    Args:
        config: a recipe's path, or the name of a shipped recipe.
        overrides: groups of the recipe with the keys that differ, ``train={"steps": 20}``; of
            several teachers the list, or the entries that differ, ``teachers={"b": {"map": 2}}``.

    Returns:
        The run's folder, ``run.output_dir``.

    Raises:
        ConfigError: a key or value that can never work; names the remedy.
        RunStoppedError: stopped on request; the same call resumes the run.
        CmtMaeError, DataError: as ``cmtmae pretrain`` reports; see ``cmtmae_scale.errors``.
    """
    world = find_world()
    if not logging.getLogger().handlers and not logging.getLogger("cmtmae_scale").handlers:
        set_up_logging(world.rank, world.world_size)
    lines = override_lines(overrides)
    settings = load_config(config, lines)
    with own_handlers():
        interrupt_launch()
        try:
            code = train_rank(settings, world, str(config), lines)
        except LaunchInterrupted as stopped:
            raise RunStoppedError(
                f"{settings.run.output_dir}: stopped ({stopped}) before the first step, with "
                "nothing to save; the same call starts again"
            ) from stopped
    if code != EXIT_DONE:
        raise RunStoppedError(
            f"{settings.run.output_dir}: stopped on request; the same call resumes the run"
        )
    return Path(settings.run.output_dir)


def train_rank(config: Config, world: World, recipe: str, overrides: Sequence[str]) -> int:
    """Pre-train as one rank; recipe and overrides are recorded as given; see ``run_task``."""
    device = pick_device(world)
    return run_task(
        Pretraining(config, world, device),
        config,
        world,
        device,
        recipe,
        overrides,
        open_figures,
        lambda: peak_bytes(config, world.world_size, world.local_world_size),
    )


def override_lines(overrides: Mapping[str, Any]) -> list[str]:
    """Return groups of keys as ``group.key=value``, values in JSON, which YAML reads.

    Raises:
        ConfigError: if a group is not a mapping, or a value is not of YAML's types.
    """
    lines: list[str] = []
    for name, group in overrides.items():
        if name == "teachers" and isinstance(group, list):
            lines.append(f"{name}={to_json(name, group)}")
            continue
        if not isinstance(group, Mapping):
            raise ConfigError(f"{name}={group!r} is not a group; give {name}={{'KEY': value}}")
        for key, value in group.items():
            lines.append(f"{name}.{key}={to_json(f'{name}.{key}', value)}")
    return lines


def to_json(key: str, value: Any) -> str:
    """Return the value of a key in JSON.

    Raises:
        ConfigError: if it is not of YAML's types.
    """
    try:
        return json.dumps(value, ensure_ascii=False, default=os.fspath)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{key}={value!r} is not a value ({error})") from error


@contextmanager
def own_handlers() -> Iterator[None]:
    """Restore the handlers of the signals that a run handles."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
