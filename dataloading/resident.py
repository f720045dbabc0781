"""Keep small images decoded on the device, and crop them there.

For images of 32 or 64 pixels, reading and decoding cost more than cropping, and a whole set fits
into memory. Order, boxes and flips are the plan's, as with every decoder. A CPU resizes with
``crop_and_resize``: the same pixels as ``TorchDecoder``. A GPU resizes a batch by two matrix
products, along rows and then along columns, with the weights of Pillow's bicubic filter and its
rounding to eight bits after each. torch on a CPU rounds these weights to fixed point: about one
pixel in several hundred differs, by one level, rarely by two.

Legend: B views, S their side, L the longest side of an image of the set.
"""

import logging
from collections import deque
from concurrent.futures import wait

import numpy as np
import torch
from torch import Tensor

from dataloading.errors import DataError
from dataloading.index import Index
from dataloading.plan import Plan
from dataloading.reading import (
    GREY,
    LOOK_AHEAD,
    Reader,
    UndecodableError,
    Views,
    start_threads,
    to_device,
)
from dataloading.torch_decode import crop_and_resize, find_codec, make_decode
from dataloading.turns import turn_pixels
from dataloading.views import Boxes, Flips

logger = logging.getLogger(__name__)

_PREFETCHED = 64  # samples per thread
MOST_BYTES = 8 << 30
"""Most that is kept, in bytes per process."""


class ResidentDecoder:
    """Decodes every image once, at the first batch, and keeps it on the device.

    Args:
        index: the samples; all are kept, in squares of the longest side.
        reader: source of the bytes; closed with this object.
        sizes: sides of the views.
        threads: threads that decode.
        device: where images stay and views are cut.

    Raises:
        DataError: if the set is too large to be kept.
    """

    ahead = LOOK_AHEAD

    def __init__(
        self,
        index: Index,
        reader: Reader,
        sizes: tuple[int, ...],
        threads: int,
        device: torch.device,
    ) -> None:
        self._side = int(max(index.entries["width"].max(), index.entries["height"].max()))
        needed = (3 * len(index) + 4 * sum(sizes)) * self._side**2
        if needed > MOST_BYTES:
            raise DataError(
                f"data.resident=true would keep {needed / 2**30:.1f} GiB per process "
                f"({len(index)} images in squares of {self._side}), more than "
                f"{MOST_BYTES >> 30}; set data.resident=false"
            )
        self._count = len(index)
        self._reader = reader
        self._threads = threads
        self._device = device
        self._sizes = sizes
        on_cpu = device.type == "cpu"
        self._weights = [] if on_cpu else [filter_weights(s, self._side).to(device) for s in sizes]
        self._images: Tensor | None = None
        self._faults: dict[int, str] = {}
        self._pending: deque[Plan] = deque()

    def submit(self, plan: Plan) -> None:
        self._pending.append(plan)

    def collect(self) -> Views:
        plan = self._pending.popleft()
        if self._images is None:
            self._images = self._load()
        faults = [self._faults.get(sample) for sample in plan.ids.tolist()]
        chosen = self._images[to_device(torch.as_tensor(plan.ids), self._device)]
        if self._device.type == "cpu":
            return Views(cut_each(chosen, plan.boxes, plan.flips, self._sizes), faults)
        images = tuple(cut(chosen, plan.boxes, plan.flips, one) for one in self._weights)
        return Views(images, faults)

    def close(self) -> None:
        self._pending.clear()
        self._images = None
        self._reader.hurry()
        self._reader.close()

    def _load(self) -> Tensor:
        """Read and decode all images, uint8 ``[n, 3, L, L]`` on the device.

        Raises:
            ReadError: storage did not return an image; nothing is kept.
        """
        shape = (self._count, 3, self._side, self._side)
        images = torch.full(shape, GREY, dtype=torch.uint8)
        decode = make_decode(find_codec())
        self._faults.clear()

        def fill(samples: range) -> None:
            for place, sample in enumerate(samples):
                if place % _PREFETCHED == 0:
                    self._reader.prefetch(samples[place : place + _PREFETCHED])
                try:
                    image = decode(self._reader.read(sample))
                except UndecodableError as error:
                    self._faults[sample] = str(error)
                    continue
                image = turn_pixels(image, self._reader.orientation(sample))
                images[sample, :, : image.shape[1], : image.shape[2]] = image

        with start_threads(self._threads) as pool:
            shares = [range(k, self._count, self._threads) for k in range(self._threads)]
            filled = [pool.submit(fill, share) for share in shares]
            wait(filled)
            for one in filled:
                one.result()
        size = images.numel() / 2**20
        logger.info("%d images stay decoded on %s, %.0f MiB", self._count, self._device, size)
        return images.to(self._device)


