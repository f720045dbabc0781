"""Opening and reading files in a way that cannot hang and is bounded by what is asked for."""

import errno
import os
import stat


def open_regular(path: str | os.PathLike[str]) -> int:
    """Open a regular file for reading; links are followed.

    Returns:
        A descriptor; whoever asked for it closes it.

    Raises:
        OSError: if it cannot be opened, or is a folder, a pipe or a device.
    """
    # Without O_NONBLOCK the opening of a pipe waits for somebody who writes to it.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    raise OSError(errno.EINVAL, "Not a regular file", os.fspath(path))


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
