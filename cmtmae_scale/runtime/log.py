"""Logging: rank 0 from INFO on, other ranks from WARNING on with their rank."""

import logging
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PROGRESS_S = 10.0
"""Seconds between progress lines where there is no terminal."""

logger = logging.getLogger(__name__)


class EscapingFormatter(logging.Formatter):
    """Escapes control characters of messages, which names of files and keys may hold."""

    def format(self, record: logging.LogRecord) -> str:
        return escape_controls(super().format(record))

    def formatMessage(self, record: logging.LogRecord) -> str:
        # Further lines are indented, so that no name can imitate a line of the log.
        return super().formatMessage(record).replace("\n", "\n    ")


def escape_controls(text: str) -> str:
    """Return a text in which control characters but line feed and tab are written as escapes."""
    return "".join(
        char
        if char.isprintable() or char in "\n\t" or unicodedata.category(char) == "Zs"
        else char.encode("unicode_escape").decode()
        for char in text
    )


def set_up_logging(rank: int, world_size: int) -> None:
    """Send the packages' log records to standard error in one format."""
    mark = f"[rank {rank}] " if world_size > 1 and rank else ""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        EscapingFormatter(f"%(asctime)s %(levelname)s {mark}%(message)s", "%H:%M:%S")
    )
    for name in ("cmtmae_scale", "dataloading"):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.propagate = False
        logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)


@contextmanager
def progress_bar(title: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """Yield a callback for the number done: a bar on a terminal, else a log line per interval."""
    from tqdm import tqdm

    began = logged_at = time.monotonic()
    with tqdm(total=total, desc=title, unit=unit, disable=not sys.stderr.isatty()) as bar:

        def report(done: int) -> None:
            nonlocal logged_at
            bar.update(done - bar.n)
            now = time.monotonic()
            if bar.disable and (done == total or now - logged_at >= PROGRESS_S):
                logged_at = now
                logger.info("%s", tqdm.format_meter(done, total, now - began, 0, title, unit=unit))

        yield report
