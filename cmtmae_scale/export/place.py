"""Path of an export, and its publication, whole or not at all."""

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cmtmae_scale.errors import ConfigError, remedy_for
from cmtmae_scale.export.origin import Origin
from cmtmae_scale.runtime.storage import atomic_path, sync

FOLDER = "export"
NOT_IN_NAMES = re.compile(r"[^\w.-]+")
LONGEST_NAME = 100


def default_output(origin: Origin, kind: str) -> Path:
    """Return ``RUN_DIR/export/<run.name>-<weights>-step-<step>-<kind>``.

    For a checkpoint that was moved out of its run, ``export/`` is beside the checkpoint.
    """
    name = NOT_IN_NAMES.sub("-", origin.config.run.name)[:LONGEST_NAME].strip(".-") or "run"
    place = (origin.run_dir or origin.folder.parent) / FOLDER
    return place / f"{name}-{origin.weights}-step-{origin.step:08d}-{kind}"


@contextmanager
def publish(output: Path) -> Iterator[Path]:
    """Yield a draft of a file or folder; rename it when the block ends, else remove it.

    A missing ``export/`` is made, and removed again if it stays empty.

    Raises:
        ConfigError: if the output exists or cannot be written.
    """
    with explain_refusal(output):
        is_there = output.exists() or output.is_symlink()
    if is_there:
        raise ConfigError(f"{output} exists; delete it, or name another place with --output")
    makes_folder = output.parent.name == FOLDER
    try:
        with explain_refusal(output):
            if makes_folder:
                output.parent.mkdir(exist_ok=True)
            with atomic_path(output) as draft:
                yield draft
            sync(output.parent)
    finally:
        if makes_folder:
            with suppress(OSError):
                output.parent.rmdir()


@contextmanager
def explain_refusal(output: Path) -> Iterator[None]:
    """Turn an ``OSError`` of the block into a ``ConfigError`` with the output and a remedy."""
    try:
        yield
    except OSError as error:
        remedy = remedy_for(error, "name another place with --output")
        raise ConfigError(f"{output} cannot be written ({error}); {remedy}") from error
