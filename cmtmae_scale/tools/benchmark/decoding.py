"""Decoders against PIL and torchvision: same files, crops and sizes, in alternating rounds.

CPU time is that of this process and of its worker processes. A training step that is bound by its
host is imitated by a main thread that computes in Python for ``BUSY_S`` of its own CPU time before
it requests each batch. The measure is how long the main thread is held up, by other holders of the
interpreter lock or for lack of a batch: wall time less its CPU time and its wait for a free core.
"""

import io
import os
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torchvision.io import ImageReadMode  # pyright: ignore[reportMissingTypeStubs]
from torchvision.transforms.v2 import functional as tv  # pyright: ignore[reportMissingTypeStubs]

from cmtmae_scale.errors import ConfigError
from cmtmae_scale.tools.benchmark.clock import Spread
from cmtmae_scale.tools.benchmark.table import markdown_table
from dataloading.index import Index, build_index
from dataloading.order import sample_ids
from dataloading.sources import Source
from dataloading.stream import DecoderName, Stream, WorkerType, has_dali
from dataloading.views import crop_boxes

SEED, SCALE, RATIO, BATCH = 0, (0.2, 1.0), (3 / 4, 4 / 3), 64
WARM_UP = 2
"""Rounds before the measurement."""
SETTLED_S = 0.05
"""Time without CPU use after which threads count as idle."""
BUSY_S = 0.25
"""CPU time of the main thread's own work in a host-bound step."""
BUSY_STEPS = 4
"""Host-bound steps per round, of which the median is taken."""


@dataclass
class DecoderRate:
    """Rate of one decoder, from bytes to uint8 views."""

    name: str
    per_core_s: Spread
    """Images per CPU-second of this process and its workers."""
    here_ms: Spread
    """CPU-milliseconds of this process alone per image."""
    held_up_ms: Spread | None
    """Milliseconds in which the main thread is held up in a host-bound step of ``BATCH`` images;
    ``None``: the decoder is a loop of the main thread itself."""
    per_s: Spread
    """Images per second."""
    of_pil: Spread
    """Images per CPU-second, relative to PIL in the same round."""


class ViewSource(Protocol):
    """Makes the views of a sequence, some batches per call."""

    ahead: int
    """Batches that may be finished before they are requested."""

    def __call__(self, batches: int) -> None:
        """Make the next batches."""
        ...


class Used(NamedTuple):
    """Times of a decoder in one round."""

    cpu_s: float
    """Per batch, of this process and its workers."""
    here_s: float
    """Per batch, of this process."""
    wall_s: float
    """Per batch."""
    held_up_s: float | None
    """In a host-bound step."""


