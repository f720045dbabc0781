"""Make views on the CPU: decode once, crop once, resize to every size.

torchvision decodes JPEG: nvImageCodec returns the same pixels for intact files, is a tenth slower,
and accepts damage that torchvision refuses, so the choice is fixed, whatever is installed.
nvImageCodec decodes PNG, WebP and BMP where it is installed, else torchvision does. Pillow decodes
what the first decoder refuses, and other formats. On intact RGB and grey JPEG and PNG files all
three return the same pixels. Every decoder returns pixels as stored; crops are turned upright
afterwards, as the index records (``turns.py``). Alpha is dropped; 16 bits are scaled to 8.
"""

import importlib
import importlib.util
import io
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor
from torch.nn.functional import interpolate

from dataloading.headers import PIL_ERRORS, HeaderError, is_common, open_image, size_of_bytes
from dataloading.plan import Plan
from dataloading.reading import (
    GREY,
    LOOK_AHEAD,
    Reader,
    UndecodableError,
    Views,
    lend,
    start_threads,
)
from dataloading.turns import turn_pixels

logger = logging.getLogger(__name__)

Pixels = NDArray[np.uint8]
Size = tuple[int, int]
"""Width and height, pixels."""
Fast = Callable[[bytes], Tensor | None]


class Decode(Protocol):
    """From encoded bytes to uint8 RGB ``[3, height, width]``; see ``make_decode``."""

    def __call__(self, data: bytes, size: Size | None = None) -> Tensor: ...


_BITS, _PHOTOMETRIC, _ORIENTATION, _PLANAR, _SAMPLE_FORMAT = 258, 262, 274, 284, 339  # TIFF tags
_NO_RANGE = (
    "have no range that the file defines; convert the image to unsigned integers of 8 or 16 bits"
)
_UNDO = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
_RGB = 3  # torchvision.io.ImageReadMode.RGB


class ViewMaker:
    """Reads, decodes, crops and resizes one view straight into its place; safe in threads.

    Args:
        reader: source of the bytes.
        sizes: sides of the images.
    """

    def __init__(self, reader: Reader, sizes: tuple[int, ...]) -> None:
        self._reader = reader
        self._sizes = sizes
        self._decode = make_decode(find_codec())

    def __call__(self, sample: int, box: list[int], flip: bool, out: list[Pixels]) -> str | None:
        """Fill ``out``, ``[S, S, 3]`` for each size; returns why they are grey, if they are.

        Raises:
            ReadError: if storage does not return the sample in time.
        """
        try:
            data = self._reader.read(sample)  # its header has this size
            image = self._decode(data, self._reader.stored_size(sample))
        except UndecodableError as error:
            for place in out:
                place[...] = GREY
            return str(error)
        stored, orientation = self._reader.stored_box(sample, box)
        views = crop_and_resize(image, stored, self._sizes, flip, orientation)
        for place, view in zip(out, views, strict=True):
            place[...] = view
        return None


class TorchDecoder:
    """A thread per view: read, decode, crop and resize straight into the batch.

    Args:
        reader: closed with this object.
        sizes: sides of the images.
        threads: each uses one core.
        pin: put the batches into pinned memory.
    """

    ahead = LOOK_AHEAD

    def __init__(self, reader: Reader, sizes: tuple[int, ...], threads: int, pin: bool) -> None:
        self._reader = reader
        self._sizes = sizes
        self._pin = pin
        self._make = ViewMaker(reader, sizes)
        self._pool = start_threads(threads)
        self._pending: deque[tuple[tuple[Tensor, ...], list[Future[str | None]]]] = deque()
        self._buffers: list[tuple[Pixels, Callable[[], bool]]] = []  # memory, whether it is held

    def submit(self, plan: Plan) -> None:
        images = tuple(self._blank((len(plan.ids), size, size, 3)) for size in self._sizes)
        arrays: list[Pixels] = [image.numpy() for image in images]
        self._reader.prefetch(plan.ids.tolist())
        rows = zip(plan.ids.tolist(), plan.boxes.tolist(), plan.flips.tolist(), strict=True)
        faults = [
            self._pool.submit(self._make, *row, [array[k] for array in arrays])
            for k, row in enumerate(rows)
        ]
        self._pending.append((images, faults))

    def _blank(self, shape: tuple[int, ...]) -> Tensor:
        """Return memory of a batch that nothing holds any more, else new memory.

        The page faults of new memory would cost a tenth of the decoding; torch reuses pinned memory
        itself.
        """
        if self._pin:
            return torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        for place, (memory, is_held) in enumerate(self._buffers):
            if memory.shape == shape and not is_held():
                del self._buffers[place]
                break
        else:
            memory = np.empty(shape, dtype=np.uint8)
        image, is_held = lend(memory)
        self._buffers.append((memory, is_held))
        return image

    def collect(self) -> Views:
        images, faults = self._pending.popleft()
        wait(faults)  # wakes this thread once, not at every view
        return Views(images, [fault.result() for fault in faults])

    def close(self) -> None:
        self._reader.hurry()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._pending.clear()
        self._buffers.clear()
        self._reader.close()


