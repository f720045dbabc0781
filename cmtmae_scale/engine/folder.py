"""Checks whether a run may use a folder, so that files of other programs are not overwritten."""

from pathlib import Path
from typing import Any

from cmtmae_scale.config.yaml_text import read_yaml
from cmtmae_scale.engine.sinks import LOG_FILE
from cmtmae_scale.errors import ConfigError
from cmtmae_scale.runtime.lock import describe_unusable
from cmtmae_scale.runtime.storage import read_json

CONFIG_FILE = "config.yaml"
GROUPS = ("run", "data", "train")
"""Groups that the settings of every run have, of every version and task."""


def refuse_foreign_folder(run_dir: Path) -> None:
    """Refuse a folder that holds the settings or the log of another program.

    A run replaces ``config.yaml`` and truncates ``log.jsonl`` at its step.

    Raises:
        ConfigError: names the file, or the folder that cannot be read.
        StorageError: if the store fails.
    """
    try:
        if (run_dir / CONFIG_FILE).exists():
            foreign = CONFIG_FILE if not is_run_config(run_dir / CONFIG_FILE) else None
        else:
            foreign = LOG_FILE if not is_run_log(run_dir / LOG_FILE) else None
    except OSError as error:
        raise describe_unusable(run_dir, error) from error
    if foreign is not None:
        raise ConfigError(
            f"run.output_dir={run_dir} holds {foreign} of another program, which a run would "
            "overwrite; use another run.output_dir, or move the file away"
        )


def is_run_config(file: Path) -> bool:
    """Return whether a file holds the settings of a run, of this version or an earlier one.

    Raises:
        OSError: if the store fails, so that the content of the file is unknown.
    """
    try:
        tree: dict[str, Any] = read_yaml(file)
    except ConfigError as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and not isinstance(cause, IsADirectoryError):
            raise cause from error
        return False
    return all(isinstance(tree.get(name), dict) for name in GROUPS)


def is_run_log(file: Path) -> bool:
    """Return whether a log is absent, empty, or begins with an entry of a step."""
    try:
        with file.open("rb") as opened:
            line = opened.readline(2**20)
    except FileNotFoundError:
        return True
    except IsADirectoryError:
        return False
    if not line.strip():
        return True
    try:
        entry = read_json(line)
    except ValueError:
        return False
    return isinstance(entry, dict) and "step" in entry
