"""From bytes to views on the CPU: decode once, crop once, resize to every size.

The fastest decoder that works is nvImageCodec, then torchvision; what they refuse, Pillow tries.
On intact JPEG and PNG files all three give the same pixels. EXIF orientation is never applied, so
boxes are in stored coordinates; alpha is dropped.
"""

import importlib
import io
import logging
import threading
from collections.abc import Callable, Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.io import ImageReadMode  # pyright: ignore[reportMissingTypeStubs]

from dataloading.headers import PIL_ERRORS

logger = logging.getLogger(__name__)

Pixels = NDArray[np.uint8]
DecoderName = Literal["auto", "torch"]
Decode = Callable[[bytes], Tensor]


class UndecodableError(ValueError):
    """No decoder can read a picture; the message is a short reason without a path."""


def make_decoder(name: DecoderName) -> Decode:
    """Choose a decoder.

    Args:
        name: "auto" takes nvImageCodec where it works, else torchvision; "torch" is torchvision.

    Returns:
        A function from encoded bytes to uint8 RGB ``[3, height, width]``, safe in threads. It
        raises ``UndecodableError``.

    Raises:
        ValueError: if the name is not known.
    """
    if name not in ("auto", "torch"):
        raise ValueError(f"decode is {name!r}; expected 'auto' or 'torch'")
    Image.init()
    codec = _nvimagecodec() if name == "auto" else None
    fast: Callable[[bytes], Tensor | None] = _torchvision if codec is None else _Nvimagecodec(codec)

    def decode(data: bytes) -> Tensor:
        picture = fast(data) if data else None
        return _pillow(data) if picture is None else picture

    return decode


def crop_and_resize(
    picture: Tensor, box: Sequence[int], sizes: Sequence[int], flip: bool
) -> list[Pixels]:
    """Cut a box and resize it to squares, every one from the same crop.

    Args:
        picture: uint8 RGB ``[3, height, width]``.
        box: x, y, w, h in pixels, within the picture.
        sizes: sides of the results.
        flip: mirror left and right.

    Returns:
        For each size a uint8 array ``[size, size, 3]`` (a view with odd strides when mirrored):
        bicubic with antialiasing, borders as in Pillow's ``crop`` then ``resize``.
    """
    x, y, w, h = box
    crop = picture[None, :, y : y + h, x : x + w]
    views: list[Pixels] = []
    for size in sizes:
        resized = interpolate(crop, (size, size), mode="bicubic", antialias=True)
        pixels: Pixels = resized[0].permute(1, 2, 0).numpy()
        views.append(pixels[:, ::-1] if flip else pixels)
    return views


def _torchvision(data: bytes) -> Tensor | None:
    """Decode with torchvision; ``None`` where it cannot."""
    if data[:4] == b"GIF8":  # it would decode all frames
        return None
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    try:
        # The operator behind torchvision.io.decode_image, which since 0.29 warns at every call.
        picture: Tensor = torch.ops.image.decode_image(encoded, ImageReadMode.RGB.value, False)
    except RuntimeError:  # torchvision's only word for refusal
        return None
    if picture.dtype == torch.uint16:
        return ((picture.to(torch.int32) * 255 + 32767) // 65535).to(torch.uint8)
    return picture if picture.ndim == 3 else picture[0]


def _pillow(data: bytes) -> Tensor:
    if not data:
        raise UndecodableError("no bytes")
    try:
        with Image.open(io.BytesIO(data)) as image:
            pixels = np.array(image.convert("RGB"))
    except Image.UnidentifiedImageError as error:
        raise UndecodableError("not an image of a known format") from error
    except PIL_ERRORS as error:
        raise UndecodableError(f"cannot be decoded: {error}") from error
    return torch.as_tensor(pixels).permute(2, 0, 1)


class _Nvimagecodec:
    """nvImageCodec on the CPU, one decoder a thread.

    Without a GPU it works only if both the device and the backend say CPU.
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
        except RuntimeError:  # the header is not one it knows
            return None
        pixels = None if image is None else np.array(image)  # the image's memory is its decoder's
        if pixels is None or pixels.dtype != np.uint8 or pixels.shape[2:] != (3,):
            return None
        return torch.as_tensor(pixels).permute(2, 0, 1)


@lru_cache(maxsize=1)
def _nvimagecodec() -> ModuleType | None:
    """Return nvImageCodec if it is installed and decodes a test picture."""
    try:
        codec = importlib.import_module("nvidia.nvimgcodec")
    except ImportError:
        logger.info("nvImageCodec is not installed; torchvision decodes")
        return None
    test = io.BytesIO()
    Image.new("RGB", (16, 16), (124, 116, 104)).save(test, "JPEG")
    expected = _pillow(test.getvalue())
    try:
        got = _Nvimagecodec(codec)(test.getvalue())
    except (AttributeError, TypeError, RuntimeError) as error:
        got, reason = None, str(error)
    else:
        reason = "it decodes a test picture wrongly"
    if got is None or not torch.equal(got, expected):
        logger.warning("nvImageCodec does not work here (%s); torchvision decodes", reason)
        return None
    return codec
