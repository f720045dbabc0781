"""TensorBoard event files, written without a thread.

``SummaryWriter`` writes from a thread that ends at the first error of the store, after which every
call raises that error. Here each call appends all of its events or none, and a later call is not
affected by an earlier error.
"""

import io
import itertools
import os
import socket
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tensorboard.compat.proto.event_pb2 import (
    Event,  # pyright: ignore[reportAttributeAccessIssue]  # generated at import
    SessionLog,  # pyright: ignore[reportAttributeAccessIssue]
)
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import image, scalar, text

from cmtmae_scale.runtime.storage import append_whole

VERSION = "brain.Event:2"
_numbers = itertools.count()


class EventFile:
    """One event file; created by the first call that the store accepts.

    Args:
        folder: TensorBoard's folder of the run; created if it is absent.
        purge_step: TensorBoard drops points of earlier files from this step on.
    """

    def __init__(self, folder: Path, purge_step: int) -> None:
        parts = (f"{time.time():010.0f}", socket.gethostname(), os.getpid(), next(_numbers))
        self.path = folder / f"events.out.tfevents.{'.'.join(map(str, parts))}"
        start = SessionLog(status=SessionLog.START)
        self.header = encode_events(
            [
                Event(wall_time=time.time(), file_version=VERSION),
                Event(step=purge_step, file_version=VERSION),
                Event(step=purge_step, session_log=start),
            ]
        )

    def add_scalars(self, step: int, values: dict[str, float]) -> None:
        """Add one point to each curve.

        Raises:
            OSError: if they cannot be written; the file is unchanged.
        """
        now = time.time()
        self.append(
            [
                Event(wall_time=now, step=step, summary=scalar(name, value))
                for name, value in values.items()
            ]
        )

    def add_image(self, step: int, name: str, pixels: NDArray[np.uint8]) -> None:
        """Add an image ``[height, width, 3]``.

        Raises:
            OSError: if it cannot be written; the file is unchanged.
        """
        summary = image(name, pixels, dataformats="HWC")
        self.append([Event(wall_time=time.time(), step=step, summary=summary)])

    def add_text(self, step: int, name: str, content: str) -> None:
        """Add a text.

        Raises:
            OSError: if it cannot be written; the file is unchanged.
        """
        summary = text(name, content.encode(errors="replace").decode())
        self.append([Event(wall_time=time.time(), step=step, summary=summary)])

    def append(self, events: list[Event]) -> None:
        """Append events; the first call writes the header before them."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        descriptor = os.open(self.path, flags, 0o666)
        try:
            append_whole(descriptor, self.header + encode_events(events))
        finally:
            os.close(descriptor)
        self.header = b""


def encode_events(events: list[Event]) -> bytes:
    """Return events as TensorFlow records."""
    buffer = io.BytesIO()
    writer = RecordWriter(buffer)
    for event in events:
        writer.write(event.SerializeToString())
    return buffer.getvalue()
