"""Computes the rows of a cache: the same views as training's, seen by the teacher, part by part."""

import errno
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cmtmae_scale.cache.calibration import begin, find, load_calibration
from cmtmae_scale.cache.codecs import Calibration, Codec, calibrate, encode
from cmtmae_scale.cache.format import ENDLESS, Manifest, read_manifest, read_seal
from cmtmae_scale.cache.identity import Keyed, fingerprint, provenance
from cmtmae_scale.cache.parts import write_part
from cmtmae_scale.config.schema import Config
from cmtmae_scale.errors import CacheError
from cmtmae_scale.teachers.online import OnlineTeacher
from dataloading.index import Index
from dataloading.plan import Plan, Planner
from dataloading.reading import Reader
from dataloading.stream import LOOK_AHEAD, make_decoder

logger = logging.getLogger(__name__)

CALIBRATION_ROWS = 1024
Rows = NDArray[np.int64]


class Seen(NamedTuple):
    """What the teacher made of some rows, on the teacher's device."""

    rows: Rows
    attention: Tensor | None
    features: Tensor | None
    valid: Tensor
    """Whether the picture could be decoded and all numbers are finite, ``[B]`` bool."""


class Builder:
    """Computes rows in any order.

    Args:
        config: the run that the cache is for.
        index: the images.
        teacher: on the device that computes.
        device: that device.
        keyed: what a row's number means.

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
                "views.views_per_image is not set: a cache holds a fixed number of views an image; set "
                "views.views_per_image=4 or so here and in the run"
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

    def describe(self, codec: Codec, rows_a_part: int) -> Manifest:
        """What a cache of these rows would be, its calibration left out.

        Raises:
            CacheError: if the run uses nothing that the codec would store.
        """
        reading = self.teacher.outputs
        height, width = self.teacher.grid
        stores_features = codec != "attention" and bool(reading.feature_layers)
        if codec != "attention" and not stores_features:
            raise CacheError(
                f"cache.codec={codec} stores features, but no weight of the loss falls on the "
                "teacher's; set cache.codec=attention"
            )
        if not reading.attention_layers and not stores_features:
            raise CacheError(
                "cache.codec=attention, but the mask does not use the teacher's attention"
            )
        patches = height * width
        return Manifest(
            fingerprint=fingerprint(
                self.config, self.teacher.fingerprint(), self.index, self.keyed
            ),
            recorded=provenance(self.config, self.device),
            codec=codec,
            num_rows=num_rows(self.config, self.index, self.keyed),
            rows_a_part=rows_a_part,
            patches=patches if reading.attention_layers else 0,
            tokens=patches + self.teacher.has_cls if stores_features else 0,
            width=self.teacher.width if stores_features else 0,
            calibration_sha256=None,
        )

    def begin(self, folder: Path, codec: Codec, rows_a_part: int) -> Manifest:
        """Begin a cache or join one; afterwards rows can be stored."""
        manifest = begin(folder, self.describe(codec, rows_a_part), self.calibrate)
        self.calibration = load_calibration(folder, manifest)
        return manifest

    def join(self, folder: Path, codec: Codec) -> Manifest:
        """Open a cache that was begun, to compare it with what is computed here."""
        stored = read_manifest(folder)
        manifest = find(folder, self.describe(codec, stored.rows_a_part)) or stored
        self.calibration = load_calibration(folder, manifest)
        return manifest

    def calibrate(self, live: Callable[[], None]) -> Calibration:
        """Statistics of the first views that a run would see; ``live`` is called now and then."""
        count = min(CALIBRATION_ROWS, num_rows(self.config, self.index, self.keyed))

        def features() -> Iterator[Tensor]:
            positions = np.arange(count, dtype=np.int64)
            for seen in self.see(self.planner(rows) for rows in self.split(positions)):
                live()
                if seen.features is not None and bool(seen.valid.any()):
                    yield seen.features[seen.valid]

        logger.info("calibrating with the first %d views", count)
        return calibrate(features())

    def split(self, rows: Rows) -> list[Rows]:
        """Cut rows into micro-batches."""
        size = self.config.train.micro_batch_size
        return [rows[at : at + size] for at in range(0, len(rows), size)]

    def plan(self, rows: Rows) -> Plan:
        """What is to be read and cut for rows of this cache."""
        if self.keyed == "positions":
            return self.planner(rows)
        count = self.config.views.views_per_image or 1
        return self.planner.cut(rows, rows // count, rows % count)

    def see(self, plans: Iterator[Plan]) -> Iterator[Seen]:
        """Decode and look at plans, some of them ahead."""
        pending: deque[Plan] = deque()
        for plan in plans:
            self.decoder.submit(filled(plan, self.config.train.micro_batch_size))
            pending.append(plan)
            if len(pending) > LOOK_AHEAD:
                yield self.look(pending.popleft())
        while pending:
            yield self.look(pending.popleft())

    def look(self, plan: Plan) -> Seen:
        """The teacher's view of the oldest plan that was submitted."""
        images, faults = self.decoder.collect()
        view = self.teacher(images[0].to(self.device, non_blocking=True))
        count = len(plan.positions)
        valid = torch.tensor([fault is None for fault in faults[:count]]).to(self.device)
        parts = [None if one is None else one[:count] for one in (view.attention, view.features)]
        for one in parts:
            if one is not None:
                valid &= one.flatten(1).isfinite().all(1)
        return Seen(plan.positions, parts[0], parts[1], valid)

    def store(self, manifest: Manifest, part: int) -> dict[str, Tensor]:
        """Compute all rows of a part, as they are stored; on the CPU."""
        rows = np.array(manifest.rows_of(part), dtype=np.int64)
        found = {
            name: torch.zeros((len(rows), *shape), dtype=dtype)
            for name, (dtype, shape) in manifest.fields().items()
            if name != "checksum"
        }
        at = 0
        for seen in self.see(self.plan(some) for some in self.split(rows)):
            place = slice(at, at + len(seen.rows))
            at = place.stop
            for name, values in self.encoded(manifest, seen).items():
                found[name][place] = values.cpu()
        return found

    def encoded(self, manifest: Manifest, seen: Seen) -> dict[str, Tensor]:
        """Fields of some rows; those that are not valid hold zeros."""
        fields = {"valid": seen.valid.to(torch.uint8)}
        if manifest.patches and seen.attention is not None:
            fields["attention"] = seen.attention.half()
        if manifest.tokens and seen.features is not None:
            clean = seen.features.masked_fill(~seen.valid[:, None, None], 0)
            encoded = encode(clean, manifest.codec, self.calibration)
            fields["features"] = encoded.values
            if encoded.scales is not None:
                fields["scales"] = encoded.scales
        return {
            name: values if name == "valid" else masked(values, seen.valid)
            for name, values in fields.items()
        }

    def close(self) -> None:
        """Stop the threads."""
        self.decoder.close()
        self.reader.close()


