"""Build a cache: forward the views of training through the teacher, shard by shard."""

import errno
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cmtmae_scale.cache.claim import compute_once, heartbeat
from cmtmae_scale.cache.codecs import (
    Calibration,
    Codec,
    calibrate,
    encode,
    load_calibration,
    save_calibration,
)
from cmtmae_scale.cache.fingerprint import (
    Keyed,
    cache_fingerprint,
    check_fingerprint,
    provenance,
    warn_about_provenance,
)
from cmtmae_scale.cache.format import (
    ENDLESS,
    MANIFEST,
    Manifest,
    manifest_text,
    missing_shards,
    read_manifest,
    shard_exists,
    write_shard,
)
from cmtmae_scale.config.images import open_images, require_expected_images
from cmtmae_scale.config.needs import needs
from cmtmae_scale.config.schema import Config
from cmtmae_scale.config.teachers import cache_folder
from cmtmae_scale.errors import CacheError, TeacherError, remedy_for
from cmtmae_scale.runtime.bf16 import slow_bf16_warning
from cmtmae_scale.runtime.launch import World
from cmtmae_scale.runtime.storage import sync
from cmtmae_scale.teachers.build import assemble_teacher, compute_dtype
from cmtmae_scale.teachers.online import OnlineTeacher
from dataloading.index import Index
from dataloading.plan import Plan, Planner
from dataloading.reading import Reader
from dataloading.stream import LOOK_AHEAD, make_decoder

logger = logging.getLogger(__name__)

CALIBRATION_ROWS = 1024
SHARD_ROWS = 1024
MAX_SHARDS = 10_000
MAX_SHARD_BYTES = 1 << 30
"""A process holds two shards in memory: one is written while the next is computed."""
Rows = NDArray[np.int64]


class TeacherRows(NamedTuple):
    """Teacher outputs for some rows, on the teacher's device."""

    rows: Rows
    attention: Tensor | None
    features: Tensor | None
    valid: Tensor
    """Whether the image was decoded, ``[B]`` bool."""


