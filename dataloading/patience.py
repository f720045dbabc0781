"""Retry failed reads for a limited time: network storage fails temporarily."""

import errno
import glob
import logging
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from dataloading.errors import DataError, ReadError

logger = logging.getLogger(__name__)

PATIENCE_S = 60.0
"""Seconds for which a read is retried."""
LASTING = frozenset(
    {errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.EISDIR}
    | {errno.ENAMETOOLONG}
)
"""Errors that are a property of the data set, not a temporary failure of storage."""

_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 5.0

Result = TypeVar("Result")


class Patience:
    """Retries the reads of one data set; safe in threads.

    The first read that is given up ends the retries of all reads, so that lost storage is waited
    for once, not once per file.

    Args:
        limit_s: seconds for which one read is retried.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._over = threading.Event()

    def end(self) -> None:
        self._over.set()

    def retry(self, read: Callable[[], Result], what: str | Callable[[], str]) -> Result:
        """Call ``read`` until it raises no ``OSError``, with pauses; messages name ``what``.

        ``what`` may be a function, which is called only if a read fails.

        Raises:
            ReadError: if the read still fails when the time is over.
        """
        began, pause_s = time.monotonic(), _FIRST_PAUSE_S
        while True:
            try:
                return read()
            except OSError as error:
                reason = error.strerror or str(error)
                name = what if isinstance(what, str) else what()
                left_s = began + self._limit_s - time.monotonic()
                if left_s <= 0 or self._over.is_set():
                    self._over.set()
                    raise ReadError(
                        f"{name}: {reason}, tried for {time.monotonic() - began:.1f} s; make it "
                        "readable as it was when it was indexed, then launch again"
                    ) from error
                if pause_s == _FIRST_PAUSE_S:
                    logger.warning("%s: %s; tried again for %.1f s", name, reason, left_s)
                self._over.wait(min(pause_s, left_s))
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def retry_listing(list_files: Callable[[], Result], root: str) -> Result:
    """Call a function that lists or looks up the files of a data set until storage responds.

    Raises:
        DataError: names what cannot be listed.
        ReadError: if storage fails for longer than reads are retried.
    """
    others = ", or name the others in braces, {a,b}" if glob.has_magic(root) else ""

    def listed() -> Result:
        try:
            return list_files()
        except OSError as error:
            if error.errno not in LASTING:
                raise
            raise DataError(
                f"{error.filename or root}: cannot be listed ({error.strerror}); "
                f"make the whole of data.path readable{others}"
            ) from error

    return Patience(PATIENCE_S).retry(listed, root)