def compare_decoders(
    path: str,
    size: int,
    images: int,
    rounds: int,
    threads: int,
    device: torch.device,
    worker_types: Sequence[WorkerType] = ("thread", "process"),
) -> list[DecoderRate]:
    """Measure all decoders in alternating rounds of ``images`` views, ``size`` pixels wide.

    Threads (or processes) and device are those of our own decoders; PIL and torchvision use one
    thread.

    Raises:
        ConfigError: numbers below 1.
        DataError: no images at the path.
    """
    if min(size, images, rounds, threads) < 1:
        raise ConfigError("--size, --images, --rounds and --threads must be at least 1")
    index = build_index(path, exif_orientation=False)  # PIL and torchvision do not apply it
    batches = -(-images // BATCH)
    with ExitStack() as stack:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        stack.callback(torch.set_num_threads, before)
        sources: dict[str, ViewSource] = {
            "PIL": SequentialViews(index, partial(pil_view, size=size)),
            "torchvision": SequentialViews(index, partial(torchvision_view, size=size)),
        }
        ours: dict[str, DecoderName] = {"ours, torch": "torch"}
        if has_dali():
            ours[f"ours, DALI on {device.type}"] = "dali"
        for worker_type, (label, name) in product(worker_types, ours.items()):
            stream = Stream(
                index,
                seed=SEED,
                micro_batch=BATCH,
                sizes=(size,),
                scale=SCALE,
                ratio=RATIO,
                threads=threads,
                worker_type=worker_type,
                decode=name,
                device=device,
            )
            workers = "" if worker_type == "thread" else ", processes"
            sources[f"{label}{workers}"] = StreamViews(stack.enter_context(stream), device)
        times: dict[str, list[Used]] = {name: [] for name in sources}
        for source in sources.values():
            source(1)  # all worker processes have started
        workers = find_children(os.getpid())
        for number in range(rounds + WARM_UP):
            for name, source in sources.items():
                batch_times = time_batches(source, batches, workers)
                if number >= WARM_UP:
                    times[name].append(batch_times)
    return [summarise_decoder(name, seen, times["PIL"]) for name, seen in times.items()]


class SequentialViews:
    """Makes one view after another with a function, as a plain data set does."""

    ahead = 0

    def __init__(self, index: Index, make: Callable[[bytes, list[int], bool], object]) -> None:
        self.index = index
        self.source: Source = index.open()
        self.make = make
        self.position = 0

    def __call__(self, batches: int) -> None:
        """Make the next views."""
        positions = self.position + np.arange(batches * BATCH, dtype=np.int64)
        self.position += len(positions)
        ids, epochs = sample_ids(len(self.index), SEED, positions)
        rows = self.index.entries[ids]
        boxes, flips = crop_boxes(SEED, ids, epochs, rows["width"], rows["height"], SCALE, RATIO)
        for sample, box, flip in zip(ids.tolist(), boxes.tolist(), flips.tolist(), strict=True):
            self.make(self.source.read(sample), box, flip)


class StreamViews:
    """Takes batches of a stream."""

    def __init__(self, stream: Stream, device: torch.device) -> None:
        self.stream = stream
        self.ahead = 1 + stream.ahead
        self.device = device

    def __call__(self, batches: int) -> None:
        """Take the next batches."""
        for _ in range(batches):
            next(self.stream)
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def pil_view(data: bytes, box: list[int], flip: bool, *, size: int) -> object:
    """Decode, crop, resize and mirror with Pillow."""
    x, y, w, h = box
    with Image.open(io.BytesIO(data)) as image:
        view = image.convert("RGB").crop((x, y, x + w, y + h))
    view = view.resize((size, size), Image.Resampling.BICUBIC)
    return np.array(view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else view)


def torchvision_view(data: bytes, box: list[int], flip: bool, *, size: int) -> object:
    """Decode with torchvision.io, then its transforms on the tensor."""
    x, y, w, h = box
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    image = torch.ops.image.decode_image(encoded, ImageReadMode.RGB.value, False)
    view = tv.resized_crop(image, y, x, h, w, [size, size], tv.InterpolationMode.BICUBIC, True)
    return tv.horizontal_flip(view) if flip else view


def time_batches(source: ViewSource, batches: int, workers: Sequence[int]) -> Used:
    """Return times without batches that were finished ahead of the clock.

    Args:
        source: source of the batches.
        batches: batches per measurement.
        workers: processes whose CPU time counts.
    """
    wait_until_idle(workers)
    used, here = cpu_time(workers), time.process_time()
    source(source.ahead)
    wall = time.perf_counter()
    source(batches)
    wall = time.perf_counter() - wall
    steps = BUSY_STEPS if source.ahead else 0
    held_up = time_held_up(source, steps) if steps else None
    wait_until_idle(workers)
    number, own = batches + source.ahead + steps, BUSY_S * steps
    used, here = cpu_time(workers) - used - own, time.process_time() - here - own
    return Used(used / number, here / number, wall / batches, held_up)


def time_held_up(source: ViewSource, steps: int) -> float:
    """Return seconds per host-bound step in which the main thread is held up; no batch is ahead."""
    held_up: list[float] = []
    for _ in range(steps):
        began, active = time.perf_counter(), time_active()
        own = time.thread_time()
        while time.thread_time() - own < BUSY_S:
            pass
        source(1)
        held_up.append(time.perf_counter() - began - (time_active() - active))
    return statistics.median(held_up)


def time_active() -> float:
    """Return seconds in which this thread has run or waited for a free core."""
    path = Path(f"/proc/self/task/{threading.get_native_id()}/schedstat")
    return sum(map(int, path.read_text().split()[:2])) / 1e9


def cpu_time(workers: Sequence[int]) -> float:
    """Return CPU-seconds of this process and of workers, by the scheduler."""
    return time.process_time() + sum(map(task_time, workers))


def task_time(pid: int) -> float:
    """Return CPU-seconds of all threads of a process; 0 once it has ended."""
    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
        return sum(int((one / "schedstat").read_text().split()[0]) for one in threads) / 1e9
    except OSError:
        return 0.0


def find_children(pid: int) -> list[int]:
    """Return all descendants of a process."""
    try:
        listed = [path.read_text().split() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    except OSError:
        return []
    found = [int(child) for one in listed for child in one]
    return [*found, *(below for child in found for below in find_children(child))]


def wait_until_idle(workers: Sequence[int]) -> None:
    """Wait until all threads of this process and of workers are idle."""
    while True:
        before = cpu_time(workers)
        time.sleep(SETTLED_S)
        if cpu_time(workers) - before < SETTLED_S / 5:
            return


def summarise_decoder(name: str, seen: Sequence[Used], pil: Sequence[Used]) -> DecoderRate:
    """Return rates from times per batch."""
    held_up = [1000 * one.held_up_s for one in seen if one.held_up_s is not None]
    return DecoderRate(
        name,
        Spread.of([BATCH / one.cpu_s for one in seen]),
        Spread.of([1000 * one.here_s / BATCH for one in seen]),
        Spread.of(held_up) if held_up else None,
        Spread.of([BATCH / one.wall_s for one in seen]),
        Spread.of([other.cpu_s / one.cpu_s for one, other in zip(seen, pil, strict=True)]),
    )


def decoders_table(results: Sequence[DecoderRate]) -> str:
    """Return a Markdown table."""
    header = [
        "decoder",
        "images per CPU-second",
        "of PIL's",
        "images per second",
        "CPU-ms of this process per image",
        f"host-bound main thread held up, ms per {1000 * BUSY_S:.0f} of work and {BATCH} images",
    ]
    rows = [
        [
            *(r.name, str(r.per_core_s), str(r.of_pil), str(r.per_s), str(r.here_ms)),
            "-" if r.held_up_ms is None else str(r.held_up_ms),
        ]
        for r in results
    ]
    return markdown_table(header, rows)