def make_decode(codec: ModuleType | None) -> Decode:
    """Join decoders into one.

    Args:
        codec: nvImageCodec, or ``None`` for torchvision; torchvision decodes JPEG in any case.

    Returns:
        A function from encoded bytes, and the size in their header where that is known, to uint8
        RGB ``[3, height, width]``, safe in threads. Pillow tries what the first decoder refuses;
        it raises ``UndecodableError``.
    """
    jpeg, common = _first_decoder(None), _first_decoder(codec)

    def decode(data: bytes, size: Size | None = None) -> Tensor:
        decoder = jpeg if data.startswith(b"\xff\xd8") else common
        image = decoder(data) if is_common(data) else None
        if image is None or not _is_as_announced(image, data, size):
            image = with_pillow(data)
            if not _is_as_announced(image, data, size):
                raise UndecodableError("it is not as large as its header says")
        return image

    return decode


def make_fast(codec: ModuleType | None) -> Fast:
    """Make the first decoder of ``make_decode``; it returns ``None`` for what it cannot decode."""
    decoder = _first_decoder(codec)

    def decode(data: bytes) -> Tensor | None:
        image = decoder(data) if is_common(data) else None
        return image if image is not None and _is_as_announced(image, data, None) else None

    return decode


def _first_decoder(codec: ModuleType | None) -> Fast:
    if codec is not None:
        return NvImageCodec(codec)
    load_operators()
    return with_torchvision


def _is_as_announced(image: Tensor, data: bytes, size: Size | None) -> bool:
    """Return whether an image has the size in its header, by which crops are planned."""
    try:
        return (image.shape[2], image.shape[1]) == (size or size_of_bytes(data))
    except HeaderError:
        return False


def crop_and_resize(
    image: Tensor, box: Sequence[int], sizes: Sequence[int], flip: bool, orientation: int = 1
) -> list[Pixels]:
    """Cut a box and resize it to squares, every one from the same crop.

    Args:
        image: uint8 RGB ``[3, height, width]``, as stored.
        box: x, y, w, h in pixels, within the image.
        sizes: sides of the results.
        flip: flip horizontally, once upright.
        orientation: EXIF orientation by which the crop is turned upright; 1: it is upright.

    Returns:
        For each size a uint8 array ``[size, size, 3]``: bicubic with antialiasing, borders as in
        Pillow's ``crop`` then ``resize``.
    """
    x, y, w, h = box
    crop = turn_pixels(image[None, :, y : y + h, x : x + w], orientation)
    # Decoders return and batches hold channels last; torch flips and resizes it directly.
    crop = crop.contiguous(memory_format=torch.channels_last)
    crop = crop.flip(3) if flip else crop
    views: list[Pixels] = []
    for size in sizes:
        resized = interpolate(crop, (size, size), mode="bicubic", antialias=True)
        views.append(resized[0].permute(1, 2, 0).numpy())
    return views


@lru_cache(maxsize=1)
def load_operators() -> None:
    """Load torchvision's image operators without its Python package.

    The package imports as much again as torch itself, at every start of worker processes.
    """
    spec = importlib.util.find_spec("torchvision")
    folders = [] if spec is None else spec.submodule_search_locations or []
    operators: Any = torch.ops
    for path in (path for folder in folders for path in Path(folder).glob("image*.so")):
        operators.load_library(path)
    if not hasattr(operators.image, "decode_image"):
        importlib.import_module("torchvision.io")


