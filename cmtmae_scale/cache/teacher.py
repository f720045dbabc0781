"""A teacher that is read from a cache."""

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from cmtmae_scale.cache.build import num_rows
from cmtmae_scale.cache.calibration import load_calibration
from cmtmae_scale.cache.codecs import Calibration, Codec, Encoded, as_stored, decode
from cmtmae_scale.cache.drift import BOUNDS, agreement
from cmtmae_scale.cache.format import PARTS, Manifest, read_manifest, refuse_open_folder
from cmtmae_scale.cache.identity import Keyed, check_identity, fingerprint
from cmtmae_scale.cache.reader import CacheReader, Rows, blank
from cmtmae_scale.config.derive import cache_folder
from cmtmae_scale.config.schema import Config
from cmtmae_scale.errors import CacheError
from cmtmae_scale.teachers.base import Teacher, TeacherView
from cmtmae_scale.teachers.online import OnlineTeacher
from dataloading.index import Index
from dataloading.plan import Plan
from dataloading.stream import Batch

logger = logging.getLogger(__name__)


def open_cache(
    config: Config, described: OnlineTeacher, index: Index, keyed: Keyed = "views"
) -> tuple[Manifest, Calibration | None]:
    """Read what a cache says of itself, and check that a run may use it.

    Args:
        config: the run.
        described: the run's teacher in its compute type; its weights are not used.
        index: the images.
        keyed: what a row's number means to the run.

    Raises:
        CacheError: an absent, damaged or unsafe cache, or one of another teacher, views or data;
            names the field, both values and the remedy.
    """
    folder = cache_folder(config)
    manifest = read_manifest(folder)
    if (folder / PARTS).exists():
        refuse_open_folder(folder / PARTS)
    wanted = fingerprint(config, described.fingerprint(), index, keyed)
    check_identity(manifest, wanted, str(folder))
    rows, columns = described.grid
    reading = described.outputs
    tokens = rows * columns + described.has_cls
    expected = {
        "num_rows": num_rows(config, index, keyed),
        "patches": rows * columns if reading.attention_layers else 0,
        "tokens": tokens if reading.feature_layers else 0,
        "width": described.width if reading.feature_layers else manifest.width,
    }
    for name, value in expected.items():
        found = getattr(manifest, name)
        if found != value:
            raise CacheError(
                f"cache.dir={folder}: {name} is {found}, but this teacher, these views and images "
                f"make it {value}; build another cache, or set teacher.mode=online"
            )
    return manifest, load_calibration(folder, manifest)


