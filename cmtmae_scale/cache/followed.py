"""A teacher that a sidecar computes ahead of the run, and that runs itself where it did not."""

import logging
import time
from collections.abc import Callable

import torch

from cmtmae_scale.cache.format import MANIFEST
from cmtmae_scale.cache.teacher import CachedTeacher, open_cache, rounded
from cmtmae_scale.config.derive import cache_folder
from cmtmae_scale.config.schema import Config
from cmtmae_scale.errors import CacheError
from cmtmae_scale.teachers.base import Teacher, TeacherView
from cmtmae_scale.teachers.online import OnlineTeacher
from dataloading.index import Index
from dataloading.plan import Plan
from dataloading.stream import Batch

logger = logging.getLogger(__name__)

PAUSE_S = 1.0
"""Between looks for a sidecar that has not begun."""


class SidecarTeacher:
    """Views by position, from a cache that may begin, end and begin again beside the run.

    Args:
        config: the run.
        described: the run's teacher; its weights are not used.
        live: runs where no row is there.
        index: the images.
        device: where views are wanted.
        fail: told why the present step must not be taken.

    Raises:
        CacheError: if the folder holds the cache of another run.
    """

    def __init__(
        self,
        config: Config,
        described: OnlineTeacher,
        live: Teacher,
        index: Index,
        device: torch.device,
        fail: Callable[[CacheError], None],
    ) -> None:
        self.config = config
        self.described = described
        self.live = live
        self.index = index
        self.device = device
        self.fail = fail
        self.folder = cache_folder(config)
        self.width, self.has_cls = described.width, described.has_cls
        self.cached: CachedTeacher | None = None
        self.next_look = time.monotonic() + PAUSE_S
        if (self.folder / MANIFEST).exists():
            self.open()

    @property
    def image_size(self) -> int | None:
        """The live teacher's."""
        return self.live.image_size

    def open(self) -> None:
        """Open the cache that has been begun.

        Raises:
            CacheError: if it is not this run's.
        """
        manifest, calibration = open_cache(self.config, self.described, self.index, "positions")
        self.cached = CachedTeacher(
            self.config,
            manifest,
            calibration,
            self.described,
            self.live,
            self.device,
            self.fail,
            "positions",
        )
        logger.info("teacher: followed in %s, %d rows a part", self.folder, manifest.rows_a_part)

    def find(self) -> None:
        """Look, now and then, whether a sidecar has begun; another run's cache is left alone."""
        if time.monotonic() < self.next_look:
            return
        self.next_look = time.monotonic() + PAUSE_S
        if not (self.folder / MANIFEST).exists():
            return
        try:
            self.open()
        except CacheError as error:
            logger.warning("%s; the teacher stays live until the next start", error)
            self.next_look = float("inf")

    def submit(self, plan: Plan) -> None:
        """Begin to read the rows of a plan, where there are any."""
        if self.cached is None:
            self.find()
        if self.cached is not None:
            self.cached.submit(plan)

    def forward_batch(self, batch: Batch) -> TeacherView:
        """See ``TeacherSource.look``."""
        cached, plan = self.cached, batch.plan
        if cached is not None and (plan is None or cached.reader.asked(plan)):
            return cached.forward_batch(batch)
        codec = self.config.cache.codec if cached is None else cached.manifest.codec
        calibration = None if cached is None else cached.calibration
        return rounded(self.live.forward_batch(batch), codec, calibration)

    def close(self) -> None:
        """Stop reading."""
        if self.cached is not None:
            self.cached.close()