def cut_each(
    images: Tensor, boxes: Boxes, flips: Flips, sizes: tuple[int, ...]
) -> tuple[Tensor, ...]:
    """As ``cut``, one view after another, on the CPU and to several sizes."""
    rows = zip(images, boxes.tolist(), flips.tolist(), strict=True)
    views = [crop_and_resize(image, box, sizes, flip) for image, box, flip in rows]
    return tuple(torch.as_tensor(np.stack(one)) for one in zip(*views, strict=True))


def cut(images: Tensor, boxes: Boxes, flips: Flips, weights: Tensor) -> Tensor:
    """Cut boxes and resize them to squares: bicubic with antialiasing, borders those of the box.

    Args:
        images: uint8 ``[B, 3, L, L]``.
        boxes: x, y, w, h in pixels, within the images, ``[B, 4]``.
        flips: flip horizontally, bool ``[B]``.
        weights: ``filter_weights`` of the size, on the device of the images.

    Returns:
        uint8 ``[B, S, S, 3]``, on that device.
    """
    device = images.device
    x, y, w, h = to_device(torch.as_tensor(boxes.T.astype(np.int64)), device)
    mirrored = to_device(torch.as_tensor(flips), device)
    side = torch.arange(images.shape[-1], device=device)
    column, row = side - x[:, None], side - y[:, None]  # within the box, [B, L]
    column = torch.where(mirrored[:, None], w[:, None] - 1 - column, column)
    across, down = (
        weights[length - 1, torch.where((place >= 0) & (place < length), place, len(side))]
        for place, length in ((column, w[:, None]), (row, h[:, None]))
    )  # [B, L, S]
    wide = to_levels(images.float() @ across[:, None])  # [B, 3, L, S]
    return to_levels(down.mT[:, None] @ wide).byte().permute(0, 2, 3, 1).contiguous()


def to_levels(values: Tensor) -> Tensor:
    """Round to the levels of eight bits, halves up."""
    return (values + 0.5).floor_().clamp_(0, 255)


def filter_weights(size: int, side: int) -> Tensor:
    """Return the weight of each pixel of a line in each pixel of the resized line, for all lengths.

    Args:
        size: S, pixels after resizing.
        side: L, the longest line.

    Returns:
        float32 ``[L, L + 1, S]``: ``[k, :, s]`` has sum 1 over the k + 1 pixels of the line; what
        is outside of it has weight 0, the last place for every k.

    Source: Pillow ``Resample.c``: Keys' cubic with a = -0.5, stretched where it shrinks.
    """
    length = torch.arange(1, side + 1, dtype=torch.float64)[:, None, None]
    place = torch.arange(side + 1)[None, :, None]
    scale = length / size
    centre = (torch.arange(size) + 0.5) * scale  # [L, 1, S]
    x = ((place + 0.5 - centre) / scale.clamp(min=1)).abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = torch.where(x < 1, near, torch.where(x < 2, far, 0.0)) * (place < length)
    return (weights / weights.sum(1, keepdim=True)).float()