def num_rows(config: Config, index: Index, keyed: Keyed) -> int:
    """Rows of a finished cache."""
    return ENDLESS if keyed == "positions" else len(index) * (config.views.views_per_image or 1)


def masked(values: Tensor, valid: Tensor) -> Tensor:
    """Rows that are not valid, set to zero."""
    return values.masked_fill(~valid.view(-1, *[1] * (values.ndim - 1)), 0)


def filled(plan: Plan, size: int) -> Plan:
    """A plan of the size that decoders are made for: its last draw is repeated."""
    chosen = np.minimum(np.arange(size), len(plan.positions) - 1)
    positions, ids, views, boxes, flips = plan
    return Plan(positions[chosen], ids[chosen], views[chosen], boxes[chosen], flips[chosen])


def missing_parts(folder: Path, manifest: Manifest) -> list[int]:
    """Parts that are not there yet."""
    return [part for part in range(manifest.num_parts) if read_seal(folder, part) is None]


def build_parts(
    builder: Builder,
    folder: Path,
    manifest: Manifest,
    parts: Iterable[int],
    tell: Callable[[int], None],
) -> None:
    """Compute and write parts, one being written while the next is computed.

    The next part is asked for when the one before has been computed; it may still be in writing.

    Args:
        builder: computes; its calibration is the cache's.
        folder: ``cache.dir``.
        manifest: the cache's.
        parts: which; those that are there already are left out.
        tell: is told how many rows are done.

    Raises:
        CacheError: if the store refuses a part; says what is missing.
    """
    done = 0
    with ThreadPoolExecutor(1, thread_name_prefix="write") as pool:
        writing: Future[None] | None = None
        for part in parts:
            if read_seal(folder, part) is None:
                fields = builder.store(manifest, part)
                finish(writing, folder, manifest)
                writing = pool.submit(write_part, folder, manifest, part, fields)
            done += len(manifest.rows_of(part))
            tell(done)
        finish(writing, folder, manifest)


def finish(writing: "Future[None] | None", folder: Path, manifest: Manifest) -> None:
    """Wait for the part that is being written."""
    if writing is None:
        return
    try:
        writing.result()
    except Exception as error:
        # safetensors has its own type for what the system refuses
        if not isinstance(error, OSError) and type(error).__name__ != "SafetensorError":
            raise
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise CacheError(
            f"cache.dir={folder}: {'is full' if full else 'cannot be written'} ({error}); "
            f"{lacking(folder, manifest)}make room and run the same command again"
        ) from error


def lacking(folder: Path, manifest: Manifest) -> str:
    """What is there and what is not, for messages."""
    if manifest.num_rows == ENDLESS:
        return ""
    missing = missing_parts(folder, manifest)
    rows = sum(len(manifest.rows_of(part)) for part in missing)
    return (
        f"{manifest.num_parts - len(missing)} of {manifest.num_parts} parts are there, the others "
        f"need {rows * manifest.row_bytes() / 1e9:.2f} GB; "
    )
