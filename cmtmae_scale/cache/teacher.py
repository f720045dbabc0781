"""Teachers whose views are read from a cache: a complete cache, or the cache of a sidecar."""

import logging
import os
import time
from collections.abc import Callable

import torch
from torch import Tensor

from cmtmae_scale.cache.build import num_rows, row_shape
from cmtmae_scale.cache.codecs import (
    BOUNDS,
    Calibration,
    Encoded,
    decode,
    load_calibration,
    measure_agreement,
    round_view,
)
from cmtmae_scale.cache.fingerprint import Keyed, cache_fingerprint, check_fingerprint
from cmtmae_scale.cache.format import MANIFEST, Manifest, read_manifest, shard_path
from cmtmae_scale.cache.reader import (
    INCOMPLETE,
    STORE_FAILS,
    UNDECODED,
    CachedRows,
    CacheReader,
    blank_row,
)
from cmtmae_scale.config.schema import Config
from cmtmae_scale.config.teachers import cache_folder
from cmtmae_scale.errors import AGAIN, CacheError
from cmtmae_scale.teachers.base import Teacher, TeacherView
from cmtmae_scale.teachers.online import OnlineTeacher
from dataloading.errors import ReadError
from dataloading.index import Index
from dataloading.plan import Plan
from dataloading.reading import copy_beside, copy_stream
from dataloading.stream import Batch

logger = logging.getLogger(__name__)

POLL_S = 1.0
"""Seconds between two searches for a sidecar that has not begun."""


def open_cache(
    config: Config, skeleton: OnlineTeacher, index: Index, keyed: Keyed = "views"
) -> tuple[Manifest, Calibration | None]:
    """Read manifest and calibration of a cache, and check that a run may use it.

    Args:
        config: the run.
        skeleton: the run's teacher in its compute dtype; its weights are not used.
        index: the images.
        keyed: meaning of a row's number in the run.

    Raises:
        CacheError: an absent, damaged or unsafe cache, or a cache of another teacher, other views
            or other data; names the field, both values and the remedy.
    """
    folder = cache_folder(config)
    manifest = read_manifest(folder)
    wanted = cache_fingerprint(config, skeleton.fingerprint(), index, keyed)
    check_fingerprint(manifest, wanted, str(folder))
    expected = (num_rows(config, index, keyed), *row_shape(skeleton))
    for name, value in zip(("num_rows", "patches", "tokens", "width"), expected, strict=True):
        found = getattr(manifest, name)
        if found != value:
            raise CacheError(
                f"cache.dir={folder}: {name} is {found}, but this teacher, these views and images "
                f"make it {value}; build another cache, or set teacher.mode=online"
            )
    return manifest, load_calibration(folder, manifest.calibration_sha256, manifest.width)


class CachedTeacher:
    """Reads the views of crop plans that were submitted ahead from a cache.

    A row is a miss if it is missing or damaged, or if its image could not be decoded when it was
    built although the run decodes it. With ``cache.on_miss=online`` the online teacher forwards the
    whole micro-batch of a miss, and its view is rounded as the cache rounds, so that a run does not
    depend on which rows were there. Otherwise a miss is a failure.

    Args:
        config: the run.
        manifest: the cache's manifest.
        calibration: the cache's calibration.
        skeleton: the run's teacher; its weights are not used.
        online: runs on misses and in spot checks; ``None``: never.
        device: where views are needed.
        fail: called with the reason why the present step must not be applied; the rows that cannot
            be used are then blank.
        keyed: meaning of a row's number.
    """

    def __init__(
        self,
        config: Config,
        manifest: Manifest,
        calibration: Calibration | None,
        skeleton: OnlineTeacher,
        online: Teacher | None,
        device: torch.device,
        fail: Callable[[CacheError | ReadError], None],
        keyed: Keyed = "views",
    ) -> None:
        self.settings = config.cache
        self.folder = cache_folder(config)
        self.manifest = manifest
        self.calibration = None if calibration is None else calibration.to(device)
        self.width, self.has_cls = skeleton.width, skeleton.has_cls
        self.bounds = BOUNDS[skeleton.dtype]
        self.online = online
        self.device = device
        self.copies = copy_stream(device)
        self.fail = fail
        self.batches = self.checks = 0
        count = int(config.views.views_per_image or 1) if keyed == "views" else None
        self.reader = CacheReader(self.folder, manifest, count, pin=device.type == "cuda")

    @property
    def image_size(self) -> int | None:
        """Image size of the online teacher; ``None``: no image is needed."""
        return None if self.online is None else self.online.image_size

    def submit(self, plan: Plan) -> None:
        self.reader.submit(plan)

    def close(self) -> None:
        self.reader.close()

    def forward_batch(self, batch: Batch) -> TeacherView:
        """See ``TeacherSource.forward_batch``; synchronises with the host in spot checks only."""
        if batch.plan is None:
            return self.blank_view(len(batch.position))
        rows = self.reader.collect(batch.plan)
        self.batches += 1
        missed = [k for k, fault in enumerate(rows.faults) if fault and k not in batch.faulty]
        if missed and self.settings.on_miss == "online" and self.online is not None:
            view = self.online.forward_batch(batch)
            return round_view(view, self.manifest.codec, self.calibration)
        if missed:
            self.fail(self.miss_error(rows, missed[0]))
        view = self.decode_rows(rows.fields)
        # Evenly spread, and in the same micro-batches on all ranks, so that their waits coincide.
        due = self.checks < self.batches * self.settings.spot_check
        if due and not missed and self.online is not None:
            self.checks += 1
            self.check_rows(self.online.forward_batch(batch), view, rows, batch.faulty)
        return view

    def decode_rows(self, fields: dict[str, Tensor]) -> TeacherView:
        """Copy stored tensors to the device while it computes, and decode them there."""
        names = [name for name in ("attention", "features", "scales") if name in fields]
        copies = copy_beside([fields[name] for name in names], self.device, self.copies)
        moved = dict(zip(names, copies, strict=True))
        attention, features = moved.get("attention"), moved.get("features")
        if features is not None:
            features = decode(Encoded(features, moved.get("scales")), self.calibration)
        return TeacherView(None if attention is None else attention.float(), features, True)

    def blank_view(self, count: int) -> TeacherView:
        """Return the view of a batch whose data could not be read."""
        fields = self.manifest.empty_rows(count)
        for place in range(count):
            blank_row(fields, place)
        return self.decode_rows(fields)

    def miss_error(self, rows: CachedRows, place: int) -> CacheError | ReadError:
        """Return the error that stops a run that has no online teacher."""
        row, fault = rows.numbers[place], str(rows.faults[place])
        sample, view = divmod(row, self.reader.count or 1)
        text = (
            f"cache.dir={self.folder}: row {row} (image {sample}, view {view}) of shard "
            f"{self.reader.shard_of(row)}: {fault}; "
        )
        if fault.startswith(STORE_FAILS):
            return ReadError(f"{text}see that the storage works and {AGAIN}")
        remedy = "repair the cache with cmtmae precompute --repair"
        if fault == INCOMPLETE:
            remedy = "complete the cache with cmtmae precompute"
        elif fault == UNDECODED:
            path = shard_path(self.folder, self.manifest, self.reader.shard_of(row))
            remedy = f"delete {path} and complete the cache with cmtmae precompute"
        return CacheError(f"{text}{remedy}, or set cache.on_miss=online")

    def check_rows(
        self, online: TeacherView, stored: TeacherView, rows: CachedRows, faulty: tuple[int, ...]
    ) -> None:
        """Log the agreement in a spot check, and fail if rounding does not explain a difference."""
        places = [k for k, fault in enumerate(rows.faults) if not fault and k not in faulty]
        if not places:
            return
        found = measure_agreement(online, stored, places, self.calibration)
        logger.info("cache: spot check of %d rows: %s", len(places), found)
        if not found.within(self.bounds):
            self.fail(
                CacheError(
                    f"cache.dir={self.folder}: spot check of row {rows.numbers[places[0]]} and "
                    f"{len(places) - 1} more: the online teacher differs: {found}; expected a "
                    f"cosine of at least {self.bounds.cosine} and a distance of at most "
                    f"{self.bounds.distance}; build the cache again, or set teacher.mode=online"
                )
            )


