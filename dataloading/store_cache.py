"""Keep pieces of remote tars in a folder of this node, which its processes share.

Samples that are neighbours in a tar are drawn far apart in time: a window of
``data.shuffle=window`` has 65,536 draws, which all ranks share. A piece is therefore kept from the
first read of it on, by whichever process.
"""

import errno
import hashlib
import logging
import os
import re
import threading
from contextlib import suppress
from pathlib import Path

from dataloading.errors import DataError
from dataloading.files import atomic_path
from dataloading.stores import RemoteTar, read_range

logger = logging.getLogger(__name__)

PIECE = 4 << 20
"""Bytes that a ``StoreCache`` keeps as a whole: some 36 images of ImageNet, and one request."""

_LEAST_FREE = 0.1  # of the file system, below which the oldest pieces are removed
_REMOVED = 0.05  # of the pieces, at a time
_LOCKS = 64
_PIECE_NAME = re.compile(r"[0-9a-f]{24}/(\d{8,}|\.\d{8,}\.[0-9a-f]{8}\.tmp)")


class StoreCache:
    """Reads ranges of tars by whole pieces, and keeps these; safe in threads and processes.

    Two processes that want the same piece at the same time may both request it.

    Args:
        folder: on a disk of the node; it is made. A piece appears in it whole or not at all.

    Raises:
        DataError: if the folder cannot be made or written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._locks = [threading.Lock() for _ in range(_LOCKS)]
        self._is_reported = False
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except OSError as error:
            raise DataError(
                f"data.store_cache={folder}: cannot be written ({error.strerror}); name a folder "
                "on a disk of the node, or null"
            ) from error

    def require_room(self, needed: float, why: str) -> None:
        """Refuse a file system without room for ``needed`` bytes of pieces, kept pieces included.

        Raises:
            DataError: names ``why`` the bytes are needed.
        """
        space = os.statvfs(self.folder)
        room = max(space.f_bavail - _LEAST_FREE * space.f_blocks, 0) * space.f_frsize
        if needed > room:
            room += sum(size for _, size, _ in list_pieces(self.folder))
        if needed > room:
            raise DataError(
                f"data.store_cache={self.folder}: its file system has room for {room / 1e9:.1f} "
                f"GB, and {why} needs {needed / 1e9:.1f} GB; free space, name a larger disk, or "
                "set null"
            )

    def read(self, tar: RemoteTar, offset: int, size: int) -> bytes:
        """Read ``size`` bytes of a tar from ``offset`` on; errors are those of ``read_range``."""
        end = min(offset + size, tar.size)
        parts: list[bytes] = []
        for start in range(offset - offset % PIECE, end, PIECE):
            first, last = max(offset - start, 0), min(end - start, PIECE)
            parts.append(self._read_piece(tar, start, first, last))
        return b"".join(parts)

    def _read_piece(self, tar: RemoteTar, start: int, first: int, last: int) -> bytes:
        """Return bytes ``first`` to ``last`` of the piece that begins at ``start``."""
        file = self.folder / _folder_of(tar) / f"{start // PIECE:08d}"
        whole = min(PIECE, tar.size - start)
        with self._locks[hash(file) % _LOCKS]:
            kept = _read_kept(file, whole, first, last)
            if kept is not None:
                return kept
            data = bytes(read_range(tar, start, whole))
            if len(data) == whole:
                self._keep(file, data)
        return data[first:last]

    def _keep(self, file: Path, data: bytes) -> None:
        """Write a piece, after removing older pieces if necessary; without room it is not kept."""
        try:
            space = os.statvfs(self.folder)
            if space.f_bavail < _LEAST_FREE * space.f_blocks:
                self._report("is nearly full; the oldest pieces are removed")
                remove_oldest(self.folder)
            file.parent.mkdir(exist_ok=True)
            with atomic_path(file) as draft:
                draft.write_bytes(data)
        except OSError as error:
            self._report(f"cannot be written ({error.strerror}); pieces are not kept")

    def _report(self, what: str) -> None:
        if not self._is_reported:
            self._is_reported = True
            logger.warning("data.store_cache=%s: %s", self.folder, what)


def remove_oldest(folder: Path) -> None:
    """Remove the pieces that were written first, also while other processes do."""
    pieces = sorted(list_pieces(folder))
    for _, _, file in pieces[: 1 + int(_REMOVED * len(pieces))]:
        file.unlink(missing_ok=True)


def list_pieces(folder: Path) -> list[tuple[float, int, Path]]:
    """Return time of writing, bytes and path of each piece, and of drafts of killed processes.

    Other files of the folder are neither counted nor removed.
    """
    found: list[tuple[float, int, Path]] = []
    for file in folder.glob("*/*"):
        if not _PIECE_NAME.fullmatch(f"{file.parent.name}/{file.name}"):
            continue
        with suppress(FileNotFoundError):
            facts = file.stat()
            found.append((facts.st_mtime, facts.st_size, file))
    return found


def _folder_of(tar: RemoteTar) -> str:
    """Return the name of a tar's folder, which depends on size and version."""
    return hashlib.sha256("\t".join(map(str, tar)).encode()).hexdigest()[:24]


def _read_kept(file: Path, whole: int, first: int, last: int) -> bytes | None:
    """Return a part of a kept piece; ``None`` where there is none of this size."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        if os.fstat(descriptor).st_size != whole:
            return None
        data = os.pread(descriptor, last - first, first)
        return data if len(data) == last - first else None
    except OSError:
        return None
    finally:
        os.close(descriptor)
