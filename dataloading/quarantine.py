"""List of samples that could not be decoded."""

import fcntl
import json
import logging
import os
import time
from pathlib import Path

from dataloading.files import append_whole
from dataloading.index import Index

logger = logging.getLogger(__name__)

_LOCK_TRIES = 100
_LOCK_PAUSE_S = 0.01
_WARN_EVERY_S = 60.0


class Quarantine:
    """Appends failed samples to a JSON-lines file, each once over all ranks and launches.

    A line is ``{"sample_id": 7, "name": "a/b.jpg", "path": "photos/a/b.jpg", "offset": null,
    "reason": "..."}``; in a tar ``path`` is the tar's and ``offset`` the first byte of the image.
    The list is a report: the order of draws does not depend on it, and a run continues if it cannot
    be written. The next line that fits then has ``lost_lines``, the number of missing lines.

    Args:
        index: the samples.
        path: the file, made with its folder at the first failure; ``None`` keeps no file.
    """

    def __init__(self, index: Index, path: str | os.PathLike[str] | None) -> None:
        self._index = index
        self._path = None if path is None else Path(path)
        self._names: set[str] = set()
        self._read = 0  # bytes of the file that are known
        self._lost = 0  # lines that could not be written
        self._warned_at = float("-inf")

    def add(self, sample_id: int, reason: str) -> bool:
        """Record one failure and warn about it; return whether the sample was new."""
        name = self._index.names[sample_id]
        if name in self._names:
            return False
        file, offset = self._index.where(sample_id)
        record = {"sample_id": sample_id, "name": name, "path": str(file), "offset": offset}
        is_new = True
        record |= {"reason": reason} | ({"lost_lines": self._lost} if self._lost else {})
        if self._path is not None:
            try:
                is_new = self._append(self._path, name, json.dumps(record))
                self._lost = 0 if is_new else self._lost
            except OSError as error:
                self._lost += 1
                self._warn(error)
        self._names.add(name)
        if is_new:
            logger.warning("sample %d (%s) is excluded from the loss: %s", sample_id, name, reason)
        return is_new

    def _warn(self, error: OSError) -> None:
        """Warn that lines are lost, at most every ``_WARN_EVERY_S``."""
        if time.monotonic() - self._warned_at >= _WARN_EVERY_S:
            self._warned_at = time.monotonic()
            text = "%s: cannot be written: %s; the next line that fits counts the lost lines"
            logger.warning(text, self._path, error.strerror)

    def _append(self, path: Path, name: str, line: str) -> bool:
        """Write a line in one call, unless another rank or launch has listed the sample."""
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            _lock(descriptor)
            end = os.lseek(descriptor, 0, os.SEEK_END)
            self._learn(os.pread(descriptor, max(end - self._read, 0), self._read))
            if name in self._names:
                return False
            append_whole(descriptor, f"{line}\n".encode("ascii"), ends_half_line=True)
        finally:
            os.close(descriptor)
        return True

    def _learn(self, data: bytes) -> None:
        """Read the names from complete lines that were added since the last call."""
        whole = data[: data.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.decode("ascii", "replace").splitlines():
            try:
                self._names.add(json.loads(line)["name"])
            except (ValueError, KeyError, TypeError, RecursionError):
                text = "%s: a line is not readable and is skipped: %r"
                logger.warning(text, self._path, line[:80])


def _lock(descriptor: int) -> None:
    """Keep other ranks out until the file is closed; a store without locks may repeat a line."""
    for _ in range(_LOCK_TRIES):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(_LOCK_PAUSE_S)
        except OSError:  # not every network store has locks
            return
