"""Decode, crop and resize views with DALI, on the GPU, or on the CPU without a GPU.

The graph: full decode, slice, bicubic resize with antialiasing, flip, uint8. On a CPU it ends with
the slice and torch resizes, ten times faster than DALI does there. The graph returns pixels as
stored; torch turns them upright where the index records an orientation. Position, sample and box of
each view pass through the graph beside the pixels, so that a mismatch is detected. A decode error
ends a graph; the images that cannot be decoded are then found one by one and replaced, and a new
graph continues with the same micro-batch. Threads read the bytes, or worker processes, which do not
occupy the interpreter of this process.
"""

import io
import logging
import re
import weakref
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any

import numpy as np
import nvidia.dali as library
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dataloading.errors import ReadError
from dataloading.headers import is_common
from dataloading.plan import Plan
from dataloading.pool import WorkerPool
from dataloading.reading import GREY, LOOK_AHEAD, Reader, UndecodableError, Views, start_threads
from dataloading.torch_decode import crop_and_resize, find_codec, make_decode, make_fast
from dataloading.turns import Box, turn_pixels

logger = logging.getLogger(__name__)

dali: Any = library  # its types do not fit its functions

Bytes = NDArray[np.uint8]

_AHEAD = 2  # micro-batches in the graph
_STOCK_BOX = (0, 0, 16, 16)


def encode(image: Image.Image, form: str) -> Bytes:
    """Encode an image to bytes, ``[n]``."""
    buffer = io.BytesIO()
    image.save(buffer, form)
    return np.frombuffer(buffer.getvalue(), dtype=np.uint8)


@dataclass
class _Encoded:
    """Input of the graph for one view. The graph requests inputs ahead, so errors are kept here."""

    data: Bytes
    box: Box
    orientation: int = 1
    fault: str | None = None
    failure: ReadError | None = None


@dataclass
class _Work:
    """One micro-batch in preparation."""

    plan: Plan
    views: list["Future[_Encoded] | _Encoded"]
    """Futures of reading threads, or results; empty while worker processes read them."""

    def encoded(self) -> list[_Encoded]:
        return [view.result() if isinstance(view, Future) else view for view in self.views]

    def facts(self) -> NDArray[np.int64]:
        """Return position, sample and box of each view, ``[B, 6]``."""
        plan = self.plan
        return np.column_stack([plan.positions, plan.ids, plan.boxes]).astype(np.int64)


def turn_views(
    images: tuple[Tensor, ...], views: Sequence[_Encoded], flips: NDArray[np.bool_]
) -> None:
    """Turn and flip, in place, the views of images that are stored turned.

    ``images`` are ``[B, S, S, 3]``, one for each size.
    """
    for place, view in enumerate(views):
        if view.orientation > 1:
            for image in images:
                turned = turn_pixels(image[place].permute(2, 0, 1), view.orientation)
                turned = turned.flip(2) if flips[place] else turned
                image[place] = turned.permute(1, 2, 0).clone()


