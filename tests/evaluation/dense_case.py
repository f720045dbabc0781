"""Made-up encoders, images with masks and clips for tests of dense evaluation."""

import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d

from cmtmae_scale.evaluation.encoders import Encoder, Tokens, token_encoder

SIDE, PATCH, GRID = 24, 4, (6, 6)


def encode_tokens(images: Tensor) -> Tokens:
    """Mean colour of each patch and a nonlinear mixture of it; a class token of another law."""
    means = avg_pool2d(images.float().permute(0, 3, 1, 2) / 255, PATCH).flatten(2).mT  # [B, N, 3]
    patches = torch.cat([means, (9 * means).sin()], dim=2)
    return Tokens(patches.amax(1), patches)


ENCODER: Encoder = token_encoder("made up", SIDE, GRID, encode_tokens)


def draw(number: int, side: tuple[int, int], classes: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """An image whose regions differ in colour, with noise; and its mask with a void border."""
    rng = np.random.default_rng(number)
    width, height = side
    mask = np.zeros((height, width), np.uint8)
    for value in range(1, classes):
        y, x = rng.integers(0, height // 2), rng.integers(0, width // 2)
        mask[y : y + height // 2, x : x + width // 2] = value
    colours = np.array([[60, 90, 120], [170, 90, 60], [90, 180, 90]])
    image = colours[mask] + rng.normal(0, 30, (height, width, 3))
    mask[0, :2] = 255
    return image.clip(0, 255).astype(np.uint8), mask


def write_masked(folder: Path, count: int, seed: int = 0, classes: int = 2) -> Path:
    """A folder of images and masks, of several sizes."""
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        image, mask = draw(seed + number, (30 + number % 5, 33 - number % 4), classes)
        Image.fromarray(image).save(folder / "images" / f"{number:02d}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{number:02d}.png")
    return folder


def write_clip(root: Path, name: str, frames: int, seed: int = 0) -> None:
    """A clip in DAVIS's layout: a square that moves, on a background that does not."""
    rng = np.random.default_rng(seed)
    back = rng.integers(0, 100, (48, 48, 3))
    front = rng.integers(150, 255, (20, 20, 3))
    for kind in ("JPEGImages", "Annotations"):
        (root / kind / "480p" / name).mkdir(parents=True, exist_ok=True)
    for number in range(frames):
        image, mask = back.copy(), np.zeros((48, 48), np.uint8)
        here = slice(8 + 2 * number, 28 + 2 * number)
        image[here, here], mask[here, here] = front, 1
        file = f"{number:05d}"
        Image.fromarray(image.astype(np.uint8)).save(
            root / "JPEGImages" / "480p" / name / f"{file}.jpg", quality=95
        )
        palette = Image.fromarray(mask).convert("P")
        palette.putpalette([0, 0, 0, 200, 0, 0])
        palette.save(root / "Annotations" / "480p" / name / f"{file}.png")


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 48 48\n%%EndComments\nshowpage\n"
"""An image for whose pixels Pillow runs Ghostscript."""


def write_huge_png(file: Path) -> None:
    """Give a PNG a header of more pixels than Pillow decodes."""
    data = bytearray(file.read_bytes())
    data[16:24] = (60_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    file.write_bytes(data)


def size_of(file: Path) -> tuple[int, int]:
    """Width and height."""
    with Image.open(file) as opened:
        return opened.size