class SidecarTeacher:
    """Reads views by position from a sidecar's cache, and runs the teacher where rows are missing.

    The sidecar may start, end and start again during the run.

    Args:
        config: the run.
        skeleton: the run's teacher; its weights are not used.
        online: runs where a row is missing.
        index: the images.
        device: where views are needed.
        fail: called with the reason why the present step must not be applied.

    Raises:
        CacheError: if the folder holds the cache of another run.
    """

    def __init__(
        self,
        config: Config,
        skeleton: OnlineTeacher,
        online: Teacher,
        index: Index,
        device: torch.device,
        fail: Callable[[CacheError | ReadError], None],
    ) -> None:
        self.config = config
        self.skeleton = skeleton
        self.online = online
        self.index = index
        self.device = device
        self.fail = fail
        self.folder = cache_folder(config)
        self.width, self.has_cls = skeleton.width, skeleton.has_cls
        self.cached: CachedTeacher | None = None
        self.next_search = time.monotonic() + POLL_S
        if (self.folder / MANIFEST).exists():
            self.cached = self.open_cached()

    @property
    def image_size(self) -> int | None:
        return self.online.image_size

    def open_cached(self) -> CachedTeacher:
        """Open the cache of the sidecar.

        Raises:
            CacheError: if it belongs to another run.
        """
        config, skeleton, keyed = self.config, self.skeleton, "positions"
        manifest, calibration = open_cache(config, skeleton, self.index, keyed)
        logger.info(
            "teacher: sidecar cache in %s, %d rows per shard", self.folder, manifest.rows_per_shard
        )
        online, device, fail = self.online, self.device, self.fail
        return CachedTeacher(config, manifest, calibration, skeleton, online, device, fail, keyed)

    def search_cache(self) -> None:
        """Open the cache if a sidecar has begun it; the cache of another run is ignored."""
        if time.monotonic() < self.next_search:
            return
        self.next_search = time.monotonic() + POLL_S
        if not os.path.exists(self.folder / MANIFEST):  # False also if the store fails
            return
        try:
            self.cached = self.open_cached()
        except CacheError as error:
            logger.warning("%s; the teacher stays online until the next launch", error)
            self.next_search = float("inf")

    def submit(self, plan: Plan) -> None:
        """Start to read the rows of a plan, if there is a cache."""
        if self.cached is None:
            self.search_cache()
        if self.cached is not None:
            self.cached.submit(plan)

    def forward_batch(self, batch: Batch) -> TeacherView:
        cached, plan = self.cached, batch.plan
        if cached is not None and (plan is None or cached.reader.is_submitted(plan)):
            return cached.forward_batch(batch)
        codec = self.config.cache.codec if cached is None else cached.manifest.codec
        calibration = None if cached is None else cached.calibration
        return round_view(self.online.forward_batch(batch), codec, calibration)

    def close(self) -> None:
        if self.cached is not None:
            self.cached.close()
