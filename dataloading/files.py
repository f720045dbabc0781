"""Open and read files without hanging, and write files that a crash never leaves half written."""

import errno
import os
import shutil
import stat
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol


def open_regular(path: str | os.PathLike[str]) -> int:
    """Open a regular file for reading; links are followed.

    Returns:
        A descriptor, which the caller closes.

    Raises:
        OSError: if it cannot be opened, or is a folder, a pipe or a device.
    """
    # Without O_NONBLOCK, opening a pipe waits for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    raise OSError(errno.EINVAL, "Not a regular file", os.fspath(path))


class Readable(Protocol):
    """A file that is not on a file system."""

    def read(self, size: int, offset: int) -> bytes: ...


def read_at(file: int | Readable, size: int, offset: int) -> bytes:
    """Read as ``os.pread``, from a descriptor or from a file that is not on a file system.

    Raises:
        OSError: if it cannot be read.
    """
    return os.pread(file, size, offset) if isinstance(file, int) else file.read(size, offset)


def read_range(descriptor: int, offset: int, size: int) -> bytes:
    """Read ``size`` bytes from ``offset`` on; fewer only where the file ends.

    Raises:
        OSError: if it cannot be read.
    """
    data = os.pread(descriptor, size, offset)
    while len(data) < size:  # the system reads at most 2 GiB at once
        more = os.pread(descriptor, size - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data


def sync(path: Path) -> None:
    """Force a file or folder to storage."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append_line(path: Path, line: str) -> None:
    """Append a line whole or not at all; a half line at the end of the file is ended first.

    Raises:
        OSError: if the line cannot be written.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o666)
    try:
        append_whole(descriptor, f"{line}\n".encode(), ends_half_line=True)
    finally:
        os.close(descriptor)


def append_whole(descriptor: int, data: bytes, ends_half_line: bool = False) -> None:
    """Append bytes whole or not at all; with ``ends_half_line`` begin a new line if necessary.

    Args:
        descriptor: opened for reading and appending.
        data: the bytes.
        ends_half_line: write a newline first where the file does not end with one.

    Raises:
        OSError: if not all bytes can be written; the bytes that were written are removed again.
    """
    end = os.lseek(descriptor, 0, os.SEEK_END)
    if ends_half_line and end and os.pread(descriptor, 1, end - 1) != b"\n":
        data = b"\n" + data
    try:
        while data:  # a nearly full store writes only a part
            data = data[os.write(descriptor, data) :]
    except OSError:
        with suppress(OSError):
            os.ftruncate(descriptor, end)
        raise


@contextmanager
def atomic_path(path: Path, durable: bool = True) -> Generator[Path, None, None]:
    """Yield a draft path, and rename the draft to ``path`` when the block succeeds.

    The draft is beside ``path`` as ``.NAME.<random>.tmp``, so concurrent writers of one file do
    not share a draft. If the block fails, the draft is deleted. A killed process leaves the old
    file and perhaps its draft, which no reader opens.

    Args:
        path: a file that may exist, or a folder that does not.
        durable: force the draft to storage before the rename.
    """
    draft = path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")
    try:
        yield draft
        if durable:
            sync(draft)
        draft.replace(path)
    except BaseException:
        if draft.is_dir():
            shutil.rmtree(draft, ignore_errors=True)
        else:
            with suppress(OSError):
                draft.unlink(missing_ok=True)
        raise
