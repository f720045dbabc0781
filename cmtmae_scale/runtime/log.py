"""Logging: rank 0 from INFO on, other ranks from WARNING on with their rank."""

import logging
import sys
import traceback
import unicodedata
from pathlib import Path
from types import TracebackType
from typing import Self

from cmtmae_scale.errors import CmtMaeError
from cmtmae_scale.runtime.storage import append_line, warn_unwritten
from dataloading.errors import DataError
from dataloading.progress import progress_bar

__all__ = ["RunLog", "escape_controls", "progress_bar", "set_up_logging"]

PACKAGES = ("cmtmae_scale", "dataloading")
TRAIN_LOG = "train.log"


class EscapingFormatter(logging.Formatter):
    """Escapes control characters in messages, which names of files and keys may contain."""

    def format(self, record: logging.LogRecord) -> str:
        return escape_controls(super().format(record))

    def formatMessage(self, record: logging.LogRecord) -> str:
        # Further lines are indented, so that no name can imitate a line of the log.
        return super().formatMessage(record).replace("\n", "\n    ")


def escape_controls(text: str) -> str:
    """Return a text with control characters as escapes, except for line feed and tab."""
    return "".join(
        char
        if char.isprintable() or char in "\n\t" or unicodedata.category(char) == "Zs"
        else char.encode("unicode_escape").decode()
        for char in text
    )


class TerminalHandler(logging.StreamHandler):
    """Writes lines above the progress bars of this process."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        with tqdm.external_write_mode(self.stream):
            super().emit(record)


class RunLog(logging.Handler):
    """Appends the log of a launch to ``RUN_DIR/train.log``, with dates.

    Lines are kept until ``open``, so that a launch that is refused a folder writes nothing there.
    Lines that cannot be written are lost with a warning, and counted before the next line that can
    be written. A resume removes nothing: the file has the lines of all launches.
    """

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(EscapingFormatter("%(asctime)s %(levelname)s %(message)s"))
        self.file: Path | None = None
        self.waiting: list[str] = []
        self.lost_lines = 0

    def __enter__(self) -> Self:
        for name in PACKAGES:
            logging.getLogger(name).addHandler(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for name in PACKAGES:
            logging.getLogger(name).removeHandler(self)
        if isinstance(error, Exception):  # the command prints it after this
            is_expected = isinstance(error, CmtMaeError | DataError)
            text = str(error) if is_expected else "".join(traceback.format_exception(error))
            self.handle(logging.LogRecord(__name__, logging.ERROR, "", 0, text, None, None))

    def open(self, run_dir: Path) -> None:
        """Write the lines so far; later lines are written at once."""
        self.file = run_dir / TRAIN_LOG
        self.write()

    def emit(self, record: logging.LogRecord) -> None:
        self.waiting.append(self.format(record))
        self.write()

    def write(self) -> None:
        """Append the waiting lines."""
        if self.file is None or not self.waiting:
            return
        lines, self.waiting = self.waiting, []
        counted = [f"{self.lost_lines} lines could not be written"] if self.lost_lines else []
        try:
            append_line(self.file, "\n".join(counted + lines))
        except OSError as error:
            self.lost_lines += len(lines)
            warn_unwritten(self.file, error)
        else:
            self.lost_lines = 0


def set_up_logging(rank: int, world_size: int) -> None:
    """Send the packages' log records to standard error in one format."""
    mark = f"[rank {rank}] " if world_size > 1 and rank else ""
    handler = TerminalHandler(sys.stderr)
    handler.setFormatter(
        EscapingFormatter(f"%(asctime)s %(levelname)s {mark}%(message)s", "%H:%M:%S")
    )
    for name in PACKAGES:
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.propagate = False
        logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
