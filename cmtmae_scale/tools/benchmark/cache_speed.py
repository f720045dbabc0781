"""Rows of a cache, read and decoded, against the live teacher: all take turns."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from cmtmae_scale.cache.build import Builder
from cmtmae_scale.cache.codecs import Codec
from cmtmae_scale.cache.format import Manifest, shard_path
from cmtmae_scale.cache.teacher import CachedTeacher
from cmtmae_scale.errors import CacheError
from cmtmae_scale.runtime.storage import drop_from_memory
from cmtmae_scale.teachers.online import OnlineTeacher
from cmtmae_scale.tools.benchmark.clock import Spread, spread
from cmtmae_scale.tools.benchmark.table import markdown
from dataloading.plan import Plan
from dataloading.stream import LOOK_AHEAD

T = TypeVar("T")
LIVE = "live teacher"
WARM_UP = 1
"""Rounds that do not count."""
CLOCK_S = 1e-6
"""The least CPU time that is told from none."""


@dataclass
class Speed:
    """Of one way to a teacher's view."""

    name: str
    row_bytes: int
    """Read from storage for a view."""
    per_s: Spread
    """Views a second."""
    per_core_s: Spread
    """Views a CPU-second of this process."""
    of_live: Spread
    """Views a second, divided by the live teacher's in the same round."""
    of_live_core: Spread
    """The same of CPU-seconds."""


class Cached(NamedTuple):
    """A cache that was built."""

    codec: Codec
    folder: Path
    manifest: Manifest
    teacher: CachedTeacher

    def drop(self) -> list[float | None]:
        """Forget its pages; see ``drop_from_memory``."""
        shards = range(self.manifest.num_shards)
        return [drop_from_memory(shard_path(self.folder, shard)) for shard in shards]


def measure(
    builder: Builder, caches: Sequence[Cached], rows: int, rounds: int
) -> tuple[list[Speed], float | None]:
    """Read from storage, read from memory, decode and look live, one after the other, repeatedly.

    Args:
        builder: of the caches; its teacher is the live one.
        caches: whole ones.
        rows: views a round, at random; no more than there are.
        rounds: rounds that count.

    Returns:
        The speeds, live last, and the largest share of a shard that could not be dropped.
    """
    device, side = builder.device, builder.teacher.image_size
    size = builder.config.train.micro_batch_size
    pictures = torch.zeros((size, side, side, 3), dtype=torch.uint8, device=device)
    batches = -(-rows // size)
    generator = np.random.default_rng(0)
    taken: dict[str, list[Taken]] = {}
    row_bytes: dict[str, int] = {}
    kept: list[float | None] = []
    for _ in range(WARM_UP + rounds):
        for cache in caches:
            chosen = generator.permutation(cache.manifest.num_rows)[:rows]
            plans = [builder.plan_rows(some) for some in builder.split_rows(chosen)]
            kept += cache.drop()
            for place in ("storage", "memory"):
                name = f"read {cache.codec} from {place}"
                row_bytes[name] = cache.manifest.row_bytes()
                fields, used = timed(partial(read, cache, plans), len(chosen), device)
                taken.setdefault(name, []).append(used)
            _, used = timed(partial(decode, cache, fields), len(chosen), device)
            taken.setdefault(f"decode {cache.codec}", []).append(used)
        _, used = timed(partial(look, builder.teacher, pictures, batches), batches * size, device)
        taken.setdefault(LIVE, []).append(used)
    counted = {name: seen[WARM_UP:] for name, seen in taken.items()}
    told = [share for share in kept if share is not None]
    speeds = [
        summarise(name, row_bytes.get(name, 0), seen, counted[LIVE])
        for name, seen in counted.items()
    ]
    return speeds, max(told, default=None)


class Taken(NamedTuple):
    """Views a second and views a CPU-second."""

    per_s: float
    per_core_s: float


def timed(work: Callable[[], T], count: int, device: torch.device) -> tuple[T, Taken]:
    """Time some work on so many views; it has ended on the device, and no thread goes on."""
    wall, core = time.perf_counter(), time.process_time()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    wall, core = time.perf_counter() - wall, time.process_time() - core
    return result, Taken(count / wall, count / max(core, CLOCK_S))


def read(cache: Cached, plans: Sequence[Plan]) -> list[dict[str, Tensor]]:
    """Rows of plans as the trainer reads them, some ahead.

    Raises:
        CacheError: if one cannot be used.
    """
    reader, found = cache.teacher.reader, list[dict[str, Tensor]]()
    for at in range(-LOOK_AHEAD, len(plans)):
        if at + LOOK_AHEAD < len(plans):
            reader.submit(plans[at + LOOK_AHEAD])
        if at < 0:
            continue
        rows = reader.collect(plans[at])
        fault = next(filter(None, rows.faults), None)
        if fault is not None:
            raise CacheError(f"{cache.folder}: a row cannot be read: {fault}")
        found.append(rows.fields)
    return found


def decode(cache: Cached, fields: Sequence[dict[str, Tensor]]) -> None:
    """Move rows to the device and make features of them."""
    for one in fields:
        cache.teacher.decode_rows(one)


def look(teacher: OnlineTeacher, pictures: Tensor, batches: int) -> None:
    """Let the teacher look."""
    for _ in range(batches):
        teacher(pictures)


def summarise(name: str, row_bytes: int, seen: list[Taken], live: list[Taken]) -> Speed:
    """Medians over rounds."""
    return Speed(
        name,
        row_bytes,
        spread([one.per_s for one in seen]),
        spread([one.per_core_s for one in seen]),
        spread([one.per_s / other.per_s for one, other in zip(seen, live, strict=True)]),
        spread([one.per_core_s / other.per_core_s for one, other in zip(seen, live, strict=True)]),
    )


def describe(speeds: Sequence[Speed], in_memory: float | None) -> str:
    """Markdown table, and whether reading from storage was that."""
    header = ["way", "bytes a view", "views/s", "views a CPU-s", "of live, views/s"]
    header += ["of live, views a CPU-s"]
    rows = [
        [one.name, f"{one.row_bytes:,}" if one.row_bytes else "-"]
        + [str(each) for each in (one.per_s, one.per_core_s, one.of_live, one.of_live_core)]
        for one in speeds
    ]
    if in_memory is None:
        told = "This file system does not tell whether pages were dropped before reading."
    else:
        told = (
            f"Pages in memory when reading from storage began: at most {in_memory:.0%} of a shard."
        )
    return f"{markdown(header, rows)}\n\n{told}"