def with_torchvision(data: bytes) -> Tensor | None:
    """Decode with torchvision; ``None`` where it cannot."""
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    try:
        # The operator behind torchvision.io.decode_image, which since 0.29 warns at every call.
        image: Tensor = torch.ops.image.decode_image(encoded, _RGB, False)
    except RuntimeError:  # torchvision's only error for refusal
        return None
    if image.dtype == torch.uint16:
        return ((image.to(torch.int32) * 255 + 32767) // 65535).to(torch.uint8)
    return image if image.ndim == 3 else image[0]


def with_pillow(data: bytes) -> Tensor:
    """Decode with Pillow; raises ``UndecodableError`` with its reason."""
    if not data:
        raise UndecodableError("no bytes")
    try:
        with open_image(io.BytesIO(data)) as image:
            turned = image.tag_v2.get(_ORIENTATION) if isinstance(image, TiffImageFile) else None
            decoded = to_rgb(image)
    except Image.UnidentifiedImageError as error:
        raise UndecodableError("not an image of a known format") from error
    except PIL_ERRORS as error:
        raise UndecodableError(f"cannot be decoded: {error}") from error
    if turned in _UNDO:
        decoded = decoded.transpose(_UNDO[turned])
    return torch.as_tensor(np.array(decoded)).permute(2, 0, 1)


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode to eight bits: alpha is dropped, unsigned integers of 12 or 16 bits are scaled.

    Raises:
        UndecodableError: for values whose range the format does not define.
    """
    if image.mode == "F":
        raise UndecodableError(f"floating-point values {_NO_RANGE}")
    if isinstance(image, TiffImageFile) and 2 in image.tag_v2.get(_SAMPLE_FORMAT, (1,)):
        bits = image.tag_v2.get(_BITS, (1,))[0]  # Pillow reads those of 8 bits as unsigned
        raise UndecodableError(f"signed integers of {bits} bits {_NO_RANGE}")
    if (
        isinstance(image, TiffImageFile)
        and not image.mode.startswith("I")  # one channel
        and image.tag_v2.get(_PLANAR) == 2
        and max(image.tag_v2.get(_BITS, (1,))) > 8
    ):
        raise UndecodableError(
            "planes of 16 bits, which Pillow reads wrongly; convert the image to 8 bits, or store "
            "its channels together"
        )
    if image.mode.startswith("I"):  # Pillow would cut off what is above 255
        top, is_inverted = 65535, False
        if isinstance(image, TiffImageFile):
            bits, kind = (image.tag_v2.get(tag, (1,))[0] for tag in (_BITS, _SAMPLE_FORMAT))
            if kind != 1 or bits > 16:
                what = "unsigned" if kind == 1 else "undefined"
                raise UndecodableError(f"{what} integers of {bits} bits {_NO_RANGE}")
            top = (1 << bits) - 1
            is_inverted = image.tag_v2.get(_PHOTOMETRIC) == 0  # Pillow inverts eight bits only
        levels = np.asarray(image).astype(np.int64).clip(0, top)
        levels = top - levels if is_inverted else levels
        return Image.fromarray(((levels * 255 + top // 2) // top).astype(np.uint8)).convert("RGB")
    if "transparency" in image.info and image.mode == "P":
        image = image.convert("RGBA")  # Pillow warns of the direct way
    return image.convert("RGB")


class NvImageCodec:
    """nvImageCodec on the CPU, one decoder per thread.

    Without a GPU it works only if both the device and the backend are set to CPU.
    """

    def __init__(self, codec: ModuleType) -> None:
        self._codec: Any = codec
        self._own = threading.local()
        self._params = self._codec.DecodeParams(
            apply_exif_orientation=False, sample_format=self._codec.SampleFormat.I_RGB
        )

    def __call__(self, data: bytes) -> Tensor | None:
        """Decode; ``None`` where it cannot."""
        decoder: Any = getattr(self._own, "decoder", None)
        if decoder is None:
            decoder = self._codec.Decoder(
                device_id=self._codec.NVIMGCODEC_DEVICE_CPU_ONLY,
                max_num_cpu_threads=1,
                backends=[self._codec.Backend(self._codec.BackendKind.CPU_ONLY)],
            )
            self._own.decoder = decoder
        try:
            image = decoder.decode(self._codec.CodeStream(data), params=self._params)
        except RuntimeError:  # it does not know the format
            return None
        pixels = None if image is None else np.array(image)  # the image's memory is its decoder's
        if pixels is None or pixels.dtype != np.uint8 or pixels.shape[2:] != (3,):
            return None
        return torch.as_tensor(pixels).permute(2, 0, 1)


@lru_cache(maxsize=1)
def find_codec() -> ModuleType | None:
    """Return nvImageCodec if it is installed and decodes a test image."""
    try:
        codec = importlib.import_module("nvidia.nvimgcodec")
    except ImportError:
        logger.info("nvImageCodec is not installed; torchvision decodes")
        return None
    test = io.BytesIO()
    Image.new("RGB", (16, 16), (124, 116, 104)).save(test, "JPEG")
    expected = with_pillow(test.getvalue())
    try:
        got = NvImageCodec(codec)(test.getvalue())
    except (AttributeError, TypeError, RuntimeError) as error:
        got, reason = None, str(error)
    else:
        reason = "it decodes a test image incorrectly"
    if got is None or not torch.equal(got, expected):
        logger.warning("nvImageCodec does not work here (%s); torchvision decodes", reason)
        return None
    return codec
