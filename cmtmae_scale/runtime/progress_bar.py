"""How far a long job is: lines at intervals, or one line that rewrites itself on a terminal."""

import logging
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self, TextIO

from dataloading.entries import PROGRESS_S

logger = logging.getLogger(__name__)

_REWRITE_S = 0.2


class Progress:
    """Counts images; call it with the number that is done.

    Args:
        what: the job, in a word.
        total: images in all.
        stream: where a terminal would be.
        clock: seconds.
    """

    def __init__(
        self,
        what: str,
        total: int,
        stream: TextIO = sys.stderr,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._what, self._total, self._stream, self._clock = what, total, stream, clock
        self._bar = stream.isatty()
        self._began = self._told = clock()

    def __call__(self, done: int) -> None:
        """Tell it if it is time to."""
        now = self._clock()
        if done < self._total and now - self._told < (_REWRITE_S if self._bar else PROGRESS_S):
            return
        self._told = now
        rate = done / max(now - self._began, 1e-9)
        text = (
            f"{self._what}: {done} of {self._total} images, {rate:.0f} images/s, "
            f"{duration((self._total - done) / max(rate, 1e-9))} left"
        )
        if self._bar:
            self._stream.write(f"\r{text}\x1b[K")
            self._stream.flush()
        else:
            logger.info("%s", text)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar:
            self._stream.write("\n")


def duration(seconds: float) -> str:
    """Write seconds as ``h:mm:ss``."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
