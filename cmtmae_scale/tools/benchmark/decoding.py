"""Decoders against PIL and torchvision: same files, same boxes, same sizes, taking turns."""

import io
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torchvision.io import ImageReadMode  # pyright: ignore[reportMissingTypeStubs]
from torchvision.transforms.v2 import functional as tv  # pyright: ignore[reportMissingTypeStubs]

from cmtmae_scale.errors import ConfigError
from cmtmae_scale.tools.benchmark.clock import Spread, spread
from cmtmae_scale.tools.benchmark.table import markdown
from dataloading.index import Index, build_index
from dataloading.order import sample_ids
from dataloading.sources import Source
from dataloading.stream import LOOK_AHEAD, DecoderName, Stream, has_dali
from dataloading.views import crop_boxes

SEED, SCALE, RATIO, BATCH = 0, (0.2, 1.0), (3 / 4, 4 / 3), 64
WARM_UP = 2
"""Rounds in which allocators settle."""
SETTLED_S = 0.05
"""Threads that used no CPU time for so long are idle."""


@dataclass
class Result:
    """Rate of one decoder, from bytes to uint8 views."""

    name: str
    per_core_s: Spread
    """Images a CPU-second of this process."""
    per_s: Spread
    """Images a second."""
    of_pil: Spread
    """Images a CPU-second, divided by PIL's in the same round."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        named = ("per_core_s", "per_s", "of_pil")
        return asdict(self) | {name: getattr(self, name)._asdict() for name in named}


class Contender(Protocol):
    """Makes the views of a sequence, some batches at a call."""

    ahead: int
    """Batches that it may have finished before they are asked for."""

    def __call__(self, batches: int) -> None:
        """Make the next batches."""
        ...


def measure(
    path: str, size: int, images: int, rounds: int, threads: int, device: torch.device
) -> list[Result]:
    """Run all decoders in turn, after two rounds that do not count.

    Args:
        path: folder of images or of tars.
        size: side of the views, pixels.
        images: views a round.
        rounds: rounds of which the median counts.
        threads: decoder threads of our own decoders; PIL and torchvision use one.
        device: where our decoders put the views; a GPU decodes itself with DALI.

    Raises:
        ConfigError: numbers below 1.
        DataError: no images there.
    """
    if min(size, images, rounds, threads) < 1:
        raise ConfigError("--size, --images, --rounds and --threads must be at least 1")
    index = build_index(path)
    batches = -(-images // BATCH)
    with ExitStack() as stack:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        stack.callback(torch.set_num_threads, before)
        contenders: dict[str, Contender] = {
            "PIL": Plain(index, partial(with_pil, size=size)),
            "torchvision": Plain(index, partial(with_torchvision, size=size)),
        }
        for label, name in decoders(device).items():
            stream = Stream(
                index,
                seed=SEED,
                micro_batch=BATCH,
                sizes=(size,),
                scale=SCALE,
                ratio=RATIO,
                threads=threads,
                decode=name,
                device=device,
            )
            contenders[label] = Drawn(stack.enter_context(stream), device)
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
        for number in range(rounds + WARM_UP):
            for name, contender in contenders.items():
                used = time_round(contender, batches)
                if number >= WARM_UP:
                    taken[name].append(used)
    return [summarise(name, seen, taken["PIL"]) for name, seen in taken.items()]


def decoders(device: torch.device) -> dict[str, DecoderName]:
    """Our decoders that are installed, by label."""
    found: dict[str, DecoderName] = {"ours, torch": "torch"}
    if has_dali():
        found[f"ours, DALI on {device.type}"] = "dali"
    return found


class Plain:
    """One view after the other by a function, as a data set without our code would."""

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


class Drawn:
    """Batches of a stream."""

    ahead = 1 + LOOK_AHEAD

    def __init__(self, stream: Stream, device: torch.device) -> None:
        self.stream = stream
        self.device = device

    def __call__(self, batches: int) -> None:
        """Draw the next batches."""
        for _ in range(batches):
            next(self.stream)
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def with_pil(data: bytes, box: list[int], flip: bool, *, size: int) -> object:
    """Decode, crop, resize and mirror with Pillow."""
    x, y, w, h = box
    with Image.open(io.BytesIO(data)) as image:
        view = image.convert("RGB").crop((x, y, x + w, y + h))
    view = view.resize((size, size), Image.Resampling.BICUBIC)
    return np.array(view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else view)


def with_torchvision(data: bytes, box: list[int], flip: bool, *, size: int) -> object:
    """Decode with torchvision.io, then its transforms on the tensor."""
    x, y, w, h = box
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    picture = torch.ops.image.decode_image(encoded, ImageReadMode.RGB.value, False)
    view = tv.resized_crop(picture, y, x, h, w, [size, size], tv.InterpolationMode.BICUBIC, True)
    return tv.horizontal_flip(view) if flip else view


def time_round(contender: Contender, batches: int) -> tuple[float, float]:
    """CPU-seconds and seconds of a batch; what was made ahead of the clock is not counted."""
    settle()
    used = time.process_time()
    contender(contender.ahead)
    wall = time.perf_counter()
    contender(batches)
    wall = time.perf_counter() - wall
    settle()
    return (time.process_time() - used) / (batches + contender.ahead), wall / batches


def settle() -> None:
    """Wait until no thread of this process works."""
    while True:
        before = time.process_time()
        time.sleep(SETTLED_S)
        if time.process_time() - before < SETTLED_S / 10:
            return


def summarise(
    name: str,
    seen: Sequence[tuple[float, float]],
    pil: Sequence[tuple[float, float]],
) -> Result:
    """Rates from times of a batch."""
    return Result(
        name,
        spread([BATCH / used for used, _ in seen]),
        spread([BATCH / wall for _, wall in seen]),
        spread([other / used for (used, _), (other, _) in zip(seen, pil, strict=True)]),
    )


def describe(results: Sequence[Result]) -> str:
    """Markdown table."""
    header = ["decoder", "images a CPU-second", "of PIL's", "images a second"]
    rows = [[r.name, str(r.per_core_s), str(r.of_pil), str(r.per_s)] for r in results]
    return markdown(header, rows)
