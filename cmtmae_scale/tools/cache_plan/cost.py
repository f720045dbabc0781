"""What a cache costs and what it saves, from rates: arithmetic alone.

The model. Live, a GPU trains and looks in turn, so that seconds a view add up. A cache is built by
all GPUs, each at the slower of its teacher and its decoding, together no faster than the store
writes; a GPU that reads it trains at the slower of its own rate and the store's.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from cmtmae_scale.cache.codecs import Codec

HOUR_S = 3600.0
MONTH_H = 730.0
MANY = 1000
"""Runs that nobody does on the same views."""


@dataclass(frozen=True)
class Job:
    """A run that may read a cache."""

    images: int
    """Of the data set."""
    draws: int
    """Views of the whole run."""
    gpus: int
    """GPUs that build, and that train."""
    spot_check: float = 0.0
    """Share of views at which the teacher looks although a cache is read."""

    @property
    def epochs(self) -> float:
        """Passes over the images."""
        return self.draws / self.images


@dataclass(frozen=True)
class Rates:
    """All above 0."""

    teacher: float
    """Images a second that the teacher of one GPU looks at."""
    train: float
    """Images a second that one GPU trains on without a teacher."""
    decode: float
    """Views a second that one process decodes; infinite where it is not known."""
    write: float
    """Bytes a second that the store takes, from all."""
    read: float
    """Bytes a second that the store gives one process."""


@dataclass(frozen=True)
class Prices:
    """In any one currency."""

    gpu_hour: float
    tb_month: float
    """Of 10^12 bytes for a month of 730 hours."""


class Outlook(NamedTuple):
    """One codec and one number of views an image."""

    codec: Codec
    views: int
    disk_bytes: int
    read_gpu: float
    """Bytes a second that a GPU needs to train at its own rate."""
    build_h: float
    run_h: float
    """Hours of a run that reads the cache."""
    live_h: float
    """Hours of a run with the live teacher."""
    starved: bool
    """Whether the store is slower than the GPU."""
    repeats: bool
    """Whether a run sees any view twice; if not, building looks at no fewer views than it does."""
    from_run: int | None
    """Number of like runs from which building and reading take less time than live teachers."""
    saved: float | None
    """Money that one run saves, storage from the start of building to its end paid."""

    @property
    def verdict(self) -> str:
        """Whether it pays in time, in a few words."""
        if self.from_run is None:
            return "never (reading)"
        if self.from_run == 1:
            return f"yes, {1 - (self.build_h + self.run_h) / self.live_h:.0%} less"
        if self.from_run > MANY:
            return f"not in {MANY:,} runs"
        return f"{'no' if self.repeats else 'no#'}; from run {self.from_run}"


def outlook(
    job: Job, rates: Rates, codec: Codec, count: int, row_bytes: int, prices: Prices | None
) -> Outlook:
    """Weigh a cache against the live teacher.

    Args:
        job: the run.
        rates: of GPU and store.
        codec: how features are stored.
        count: views an image.
        row_bytes: bytes of a view.
        prices: what GPUs and storage cost, if that is known.
    """
    rows = job.images * count
    live_h = job.draws * (1 / rates.train + 1 / rates.teacher) / job.gpus / HOUR_S
    computed = 1 / rates.train + job.spot_check / rates.teacher
    run_h = job.draws * max(computed, row_bytes / rates.read) / job.gpus / HOUR_S
    each = min(rates.teacher, rates.decode)
    build_h = rows / min(job.gpus * each, rates.write / row_bytes) / HOUR_S
    repeats = rows < job.draws
    from_run = None
    if run_h < live_h:
        # Without repetition no rounding of these floats may make one run pay.
        from_run = max(math.floor(build_h / (live_h - run_h)) + 1, 1 if repeats else 2)
    saved = None
    if prices is not None:
        hours = build_h + run_h
        storage = rows * row_bytes / 1e12 * prices.tb_month * hours / MONTH_H
        saved = (live_h - hours) * job.gpus * prices.gpu_hour - storage
    return Outlook(
        codec,
        count,
        rows * row_bytes,
        row_bytes * rates.train,
        build_h,
        run_h,
        live_h,
        row_bytes / rates.read > computed,
        repeats,
        from_run,
        saved,
    )
