"""Run a decoder in a thread of its own, so that its Python code delays no kernel launch.

DALI's graph is fed and run from Python. On the caller's thread that would be host time of every
step; here a micro-batch is fed, decoded and handed over while the previous one is trained on.
"""

import queue
import threading
from typing import NamedTuple

import torch
from torch import Tensor

from dataloading.dali import DaliDecoder
from dataloading.plan import Plan
from dataloading.reading import Views, copy_stream


class _Ready(NamedTuple):
    """Views, and on a GPU the event after which they may be used."""

    views: Views
    event: torch.cuda.Event | None


class OwnThread:
    """Runs a decoder in a thread; views are returned in the order of the plans.

    Args:
        decoder: used by that thread alone, until it is closed with this object.
        device: where the views are.
    """

    def __init__(self, decoder: DaliDecoder, device: torch.device) -> None:
        self._decoder, self._device = decoder, device
        self.ahead = decoder.ahead + 1  # one batch is ready before it is requested
        self._stream = copy_stream(device)
        self._plans: queue.SimpleQueue[Plan | None] = queue.SimpleQueue()
        self._outcomes: queue.SimpleQueue[_Ready | Exception] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._last: tuple[Tensor, ...] = ()
        self._held: list[tuple[torch.cuda.Event, tuple[Tensor, ...]]] = []
        self._thread = threading.Thread(target=self._run, name="dali", daemon=True)
        self._thread.start()

    def submit(self, plan: Plan) -> None:
        self._plans.put(plan)

    def collect(self) -> Views:
        outcome = self._outcomes.get()
        if isinstance(outcome, Exception):
            raise outcome
        views, ready = outcome
        if ready is not None:
            current = torch.cuda.current_stream(self._device)
            self._hold_last(current)
            current.wait_event(ready)
            self._last = views.images
        return views

    def close(self) -> None:
        self._closing.set()
        self._plans.put(None)
        self._decoder.hurry()
        self._thread.join()
        self._decoder.close()
        self._last, self._held = (), []

    def _hold_last(self, current: torch.cuda.Stream) -> None:
        """Keep the previous batch until the work that was launched with it is done.

        Its memory belongs to DALI, which knows only the thread's stream and would reuse the memory.
        """
        used = torch.cuda.Event()
        used.record(current)
        self._held = [one for one in self._held if not one[0].query()]
        self._held.append((used, self._last))

    def _run(self) -> None:
        submitted = 0
        while (plan := self._plans.get()) is not None and not self._closing.is_set():
            try:
                self._decoder.submit(plan)
                submitted += 1
                if submitted > self._decoder.ahead:
                    self._outcomes.put(self._collect())
            except Exception as error:  # raised by collect
                self._outcomes.put(error)

    def _collect(self) -> _Ready:
        """Collect on this thread's stream.

        Raises:
            ReadError: as ``Decoder.collect``.
            RuntimeError: a fault of DALI or of the program.
        """
        if self._stream is None:
            return _Ready(self._decoder.collect(), None)
        with torch.cuda.stream(self._stream):
            views = self._decoder.collect()
            event = torch.cuda.Event()
            event.record(self._stream)
        return _Ready(views, event)
