import gc
import logging
import os
import signal
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")  # on a machine with a GPU too
# Before the first product on a GPU, whichever test makes it; see runtime/determinism.py.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch


def pytest_collection_finish() -> None:
    """Exclude objects that live until the end from garbage collection."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


LOGGERS = [logging.getLogger(name) for name in ("cmtmae_scale", "dataloading")]
UNTOUCHED = [(one.propagate, one.level, list(one.handlers)) for one in LOGGERS]


def reset_loggers() -> None:
    for one, (propagate, level, handlers) in zip(LOGGERS, UNTOUCHED, strict=True):
        one.propagate, one.handlers[:] = propagate, handlers
        one.setLevel(level)


@pytest.fixture(autouse=True)
def quiet_again() -> Iterator[None]:
    """Reset the packages' loggers, which commands configure, in module fixtures too."""
    reset_loggers()
    yield
    reset_loggers()


@pytest.fixture(autouse=True)
def own_signals() -> Iterator[None]:
    """Restore the signal handlers, which commands replace until their process ends."""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)