class DaliDecoder:
    """Threads or worker processes read, one DALI graph decodes.

    Args:
        reader: source of the bytes; closed with this object.
        sizes: sides of the images.
        micro_batch: views in every plan.
        threads: reading threads, and as many of DALI's own.
        workers: processes that read in place of the threads, closed with this object.
        device: a GPU, which then decodes and holds the views, or the CPU.
        resize: whether the graph resizes; ``None``: on a GPU.
    """

    ahead = LOOK_AHEAD

    def __init__(
        self,
        reader: Reader,
        sizes: tuple[int, ...],
        micro_batch: int,
        threads: int,
        device: torch.device,
        workers: WorkerPool | None = None,
        resize: bool | None = None,
    ) -> None:
        self._reader = reader
        self._workers = workers
        self._sizes = sizes
        self._micro_batch = micro_batch
        self._threads = threads
        self._device = device
        self._resize = device.type == "cuda" if resize is None else resize
        codec = find_codec()
        self._try = make_fast(codec)
        self._decode = make_decode(codec)
        self._stock = encode(Image.new("RGB", _STOCK_BOX[2:], (GREY, GREY, GREY)), "BMP")
        self._redrawn: set[int] = set()  # samples that DALI refuses and another decoder reads
        self._bad: dict[int, str] = {}
        # Input of DALI where no micro-batch is submitted.
        none, boxes = np.full(micro_batch, -1), np.full((micro_batch, 4), -1, np.int32)
        plan = Plan(none, none, none, boxes, np.zeros(micro_batch, np.bool_))
        self._filler = _Work(plan, [_Encoded(self._stock, _STOCK_BOX)] * micro_batch)
        self._works: deque[_Work] = deque()
        self._given = 0  # number of works that the graph has taken
        self._pool = start_threads(threads)
        self._graph: Any = self._build()

    def submit(self, plan: Plan) -> None:
        if self._workers is not None:
            self._workers.submit(plan)
            self._works.append(_Work(plan, []))
            return
        self._reader.prefetch(plan.ids.tolist())
        rows = zip(plan.ids.tolist(), plan.boxes.tolist(), strict=True)
        self._works.append(_Work(plan, [self._pool.submit(self._fetch, *row) for row in rows]))

    def collect(self) -> Views:
        # On a GPU the hand-over is ordered on torch's stream: the views are ready for what is
        # launched there next, and their memory is not used again before that is done.
        on_gpu = self._device.type == "cuda"
        stream = torch.cuda.current_stream(self._device) if on_gpu else None
        work = self._works[0]
        outputs, facts = self._run(stream)
        self._works.popleft()
        self._given -= 1
        if not np.array_equal(facts, work.facts()):
            raise RuntimeError("the DALI graph returned other views than given; please report this")
        views = work.encoded()
        for view in views:
            if view.failure is not None:
                raise view.failure
        if self._resize:
            images = tuple(torch.from_dlpack(one.as_tensor()) for one in outputs)
            turn_views(images, views, work.plan.flips)
        else:
            images = self._resize_crops(views, *outputs)
        return Views(images, [view.fault for view in views])

    def _run(self, stream: torch.cuda.Stream | None) -> tuple[list[Any], NDArray[np.int64]]:
        """Run the graph until it returns a micro-batch that was submitted; drop fillers before it.

        Returns:
            Outputs of the graph, and the facts among them.

        Raises:
            RuntimeError: as ``_recover``.
        """
        while True:
            try:
                *outputs, last = self._graph.run(stream)
            except RuntimeError as error:
                self._recover(error)
                continue
            facts = np.array(last.as_tensor())
            if not np.array_equal(facts, self._filler.facts()):
                return outputs, facts

    def _resize_crops(self, views: list[_Encoded], crops: Any, flip: Any) -> tuple[Tensor, ...]:
        """Resize what the graph has cut, in threads."""
        flips: list[int] = np.asarray(flip.as_tensor()).tolist()
        images = tuple(
            torch.empty(self._micro_batch, size, size, 3, dtype=torch.uint8) for size in self._sizes
        )
        arrays: list[Bytes] = [image.numpy() for image in images]

        def fill(k: int) -> None:
            crop = torch.as_tensor(np.asarray(crops[k])).permute(2, 0, 1)
            box = (0, 0, crop.shape[2], crop.shape[1])
            cut = crop_and_resize(crop, box, self._sizes, bool(flips[k]), views[k].orientation)
            for array, view in zip(arrays, cut, strict=True):
                array[k] = view

        wait(done := [self._pool.submit(fill, k) for k in range(len(flips))])
        for one in done:
            one.result()
        return images

    def hurry(self) -> None:
        """End all reads and waits at once: the views are no longer needed."""
        self._reader.hurry()
        if self._workers is not None:
            self._workers.hurry()

    def close(self) -> None:
        self.hurry()
        if self._workers is not None:
            self._workers.close()
        self._graph = None
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._works.clear()
        self._reader.close()

    def _fetch(self, sample: int, box: list[int]) -> _Encoded:
        """Read one image and prepare it for DALI; runs in a thread."""
        if sample in self._bad:
            return self._grey(self._bad[sample])
        try:
            data = np.frombuffer(self._reader.read(sample), dtype=np.uint8)
        except UndecodableError as error:
            return self._grey(str(error))
        except ReadError as error:
            return _Encoded(self._stock, _STOCK_BOX, failure=error)
        return self._fit(sample, box, data)

    def _take(self, work: _Work, workers: WorkerPool) -> None:
        """Wait until worker processes have read a micro-batch, and prepare it for DALI."""
        try:
            slot, faults = workers.collect()
        except ReadError as error:
            stock = _Encoded(self._stock, _STOCK_BOX, failure=error)
            work.views = [stock] * len(work.plan.ids)
            return
        alive = weakref.ref(work)
        slot.in_use = lambda: alive() is not None
        starts = slot.encoded_starts().tolist()
        rows = zip(work.plan.ids.tolist(), work.plan.boxes.tolist(), faults, strict=True)
        work.views = [
            self._fit(sample, box, slot.encoded[starts[k] : starts[k + 1]])
            if fault is None
            else self._grey(fault)
            for k, (sample, box, fault) in enumerate(rows)
        ]

    def _fit(self, sample: int, box: list[int], data: Bytes) -> _Encoded:
        """Decode an image that DALI does not decode, and return its box as stored."""
        if sample in self._bad:
            return self._grey(self._bad[sample])
        if sample in self._redrawn or not is_common(data[:8].tobytes()):
            try:
                pixels = self._decode(data.tobytes()).permute(1, 2, 0).numpy()
            except UndecodableError as error:
                return self._grey(str(error))
            data = encode(Image.fromarray(pixels), "BMP")
        return _Encoded(data, *self._reader.stored_box(sample, box))

    def _grey(self, reason: str) -> _Encoded:
        return _Encoded(self._stock, _STOCK_BOX, fault=reason)

    def _build(self) -> Any:
        """Build a new graph, which takes its inputs from ``_next``."""
        self._given = 0
        on_gpu = self._device.type == "cuda"
        gpu = torch.empty(0, device=self._device).get_device() if on_gpu else None
        fn, types = dali.fn, dali.types

        @dali.pipeline_def(
            batch_size=self._micro_batch,
            num_threads=self._threads,
            device_id=gpu,
            prefetch_queue_depth=_AHEAD,
            exec_dynamic=True,  # outputs are never overwritten by later batches
        )
        def graph() -> tuple[Any, ...]:
            data, anchor, shape, flip, facts = fn.external_source(
                source=self._next,
                num_outputs=5,
                dtype=[types.UINT8, types.INT32, types.INT32, types.INT32, types.INT64],
                ndim=[1, 1, 1, 0, 1],
            )
            image = fn.decoders.image(
                data,
                device="mixed" if on_gpu else "cpu",
                output_type=types.RGB,
                adjust_orientation=False,
                jpeg_fancy_upsampling=True,
            )
            # The image is decoded whole, then sliced: whether a file is bad does not depend on the
            # box, and region decoding with nvImageCodec 0.9 is reported to crash on GPUs.
            crop = fn.slice(
                image, anchor, shape, axes=[0, 1], normalized_anchor=False, normalized_shape=False
            )
            if not self._resize:
                return crop, flip, facts
            views = [
                fn.resize(crop, size=[size, size], interp_type=types.INTERP_CUBIC, antialias=True)
                for size in self._sizes
            ]
            return (*(fn.flip(view, horizontal=flip) for view in views), facts)

        built = graph()
        built.build()
        return built

    def _next(self) -> tuple[Any, ...]:
        """Return the inputs of the next micro-batch, or of the filler; DALI calls it from ``run``.

        DALI requests the micro-batch after the one that it returns, even if there is none.
        """
        work = self._filler
        if self._given < len(self._works):
            work = self._works[self._given]
            self._given += 1
        if not work.views and self._workers is not None:
            self._take(work, self._workers)
        views = work.encoded()
        anchors = np.array([(y, x) for x, y, _, _ in (v.box for v in views)], dtype=np.int32)
        shapes = np.array([(h, w) for _, _, w, h in (v.box for v in views)], dtype=np.int32)
        flips = work.plan.flips.astype(np.int32)
        if self._resize:  # a view that is turned afterwards is flipped after the turn
            flips *= np.array([view.orientation == 1 for view in views], dtype=np.int32)
        return [view.data for view in views], anchors, shapes, flips, work.facts()

    def _recover(self, error: RuntimeError) -> None:
        """Replace undecodable images of the oldest micro-batch, and restart it in a new graph.

        Raises:
            RuntimeError: the error itself, if every image of the batch can be decoded.
        """
        work = self._works[0]
        ids: list[int] = work.plan.ids.tolist()
        found = {
            sample
            for sample, view in zip(ids, work.encoded(), strict=True)
            if view.fault is None
            and view.failure is None
            and sample not in self._redrawn
            and self._try(view.data.tobytes()) is None
        }
        named = re.search(r"sample #(\d+)", str(error))
        if not found and named is not None and int(named[1]) < len(ids):
            found = {ids[int(named[1])]} - self._redrawn
        if not found:
            raise error
        self._redrawn |= found
        for one in self._works:
            if one.views:
                one.views = [
                    self._pool.submit(self._fetch, sample, box) if sample in found else view
                    for sample, box, view in zip(
                        one.plan.ids.tolist(), one.plan.boxes.tolist(), one.views, strict=True
                    )
                ]
        for sample, view in zip(ids, work.encoded(), strict=True):
            if sample in found and view.fault is not None:
                self._bad[sample] = view.fault
        text = (
            "DALI could not decode %d of %d images of a micro-batch; they are replaced, and the "
            "graph is built again"
        )
        logger.warning(text, len(found), len(ids))
        self._graph = self._build()