class CachedTeacher:
    """Views of plans that were submitted ahead, from a cache.

    A row that is missing or damaged, or whose picture could not be decoded when it was built, is a
    miss, but for a view that is not valid in the run either. A micro-batch with a miss is given to
    the live teacher whole, and rounded as rows are, so that a run does not depend on what was at
    hand; or, without ``cache.on_miss=online``, it is reported as a failure.

    Args:
        config: the run.
        manifest: the cache's.
        calibration: the cache's.
        described: the run's teacher; its weights are not used.
        live: runs on misses and spot checks; ``None``: on none.
        device: where views are wanted.
        fail: told why the present step must not be taken; the view handed out then is blank.
        keyed: what a row's number means.
    """

    def __init__(
        self,
        config: Config,
        manifest: Manifest,
        calibration: Calibration | None,
        described: OnlineTeacher,
        live: Teacher | None,
        device: torch.device,
        fail: Callable[[CacheError], None],
        keyed: Keyed = "views",
    ) -> None:
        self.settings = config.cache
        self.folder = cache_folder(config)
        self.manifest = manifest
        self.calibration = (
            None if calibration is None else Calibration(*(one.to(device) for one in calibration))
        )
        self.width, self.has_cls = described.width, described.has_cls
        self.bounds = BOUNDS[described.dtype]
        self.live = live
        self.device = device
        self.fail = fail
        self.looks = self.checks = 0
        count = int(config.views.views_per_image or 1) if keyed == "views" else None
        self.reader = CacheReader(self.folder, manifest, count, pin=device.type == "cuda")

    @property
    def image_size(self) -> int | None:
        """The live teacher's; without one no picture is looked at."""
        return None if self.live is None else self.live.image_size

    def submit(self, plan: Plan) -> None:
        """Begin to read the rows of a plan."""
        self.reader.submit(plan)

    def close(self) -> None:
        """Stop reading."""
        self.reader.close()

    def forward_batch(self, batch: Batch) -> TeacherView:
        """See ``TeacherSource.look``; waits for the device in spot checks only."""
        if batch.plan is None:
            return self.blank_view(len(batch.position))
        rows = self.reader.collect(batch.plan)
        self.looks += 1
        missed = [k for k, fault in enumerate(rows.faults) if fault and k not in batch.faulty]
        if missed and self.settings.on_miss == "online" and self.live is not None:
            return rounded(self.live.forward_batch(batch), self.manifest.codec, self.calibration)
        if missed:
            self.fail(self.miss(rows, missed[0]))
        view = self.decode(rows.fields)
        # Evenly spread, and at the same places on all ranks, so that none waits for another's.
        due = self.checks < self.looks * self.settings.spot_check
        if due and not missed and self.live is not None:
            self.checks += 1
            self.compare(self.live.forward_batch(batch), view, rows, batch.faulty)
        return view

    def decode(self, fields: dict[str, Tensor]) -> TeacherView:
        """Move stored tensors to the device and decode them there."""
        moved = {
            name: fields[name].to(self.device, non_blocking=True)
            for name in ("attention", "features", "scales")
            if name in fields
        }
        attention, features = moved.get("attention"), moved.get("features")
        if features is not None:
            features = decode(Encoded(features, moved.get("scales")), self.calibration)
        return TeacherView(None if attention is None else attention.float(), features, True)

    def blank_view(self, count: int) -> TeacherView:
        """View of a batch that stands in for data that could not be read."""
        fields = {
            name: torch.empty((count, *shape), dtype=dtype)
            for name, (dtype, shape) in self.manifest.fields().items()
        }
        for place in range(count):
            blank(fields, place)
        return self.decode(fields)

    def miss(self, rows: Rows, place: int) -> CacheError:
        """What stops a run that has no teacher."""
        row = rows.numbers[place]
        sample, view = divmod(row, self.reader.count or 1)
        return CacheError(
            f"cache.dir={self.folder}: row {row} (image {sample}, view {view}) of part "
            f"{self.reader.part_of(row)}: {rows.faults[place]}; complete the cache with "
            "launchers/precompute_teacher.py, or set cache.on_miss=online"
        )

    def compare(
        self, live: TeacherView, stored: TeacherView, rows: Rows, faulty: tuple[int, ...]
    ) -> None:
        """Spot check: log how live and stored agree; fail where rounding does not explain it."""
        places = [k for k, fault in enumerate(rows.faults) if not fault and k not in faulty]
        if not places:
            return
        found = agreement(live, stored, places, self.calibration)
        logger.info("cache: spot check of %d rows: %s", len(places), found)
        if not found.within(self.bounds):
            self.fail(
                CacheError(
                    f"cache.dir={self.folder}: spot check of row {rows.numbers[places[0]]} and "
                    f"{len(places) - 1} more: the live teacher says otherwise: {found}; expected "
                    f"a cosine of at least {self.bounds.cosine} and a distance of at most "
                    f"{self.bounds.distance}; build the cache again, or set teacher.mode=online"
                )
            )


def rounded(view: TeacherView, codec: Codec, calibration: Calibration | None) -> TeacherView:
    """A live view as it would be read; int8 features that nothing is calibrated for stay.

    Args:
        view: the live teacher's.
        codec: the cache's.
        calibration: the cache's, on the view's device.
    """
    attention, features, _ = view
    if features is not None and (codec == "bf16" or calibration is not None):
        features = as_stored(features, codec, calibration)
    return TeacherView(None if attention is None else attention.half().float(), features)
