"""Progress of long work: a bar on a terminal, else a log line at intervals."""

import logging
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

logger = logging.getLogger(__name__)

PROGRESS_S = 10.0
"""Seconds between progress lines where there is no terminal; shorter work logs none."""


@contextmanager
def progress_bar(title: str, total: int, unit: str) -> Generator[Callable[[int], None], None, None]:
    """Yield a callback for the number done; rate and remaining time are shown.

    Only a process that logs at INFO shows progress: rank 0 of a launch.
    """
    from tqdm import tqdm  # not at import: a command's --help needs none

    shows = logger.isEnabledFor(logging.INFO)
    has_bar = shows and sys.stderr.isatty()
    began = logged_at = time.monotonic()
    with tqdm(
        total=total, desc=title, unit=unit, leave=False, dynamic_ncols=True, disable=not has_bar
    ) as bar:

        def report(done: int) -> None:
            nonlocal logged_at
            bar.update(done - bar.n)
            now = time.monotonic()
            is_due = now - logged_at >= PROGRESS_S or (done == total and logged_at > began)
            if shows and not has_bar and is_due:
                logged_at = now
                logger.info("%s", tqdm.format_meter(done, total, now - began, 0, title, unit=unit))

        yield report
