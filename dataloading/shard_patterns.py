"""Paths that name several files: braces, as in ``{000..146}``, and wildcards."""

import errno
import glob
import itertools
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from dataloading.errors import DataError
from dataloading.patience import LASTING, PATIENCE_S, Patience, retry_listing

MAX_FILES = 1_000_000
"""Most files that the braces of one path may expand to."""
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)", re.ASCII)


def is_glob(path: Path) -> bool:
    """Return whether a path that does not exist is a pattern with ``*``, ``?`` or ``[...]``."""
    return glob.has_magic(str(path)) and not os.path.lexists(path)


def require_reachable(root: Path) -> None:
    """Refuse a path below a folder that cannot be searched; the path itself may be missing.

    Raises:
        DataError: names the path.
        ReadError: if storage fails for longer than reads are retried.
    """

    def look_up() -> None:
        try:
            root.stat()
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:  # a pattern with many names in braces
                return
            if error.errno not in LASTING:
                raise
            raise DataError(
                f"{root}: cannot be looked up ({error.strerror}); correct data.path, or make the "
                "folders above it readable"
            ) from error

    Patience(PATIENCE_S).retry(look_up, str(root))


def has_files(path: Path) -> bool:
    """Return whether a path exists, or a file matches it as a pattern.

    Raises:
        DataError: for a path that cannot be looked up, or an invalid pattern.
        ReadError: if storage fails for longer than reads are retried.
    """
    require_reachable(path)
    if os.path.exists(path):
        return True
    texts = [*map(Path, expand_braces(path))] if "{" in str(path) else [path]
    return retry_listing(
        lambda: any(
            expand_wildcards(one) if is_glob(one) else os.path.exists(one) for one in texts
        ),
        str(path),
    )


def expand_wildcards(path: Path) -> list[Path]:
    """Return the files and folders that a pattern with ``*``, ``?`` or ``[...]`` matches, by name.

    Raises:
        OSError: if a folder whose files may match cannot be listed or searched.
    """
    known, parts = Path(*path.parts[:1]), path.parts[1:]
    if not path.is_absolute():
        known, parts = Path(), path.parts
    while parts and os.path.exists(known / parts[0]):  # such folders may have [ in their names
        known, parts = known / parts[0], parts[1:]
    begin = glob.escape(str(known))
    for depth, part in enumerate(parts):
        for folder in glob.glob(os.path.join(begin, *parts[:depth], ""), recursive=True):
            _require_open(folder, part)
    found = glob.glob(os.path.join(begin, *parts), recursive=True)
    return [Path(text) for text in sorted(found)]


def _require_open(folder: str, part: str) -> None:
    """Raise the error that makes glob skip a folder in the search for ``part``."""
    if glob.has_magic(part):
        os.scandir(folder).close()
    else:
        with suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(os.path.join(folder, part))


def expand_braces(path: Path | str) -> Iterator[str]:
    """Yield the file names that a pattern expands to."""
    pieces = _BRACES.split(str(path))  # texts at even places, insides of braces at odd ones
    choices = [_choices(path, piece) if i % 2 else [piece] for i, piece in enumerate(pieces)]
    number = math.prod(map(len, choices))
    if number > MAX_FILES:
        raise DataError(f"{path}: expands to {number} files; expected at most {MAX_FILES}")
    for texts in itertools.product(*choices):
        yield "".join(texts)


def _choices(path: Path | str, inside: str) -> Sequence[str]:
    bounds = _RANGE.fullmatch(inside)
    if bounds is None:
        if "," in inside:
            return inside.split(",")
        raise DataError(
            f"{path}: {{{inside}}} is not a range; expected a form such as {{000..146}} or {{a,b}}"
        )
    first, last = int(bounds[1]), int(bounds[2])
    if abs(last - first) >= MAX_FILES:
        raise DataError(f"{path}: {{{inside}}} expands to more than {MAX_FILES} files")
    padded = any(len(text) > 1 and text.startswith("0") for text in bounds.groups())
    width = max(map(len, bounds.groups())) if padded else 0
    step = 1 if last >= first else -1
    return [f"{number:0{width}d}" for number in range(first, last + step, step)]