class Builder:
    """Computes the rows of a cache in any order.

    Args:
        config: the run that reads the cache.
        index: the images.
        teacher: on ``device``.
        device: where the teacher computes.
        keyed: meaning of a row's number.

    Raises:
        CacheError: if the run has no fixed number of views.
    """

    def __init__(
        self,
        config: Config,
        index: Index,
        teacher: OnlineTeacher,
        device: torch.device,
        keyed: Keyed = "views",
    ) -> None:
        if keyed == "views" and config.views.views_per_image is None:
            raise CacheError(
                "views.views_per_image is not set: a cache holds a fixed number of views per "
                "image; set views.views_per_image=4 or so here and in the run"
            )
        self.config = config
        self.index = index
        self.teacher = teacher
        self.device = device
        self.keyed: Keyed = keyed
        self.planner = Planner(
            index,
            seed=config.run.seed,
            scale=config.views.crop_scale,
            ratio=config.views.aspect_ratio,
            flip=config.views.hflip,
            count=config.views.views_per_image,
            shuffle=config.data.shuffle,
        )
        self.reader = Reader(index)
        self.decoder = make_decoder(
            config.data.decode,
            self.reader,
            (teacher.image_size,),
            config.train.micro_batch_size,
            config.data.workers,
            device,
        )
        self.calibration: Calibration | None = None

    def make_manifest(self, codec: Codec, rows_per_shard: int | None = None) -> Manifest:
        """Return the manifest of a cache of these rows, without its calibration.

        ``rows_per_shard`` is derived by default: see ``choose_shard_rows``.

        Raises:
            CacheError: if the run uses nothing that the codec stores.
        """
        patches, tokens, width = row_shape(self.teacher, codec != "attention")
        if codec != "attention" and not tokens:
            raise CacheError(
                f"cache.codec={codec} stores features, but no weight of the loss falls on the "
                "teacher's; set cache.codec=attention"
            )
        if not patches and not tokens:
            raise CacheError(
                "cache.codec=attention, but the mask does not use the teacher's attention"
            )
        teacher = self.teacher.fingerprint()
        manifest = Manifest(
            fingerprint=cache_fingerprint(self.config, teacher, self.index, self.keyed),
            recorded=provenance(self.config, self.device),
            codec=codec,
            num_rows=num_rows(self.config, self.index, self.keyed),
            rows_per_shard=rows_per_shard or SHARD_ROWS,
            patches=patches,
            tokens=tokens,
            width=width,
            calibration_sha256=None,
        )
        if rows_per_shard is None and manifest.num_rows != ENDLESS:
            rows = choose_shard_rows(manifest.num_rows, manifest.row_bytes())
            manifest = replace(manifest, rows_per_shard=rows)
        return manifest

    def begin_cache(
        self, folder: Path, codec: Codec, rows_per_shard: int | None = None
    ) -> Manifest:
        """Begin a cache, or join a cache that another process began.

        The first process calibrates and publishes the manifest, the others wait for it. Without
        ``rows_per_shard`` a cache that was begun keeps its value.

        Raises:
            CacheError: if the folder holds another cache, or cannot be written.
        """
        if rows_per_shard is None and (folder / MANIFEST).exists():
            rows_per_shard = read_manifest(folder).rows_per_shard
        wanted = self.make_manifest(codec, rows_per_shard)
        try:
            folder.mkdir(mode=0o755, parents=True, exist_ok=True)
            manifest = compute_once(
                folder / ".calibrating",
                lambda: find_manifest(folder, wanted),
                lambda keep_alive: self.publish_manifest(folder, wanted, keep_alive),
            )
        except OSError as error:
            raise CacheError(
                f"cache.dir={folder}: cannot be written ({error.strerror}); "
                f"{remedy_for(error, 'name another folder')}"
            ) from error
        self.use_calibration(folder, manifest)
        return manifest

    def join_cache(self, folder: Path, codec: Codec) -> Manifest:
        """Open an existing cache, to compare it with rows that are computed again."""
        stored = read_manifest(folder)
        manifest = find_manifest(folder, self.make_manifest(codec, stored.rows_per_shard)) or stored
        self.use_calibration(folder, manifest)
        return manifest

    def use_calibration(self, folder: Path, manifest: Manifest) -> None:
        """Encode with the calibration of a cache from now on."""
        self.calibration = load_calibration(folder, manifest.calibration_sha256, manifest.width)

    def publish_manifest(
        self, folder: Path, wanted: Manifest, keep_alive: Callable[[], None]
    ) -> Manifest:
        """Calibrate and publish the manifest, unless another process was faster."""
        sha256 = None
        if wanted.codec == "int8" and wanted.tokens:
            sha256 = save_calibration(folder, self.calibrate_channels(keep_alive))
        draft = folder / f".{MANIFEST}.{os.urandom(4).hex()}"
        draft.write_text(manifest_text(replace(wanted, calibration_sha256=sha256)))
        sync(draft)
        try:
            os.link(draft, folder / MANIFEST)
        except FileExistsError:
            logger.info("%s was published by another process", folder / MANIFEST)
        finally:
            draft.unlink()
        sync(folder)
        return read_manifest(folder)

    def calibrate_channels(self, keep_alive: Callable[[], None]) -> Calibration:
        """Compute channel statistics of the first views; calls ``keep_alive`` per micro-batch."""
        count = min(CALIBRATION_ROWS, num_rows(self.config, self.index, self.keyed))

        def features() -> Iterator[Tensor]:
            positions = np.arange(count, dtype=np.int64)
            for found in self.forward_plans(map(self.planner, self.split_rows(positions))):
                keep_alive()
                if found.features is not None and bool(found.valid.any()):
                    yield found.features[found.valid]

        logger.info("calibrating with the first %d views", count)
        try:
            return calibrate(features())
        except ValueError as error:
            raise CacheError(
                f"data.path={self.config.data.path}: none of the first {count} views can be "
                "decoded, and int8 features are calibrated with them; replace these images "
                "(cmtmae check-data names them), or set cache.codec=bf16"
            ) from error

    def split_rows(self, rows: Rows) -> list[Rows]:
        size = self.config.train.micro_batch_size
        return [rows[at : at + size] for at in range(0, len(rows), size)]

    def plan_rows(self, rows: Rows) -> Plan:
        if self.keyed == "positions":
            return self.planner(rows)
        count = self.config.views.views_per_image or 1
        return self.planner.cut(rows, rows // count, rows % count)

    def forward_plans(self, plans: Iterable[Plan]) -> Iterator[TeacherRows]:
        """Decode the views of plans ahead, and forward them through the teacher."""
        pending: deque[Plan] = deque()
        for plan in plans:
            self.decoder.submit(pad_plan(plan, self.config.train.micro_batch_size))
            pending.append(plan)
            if len(pending) > LOOK_AHEAD:
                yield self.forward_next(pending.popleft())
        while pending:
            yield self.forward_next(pending.popleft())

    def forward_next(self, plan: Plan) -> TeacherRows:
        """Forward the oldest plan that was submitted to the decoder.

        Raises:
            TeacherError: if the output for an image that was decoded is not finite.
        """
        images, faults = self.decoder.collect()
        view = self.teacher(images[0].to(self.device, non_blocking=True))
        count = len(plan.positions)
        valid = torch.tensor([fault is None for fault in faults[:count]]).to(self.device)
        outputs = [None if one is None else one[:count] for one in (view.attention, view.features)]
        finite = torch.ones_like(valid)
        for output in outputs:
            if output is not None:
                finite &= output.flatten(1).isfinite().all(1)
        failed = (valid & ~finite).cpu().numpy()
        if failed.any():
            sample, number = int(plan.ids[failed][0]), int(plan.views[failed][0])
            raise TeacherError(
                f"the output of teacher.model={self.config.teacher.model} is not finite for "
                f"{failed.sum()} of {count} views, first: view {number} of image {sample} "
                f"({self.index.names[sample]}), which was decoded; set backend.precision=fp32, or "
                "use other teacher.weights"
            )
        return TeacherRows(plan.positions, outputs[0], outputs[1], valid)

    def compute_shard(self, manifest: Manifest, shard: int) -> dict[str, Tensor]:
        """Compute all rows of a shard as they are stored, without checksums, on the CPU."""
        rows = np.array(manifest.shard_rows(shard), dtype=np.int64)
        fields = manifest.empty_rows(len(rows))
        del fields["checksum"]
        at = 0
        for found in self.forward_plans(map(self.plan_rows, self.split_rows(rows))):
            place = slice(at, at + len(found.rows))
            at = place.stop
            for name, values in self.encode_rows(manifest, found).items():
                fields[name][place] = values.cpu()
        return fields

    def encode_rows(self, manifest: Manifest, found: TeacherRows) -> dict[str, Tensor]:
        """Encode teacher outputs; rows that are not valid become zeros."""
        fields: dict[str, Tensor] = {}
        if manifest.patches and found.attention is not None:
            fields["attention"] = zero_invalid(found.attention.half(), found.valid)
        if manifest.tokens and found.features is not None:
            clean = zero_invalid(found.features, found.valid)
            values, scales = encode(clean, manifest.codec, self.calibration)
            if scales is not None and not bool(scales.isfinite().all()):
                raise CacheError(
                    "cache.codec=int8: features of rows "
                    f"{found.rows[0]} to {found.rows[-1]} are beyond the range of int8 with the "
                    "calibration of the first views; set cache.codec=bf16 in another cache.dir"
                )
            fields["features"] = zero_invalid(values, found.valid)
            if scales is not None:
                fields["scales"] = zero_invalid(scales, found.valid)
        return fields | {"valid": found.valid.to(torch.uint8)}

    def close(self) -> None:
        self.decoder.close()
        self.reader.close()


def make_builder(
    config: Config, index_folder: Path, device: torch.device, keyed: Keyed = "views"
) -> Builder:
    """Build index and teacher of a run; one process builds the index, the others wait.

    Raises:
        CacheError: if the folder of the index cannot be written.
        ConfigError: another number of images than ``data.expected_images``.
    """
    slower = slow_bf16_warning(device, config.backend.precision)
    if slower is not None:
        logger.warning("%s", slower)
    needed = needs(config)
    if config.cache.codec == "attention":
        needed = needed._replace(teacher_features=False)
    teacher = assemble_teacher(config, needed, load=True).to(device, compute_dtype(config))
    index = open_or_build_index(config, index_folder, keyed)
    require_expected_images(config.data, index)
    return Builder(config, index, teacher, device, keyed)


def open_or_build_index(config: Config, folder: Path, keyed: Keyed = "views") -> Index:
    """Read the index, or build it while other processes wait.

    A cache that was begun keeps the images that it began with. A sidecar uses the index of its run
    as it is: the run's ranks have it mapped, and file times may differ on this machine.

    Raises:
        CacheError: if the folder cannot be written.
    """

    def read() -> Index:
        if keyed == "positions":
            return open_images(
                replace(config.data, verify_index="never"), folder, recheck_excluded=False
            )
        is_new = not (cache_folder(config) / MANIFEST).exists()
        return open_images(config.data, folder, recheck_excluded=is_new)

    def find() -> Index | None:
        return read() if (folder / "index.json").exists() else None

    def build(keep_alive: Callable[[], None]) -> Index:
        with heartbeat(keep_alive):  # the headers of a large set take longer than STALE_S
            return read()

    try:
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        return compute_once(folder / ".indexing", find, build)
    except OSError as error:
        raise CacheError(
            f"{folder}: cannot be written ({error.strerror}); "
            f"{remedy_for(error, 'correct cache.dir or data.index')}"
        ) from error


def row_shape(teacher: OnlineTeacher, features: bool = True) -> tuple[int, int, int]:
    """Return patches N, tokens T and channels F of a row; 0: not used, or not stored."""
    reading, patches = teacher.outputs, teacher.grid[0] * teacher.grid[1]
    attention = patches if reading.attention_layers else 0
    if not features or not reading.feature_layers:
        return attention, 0, 0
    return attention, patches + teacher.has_cls, teacher.width


def num_rows(config: Config, index: Index, keyed: Keyed) -> int:
    """Return the number of rows of a complete cache."""
    return ENDLESS if keyed == "positions" else len(index) * (config.views.views_per_image or 1)


def choose_shard_rows(num_rows: int, row_bytes: int) -> int:
    """Return the rows per shard of a cache: ``SHARD_ROWS``, doubled for large caches.

    Doubled until there are at most ``MAX_SHARDS``, while a shard has at most ``MAX_SHARD_BYTES``.
    """
    rows = SHARD_ROWS
    while num_rows > rows * MAX_SHARDS and 2 * rows * row_bytes <= MAX_SHARD_BYTES:
        rows *= 2
    return rows


def zero_invalid(values: Tensor, valid: Tensor) -> Tensor:
    """Set rows that are not valid to zero."""
    return values.masked_fill(~valid.view(-1, *[1] * (values.ndim - 1)), 0)


def pad_plan(plan: Plan, size: int) -> Plan:
    """Repeat the last draw of a plan up to the batch size of the decoder."""
    chosen = np.minimum(np.arange(size), len(plan.positions) - 1)
    positions, ids, views, boxes, flips = plan
    return Plan(positions[chosen], ids[chosen], views[chosen], boxes[chosen], flips[chosen])


def find_manifest(folder: Path, wanted: Manifest) -> Manifest | None:
    """Read the manifest of a cache that was begun; ``None``: there is none yet.

    Raises:
        CacheError: if the cache differs from the wanted cache.
    """
    if not (folder / MANIFEST).exists():
        return None
    found = read_manifest(folder)
    check_fingerprint(found, wanted.fingerprint, str(folder))
    for field in ("codec", "num_rows", "rows_per_shard", "patches", "tokens", "width"):
        before, after = getattr(found, field), getattr(wanted, field)
        if before != after:
            raise CacheError(
                f"cache.dir={folder}: was begun with {field}={before}, now it is {after}; restore "
                "it or name another folder"
            )
    warn_about_provenance(found, wanted.recorded, str(folder))
    return found


def stripe_of(share: tuple[int, int], world: World) -> tuple[int, int]:
    """Return this process's number and the number of processes of all n jobs; ``share``: (i, n)."""
    job, jobs = share
    return job * world.world_size + world.rank, jobs * world.world_size


def build_shards(
    builder: Builder,
    folder: Path,
    manifest: Manifest,
    shards: Iterable[int],
    report_rows: Callable[[int], None] = lambda rows: None,
) -> None:
    """Compute and write shards; one shard is written while the next is computed.

    The next shard is requested once its predecessor is computed, possibly before it is written.
    Complete shards are skipped. ``report_rows`` is called with the number of finished rows.

    Raises:
        CacheError: if the store refuses a shard; names what is missing.
    """
    done = 0
    with ThreadPoolExecutor(1, thread_name_prefix="write") as pool:
        writing: Future[None] | None = None
        for shard in shards:
            if not shard_exists(folder, manifest, shard):
                fields = builder.compute_shard(manifest, shard)
                await_write(writing, folder, manifest)
                writing = pool.submit(write_shard, folder, manifest, shard, fields)
            done += len(manifest.shard_rows(shard))
            report_rows(done)
        await_write(writing, folder, manifest)


def await_write(writing: "Future[None] | None", folder: Path, manifest: Manifest) -> None:
    """Wait for the shard that is being written.

    Raises:
        CacheError: if the store refuses it; names what is missing.
    """
    if writing is None:
        return
    try:
        writing.result()
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise CacheError(
            f"cache.dir={folder}: {'is full' if full else 'cannot be written'} ({error}); "
            f"{missing_text(folder, manifest)}make room and run the same command again"
        ) from error


def missing_text(folder: Path, manifest: Manifest) -> str:
    """Count missing shards for a message; empty for an endless cache."""
    if manifest.num_rows == ENDLESS:
        return ""
    missing = missing_shards(folder, manifest)
    rows = sum(len(manifest.shard_rows(shard)) for shard in missing)
    return (
        f"{manifest.num_shards - len(missing)} of {manifest.num_shards} shards are complete, the "
        f"others need {rows * manifest.row_bytes() / 1e9:.2f} GB; "
    )
