"""The list of samples that could not be decoded."""

import json
import logging
import os
from pathlib import Path

logger = logging.getLogger(__name__)


class Quarantine:
    """Append failed samples to a JSON-lines file, each once.

    A line is ``{"sample_id": 7, "name": "a/b.jpg", "reason": "..."}``. Samples that the file names
    already, from an earlier start or another rank, are not written again. The list is a report: the
    order of draws does not depend on it.

    Args:
        path: the file, made with its folder at the first failure; ``None`` keeps no file.
    """

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        self._path = None if path is None else Path(path)
        self._names: set[str] = set() if self._path is None else _names_in(self._path)

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def add(self, sample_id: int, name: str, reason: str) -> bool:
        """Record one failure and warn about it, unless its name is recorded already.

        Args:
            sample_id: row of the index.
            name: key of the sample.
            reason: what went wrong.

        Returns:
            Whether the sample was new.

        Raises:
            OSError: if the file cannot be written.
        """
        if name in self._names:
            return False
        self._names.add(name)
        logger.warning("sample %d (%s) is left out of the loss: %s", sample_id, name, reason)
        if self._path is not None:
            record = {"sample_id": sample_id, "name": name, "reason": reason}
            self._path.parent.mkdir(parents=True, exist_ok=True)
            _append_line(self._path, json.dumps(record))
        return True


def _append_line(path: Path, line: str) -> None:
    """Write a line in one call, so that lines of several ranks do not mix."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        end = os.lseek(descriptor, 0, os.SEEK_END)
        cut = end > 0 and os.pread(descriptor, 1, end - 1) != b"\n"  # a crash left half a line
        os.write(descriptor, f"{chr(10) * cut}{line}\n".encode("ascii"))
    finally:
        os.close(descriptor)


def _names_in(path: Path) -> set[str]:
    names: set[str] = set()
    if not path.exists():
        return names
    for line in path.read_text(encoding="ascii", errors="replace").splitlines():
        try:
            names.add(json.loads(line)["name"])
        except (ValueError, KeyError, TypeError):
            logger.warning("%s: a line is not readable and is passed over: %r", path, line[:80])
    return names
