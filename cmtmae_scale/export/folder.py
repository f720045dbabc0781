"""A folder that appears whole, or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cmtmae_scale.errors import ConfigError
from cmtmae_scale.runtime.storage import sync


@contextmanager
def published(output: Path) -> Iterator[Path]:
    """Give a draft folder to fill; it gets its name when the block ends, else it is removed.

    Args:
        output: the folder's name; it must not exist yet.

    Yields:
        The draft, beside it.

    Raises:
        ConfigError: if the name is taken or the store refuses.
    """
    if output.exists() or output.is_symlink():
        raise ConfigError(f"--output={output} exists; delete it or name another folder")
    draft = output.with_name(f".{output.name}.draft-{os.getpid()}")
    try:
        draft.mkdir()
        yield draft
        sync(draft)
        draft.rename(output)
        sync(output.parent)
    except OSError as error:
        raise ConfigError(f"--output={output} cannot be written ({error})") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
