"""How fast this machine's teacher, decoder and store are, measured in seconds of wall time."""

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

from cmtmae_scale.cache.format import PARTS, Manifest
from cmtmae_scale.cache.parts import write_part
from cmtmae_scale.cache.reader import CacheReader
from cmtmae_scale.config.schema import Config
from cmtmae_scale.errors import CacheError
from cmtmae_scale.runtime.storage import drop_from_memory
from cmtmae_scale.teachers.online import OnlineTeacher
from dataloading.index import Index
from dataloading.plan import Plan
from dataloading.stream import LOOK_AHEAD, Stream


class Store(NamedTuple):
    """A store's rates, in bytes of rows a second."""

    write: float
    """Parts as the builder writes them: checksums, digest and fsync included."""
    read: float
    """Rows at random as the trainer reads them: on threads, each compared with its checksum."""
    in_memory: float | None
    """Largest share of a part's pages that was still in memory when reading began; ``None``: the
    file system does not tell."""


class Measured(NamedTuple):
    """Figures of one process on this machine."""

    teacher: float
    """Images a second."""
    batch: int
    """Images that the teacher looked at together."""
    decode: float | None
    """Views a second; ``None``: there were no images."""
    store: Store


def repeat(work: Callable[[], int], seconds: float, device: torch.device) -> float:
    """Units a second of work that is repeated, at least once, for some seconds."""
    began, done = time.perf_counter(), 0
    while True:
        done += work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken = time.perf_counter() - began
        if taken >= seconds:
            return done / taken


def teacher_rate(
    teacher: OnlineTeacher, micro_batch: int, device: torch.device, seconds: float
) -> float:
    """Images a second that a teacher looks at, pictures on its device; one batch warms up."""
    side = teacher.image_size
    pictures = torch.zeros((micro_batch, side, side, 3), dtype=torch.uint8, device=device)

    def look() -> int:
        teacher(pictures)
        return micro_batch

    repeat(look, 0.0, device)
    return repeat(look, seconds, device)


def decoding_rate(
    config: Config, index: Index, side: int, device: torch.device, seconds: float
) -> float:
    """Views a second of one process with ``data.workers`` threads; what it made ahead is left out.

    Args:
        config: the run.
        index: the images.
        side: of the views, pixels.
        device: where they go.
        seconds: time to spend.
    """
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

        for _ in range(LOOK_AHEAD + 1):
            draw()
        return repeat(draw, seconds, device)


def store_rates(folder: Path, manifest: Manifest, micro_batch: int, seconds: float) -> Store:
    """Write parts of random rows under a folder, read them back, and delete them.

    Args:
        folder: on the store; made if it is not there.
        manifest: of the cache that is meant; no more than its rows are written.
        micro_batch: rows that are read together.
        seconds: for each of the two; one part and one micro-batch are done in any case.

    Raises:
        CacheError: if the store refuses.
    """
    try:
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".rates-") as made:
            place = Path(made)
            rows, written_s = write_for(place, manifest, seconds)
            told = [drop_from_memory(path) for path in sorted((place / PARTS).glob("*.safe*"))]
            shares = [share for share in told if share is not None]
            order = np.random.default_rng(0).permutation(rows)
            read_s = read_for(place, manifest, order, micro_batch, seconds)
    except (OSError, SafetensorError) as error:
        raise CacheError(
            f"cache.dir={folder}: cannot be written ({error}); make room or name another folder"
        ) from error
    size = manifest.row_bytes()
    return Store(size * written_s, size * read_s, max(shares, default=None))


def write_for(folder: Path, manifest: Manifest, seconds: float) -> tuple[int, float]:
    """Write parts for some seconds; returns how many rows, and rows a second."""
    fields = random_rows(manifest)
    began, rows = time.perf_counter(), 0
    for part in range(manifest.num_parts):
        count = len(manifest.rows_of(part))
        write_part(folder, manifest, part, {name: one[:count] for name, one in fields.items()})
        rows += count
        if time.perf_counter() - began >= seconds:
            break
    return rows, rows / (time.perf_counter() - began)


def random_rows(manifest: Manifest) -> dict[str, Tensor]:
    """Fields of a part; bytes that no store can compress."""
    generator = torch.Generator().manual_seed(0)
    rows = len(manifest.rows_of(0))
    fields: dict[str, Tensor] = {}
    for name, (dtype, shape) in manifest.fields().items():
        width = dtype.itemsize * torch.Size(shape).numel()
        noise = torch.randint(0, 256, (rows, width), dtype=torch.uint8, generator=generator)
        fields[name] = noise.view(dtype).reshape(rows, *shape)
    return fields | {"valid": torch.ones(rows, dtype=torch.uint8)}


def read_for(
    folder: Path, manifest: Manifest, rows: NDArray[np.int64], micro_batch: int, seconds: float
) -> float:
    """Rows a second that a reader gives, each asked for once, for at most some seconds.

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
                waiting.append(plan_of(batch))
                reader.submit(waiting[-1])
            if not waiting:
                break
            found = reader.collect(waiting.popleft())
            fault = next(filter(None, found.faults), None)
            if fault is not None:
                raise CacheError(f"cache.dir={folder}: a row that was just written: {fault}")
            done += len(found.numbers)
            if time.perf_counter() - began >= seconds:
                break
        return done / (time.perf_counter() - began)
    finally:
        reader.close()


def plan_of(rows: NDArray[np.int64]) -> Plan:
    """A plan that asks a cache of one view an image for rows."""
    boxes = np.zeros((len(rows), 4), dtype=np.int32)
    return Plan(rows, rows, np.zeros_like(rows), boxes, np.zeros(len(rows), dtype=np.bool_))
