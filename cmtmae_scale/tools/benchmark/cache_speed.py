"""Reading and decoding of cache rows against the online teacher, in alternating rounds."""

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
from cmtmae_scale.tools.benchmark.clock import Spread
from cmtmae_scale.tools.benchmark.table import markdown_table
from dataloading.plan import Plan
from dataloading.stream import LOOK_AHEAD

T = TypeVar("T")
ONLINE = "online teacher"
WARM_UP = 1
"""Rounds before the measurement."""
CLOCK_S = 1e-6
"""Resolution of the CPU clock."""


@dataclass
class ViewRate:
    """Rate of one source of teacher views."""

    name: str
    row_bytes: int
    """Bytes read from storage per view."""
    per_s: Spread
    """Views per second."""
    per_core_s: Spread
    """Views per CPU-second of this process."""
    of_online: Spread
    """Views per second, relative to the online teacher in the same round."""
    of_online_core: Spread
    """Views per CPU-second, relative to the online teacher."""


class BuiltCache(NamedTuple):
    """A cache and its open teacher."""

    codec: Codec
    folder: Path
    manifest: Manifest
    teacher: CachedTeacher

    def drop(self) -> list[float | None]:
        """Drop its pages from memory; see ``drop_from_memory``."""
        shards = range(self.manifest.num_shards)
        return [drop_from_memory(shard_path(self.folder, self.manifest, shard)) for shard in shards]


def measure_views(
    builder: Builder, caches: Sequence[BuiltCache], rows: int, rounds: int
) -> tuple[list[ViewRate], float | None]:
    """Measure reads from storage and memory, decoding, and teacher forwards, in turn.

    A round takes ``rows`` random views of each complete cache, at most the number of its rows.

    Returns:
        The rates, the online teacher last, and the largest fraction of a shard still in memory.
    """
    device, side = builder.device, builder.teacher.image_size
    size = builder.config.train.micro_batch_size
    images = torch.zeros((size, side, side, 3), dtype=torch.uint8, device=device)
    batches = -(-rows // size)
    generator = np.random.default_rng(0)
    rates: dict[str, list[Rate]] = {}
    row_bytes: dict[str, int] = {}
    kept: list[float | None] = []
    forward = partial(run_teacher, builder.teacher, images, batches)
    for _ in range(WARM_UP + rounds):
        for cache in caches:
            chosen = generator.permutation(cache.manifest.num_rows)[:rows]
            plans = [builder.plan_rows(some) for some in builder.split_rows(chosen)]
            kept += cache.drop()
            for place in ("storage", "memory"):
                name = f"read {cache.codec} from {place}"
                row_bytes[name] = cache.manifest.row_bytes()
                fields, rate = time_views(partial(read_rows, cache, plans), len(chosen), device)
                rates.setdefault(name, []).append(rate)
            _, rate = time_views(partial(decode_rows, cache, fields), len(chosen), device)
            rates.setdefault(f"decode {cache.codec}", []).append(rate)
        _, rate = time_views(forward, batches * size, device)
        rates.setdefault(ONLINE, []).append(rate)
    counted = {name: seen[WARM_UP:] for name, seen in rates.items()}
    known = [fraction for fraction in kept if fraction is not None]
    speeds = [
        summarise_views(name, row_bytes.get(name, 0), seen, counted[ONLINE])
        for name, seen in counted.items()
    ]
    return speeds, max(known, default=None)


class Rate(NamedTuple):
    """Views per second and per CPU-second."""

    per_s: float
    per_core_s: float


def time_views(work: Callable[[], T], count: int, device: torch.device) -> tuple[T, Rate]:
    """Time work on ``count`` views, until the device has finished."""
    wall, core = time.perf_counter(), time.process_time()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    wall, core = time.perf_counter() - wall, time.process_time() - core
    return result, Rate(count / wall, count / max(core, CLOCK_S))


def read_rows(cache: BuiltCache, plans: Sequence[Plan]) -> list[dict[str, Tensor]]:
    """Read rows as the trainer does, some micro-batches ahead.

    Raises:
        CacheError: if a row cannot be used.
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


def decode_rows(cache: BuiltCache, fields: Sequence[dict[str, Tensor]]) -> None:
    """Move rows to the device and decode them to features."""
    for one in fields:
        cache.teacher.decode_rows(one)


def run_teacher(teacher: OnlineTeacher, images: Tensor, batches: int) -> None:
    """Run teacher forwards."""
    for _ in range(batches):
        teacher(images)


def summarise_views(name: str, row_bytes: int, seen: list[Rate], online: list[Rate]) -> ViewRate:
    """Return medians over rounds."""
    return ViewRate(
        name,
        row_bytes,
        Spread.of([one.per_s for one in seen]),
        Spread.of([one.per_core_s for one in seen]),
        Spread.of([one.per_s / other.per_s for one, other in zip(seen, online, strict=True)]),
        Spread.of(
            [one.per_core_s / other.per_core_s for one, other in zip(seen, online, strict=True)]
        ),
    )


def views_table(speeds: Sequence[ViewRate], in_memory: float | None) -> str:
    """Return a Markdown table, and whether pages were dropped before reads from storage."""
    header = ["source", "bytes per view", "views/s", "views per CPU-s", "of online, views/s"]
    header += ["of online, views per CPU-s"]
    rows = [
        [one.name, f"{one.row_bytes:,}" if one.row_bytes else "-"]
        + [str(each) for each in (one.per_s, one.per_core_s, one.of_online, one.of_online_core)]
        for one in speeds
    ]
    if in_memory is None:
        note = "This file system does not report whether pages were dropped before reading."
    else:
        note = (
            f"Pages in memory when reading from storage began: at most {in_memory:.0%} of a shard."
        )
    return f"{markdown_table(header, rows)}\n\n{note}"
