"""Rates of this machine's teacher, decoder and store, measured for some seconds of wall time."""

import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor

from cmtmae_scale.cache.format import SHARDS, Manifest, write_shard
from cmtmae_scale.cache.reader import CacheReader
from cmtmae_scale.config.schema import Config
from cmtmae_scale.errors import CacheError
from cmtmae_scale.runtime.storage import drop_from_memory
from cmtmae_scale.teachers.online import OnlineTeacher
from dataloading.index import Index
from dataloading.plan import Plan
from dataloading.stream import LOOK_AHEAD, Stream

MEASURE_S = 2.5
"""Seconds per measurement: teacher, decoding, writing and reading."""
CPU_BATCH = 4
"""Largest batch of the teacher on a CPU, where larger batches are no faster."""


class Measured(NamedTuple):
    """Rates of one process on this machine, and of its store."""

    teacher: float
    """Images per second."""
    batch: int
    """Images per teacher forward."""
    decode: float | None
    """Views per second; ``None``: there are no images."""
    write: float
    """Bytes per second of shards as the builder writes them: checksums, digest and fsync."""
    read: float
    """Bytes per second of random rows as a run reads them: on threads, with checksums."""
    in_memory: float | None
    """Largest share of a shard's pages that was still in memory when reading began; ``None``: the
    file system does not report it."""


def measure_rates(
    config: Config,
    teacher: OnlineTeacher,
    index: Index | None,
    manifest: Manifest,
    device: torch.device,
) -> Measured:
    """Measure teacher, decoding (if there are images) and the store of ``cache.dir`` in turn.

    Raises:
        CacheError: if the store refuses.
    """
    batch = config.train.micro_batch_size
    if device.type == "cpu":
        batch = min(batch, CPU_BATCH)
    forward = teacher_rate(teacher, batch, device)
    decode = None if index is None else decoding_rate(config, index, teacher.image_size, device)
    store = store_rates(Path(str(config.cache.dir)), manifest, config.train.micro_batch_size)
    return Measured(forward, batch, decode, *store)


def measure_rate(work: Callable[[], int], seconds: float, device: torch.device) -> float:
    """Repeat some work, at least once, for some seconds; return its units per second."""
    began, done = time.perf_counter(), 0
    while True:
        done += work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken = time.perf_counter() - began
        if taken >= seconds:
            return done / taken


def teacher_rate(teacher: OnlineTeacher, batch: int, device: torch.device) -> float:
    """Return images per second of the teacher's forward, after one batch of warm-up."""
    side = teacher.image_size
    images = torch.zeros((batch, side, side, 3), dtype=torch.uint8, device=device)

    def forward() -> int:
        teacher(images)
        return batch

    measure_rate(forward, 0.0, device)
    return measure_rate(forward, MEASURE_S, device)


def decoding_rate(config: Config, index: Index, side: int, device: torch.device) -> float:
    """Return views per second of one process with ``data.workers`` threads, ``side`` in pixels."""
    with Stream(
        index,
        seed=config.run.seed,
        micro_batch=config.train.micro_batch_size,
        sizes=(side,),
        scale=config.views.crop_scale,
        ratio=config.views.aspect_ratio,
        flip=config.views.hflip,
        shuffle=config.data.shuffle,
        threads=config.data.workers,
        decode=config.data.decode,
        device=device,
    ) as stream:

        def draw() -> int:
            next(stream)
            return config.train.micro_batch_size

        for _ in range(LOOK_AHEAD + 1):  # batches that were decoded ahead do not count
            draw()
        return measure_rate(draw, MEASURE_S, device)


def store_rates(
    folder: Path, manifest: Manifest, micro_batch: int
) -> tuple[float, float, float | None]:
    """Write shards of random rows in a folder, read them back, and delete them.

    Returns:
        ``write``, ``read`` and ``in_memory`` of ``Measured``.

    Raises:
        CacheError: if the store refuses.
    """
    try:
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".rates-") as made:
            place = Path(made)
            rows, write_rate = measure_writing(place, manifest)
            dropped = [drop_from_memory(path) for path in sorted((place / SHARDS).rglob("*.safe*"))]
            in_memory = max((share for share in dropped if share is not None), default=None)
            order = np.random.default_rng(0).permutation(rows)
            read_rate = measure_reading(place, manifest, order, micro_batch)
    except (OSError, SafetensorError) as error:
        raise CacheError(
            f"cache.dir={folder}: cannot be written ({error}); make room or name another folder"
        ) from error
    size = manifest.row_bytes()
    return size * write_rate, size * read_rate, in_memory


def measure_writing(folder: Path, manifest: Manifest) -> tuple[int, float]:
    """Write shards for some seconds, at least one; return their rows, and rows per second."""
    fields = random_rows(manifest)
    began, rows = time.perf_counter(), 0
    for shard in range(manifest.num_shards):
        count = len(manifest.shard_rows(shard))
        write_shard(folder, manifest, shard, {name: some[:count] for name, some in fields.items()})
        rows += count
        if time.perf_counter() - began >= MEASURE_S:
            break
    return rows, rows / (time.perf_counter() - began)


def random_rows(manifest: Manifest) -> dict[str, Tensor]:
    """Return the fields of a shard, filled with bytes that no store can compress."""
    generator = torch.Generator().manual_seed(0)
    rows = len(manifest.shard_rows(0))
    fields: dict[str, Tensor] = {}
    for name, (dtype, shape) in manifest.fields().items():
        width = dtype.itemsize * torch.Size(shape).numel()
        noise = torch.randint(0, 256, (rows, width), dtype=torch.uint8, generator=generator)
        fields[name] = noise.view(dtype).reshape(rows, *shape)
    return fields | {"valid": torch.ones(rows, dtype=torch.uint8)}


def measure_reading(
    folder: Path, manifest: Manifest, rows: NDArray[np.int64], micro_batch: int
) -> float:
    """Read each row once, for at most some seconds; return rows per second.

    Raises:
        CacheError: if a row cannot be used.
    """
    reader = CacheReader(folder, manifest, 1, pin=False)
    batches = iter([rows[at : at + micro_batch] for at in range(0, len(rows), micro_batch)])
    waiting: deque[Plan] = deque()
    began, done = time.perf_counter(), 0
    try:
        while True:
            while len(waiting) <= LOOK_AHEAD and (batch := next(batches, None)) is not None:
                waiting.append(plan_single_views(batch))
                reader.submit(waiting[-1])
            if not waiting:
                break
            found = reader.collect(waiting.popleft())
            fault = next(filter(None, found.faults), None)
            if fault is not None:
                raise CacheError(f"cache.dir={folder}: a row that was just written: {fault}")
            done += len(found.numbers)
            if time.perf_counter() - began >= MEASURE_S:
                break
        return done / (time.perf_counter() - began)
    finally:
        reader.close()


def plan_single_views(rows: NDArray[np.int64]) -> Plan:
    """Return a crop plan that names rows of a cache of one view per image."""
    boxes = np.zeros((len(rows), 4), dtype=np.int32)
    return Plan(rows, rows, np.zeros_like(rows), boxes, np.zeros(len(rows), dtype=np.bool_))
