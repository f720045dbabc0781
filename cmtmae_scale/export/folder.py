"""A folder that is published whole or not at all."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cmtmae_scale.errors import ConfigError
from cmtmae_scale.runtime.storage import atomic_path, sync


@contextmanager
def publish_folder(output: Path) -> Iterator[Path]:
    """Yield a draft folder; rename it when the block ends, remove it when the block fails.

    Args:
        output: the folder's name; it must not exist yet.

    Yields:
        The draft folder, beside the output.

    Raises:
        ConfigError: if the output exists or cannot be written.
    """
    if output.exists() or output.is_symlink():
        raise ConfigError(f"--output={output} exists; delete it or name another folder")
    try:
        with atomic_path(output) as draft:
            draft.mkdir()
            yield draft
        sync(output.parent)
    except OSError as error:
        raise ConfigError(f"--output={output} cannot be written ({error})") from error
