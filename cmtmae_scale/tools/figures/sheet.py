"""Columns as one picture: a row an image, titles above, how to read it below."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from cmtmae_scale.tools.figures.columns import Column

SIDE, GAP, MARGIN = 112, 6, 14
"""Pixels; 112 is a multiple of the usual grids, 7, 8, 14 and 16 patches wide."""
TITLE, HEAD, FOOT = 30, 38, 24
SMALLEST = 8
"""Type size below which nobody can read."""
INK, PALE, PAPER = (28, 28, 30), (104, 104, 110), (255, 255, 255)
GREY = 0.55
SHADES = (
    *((0, 0, 4), (28, 16, 68), (79, 18, 123), (129, 37, 129), (181, 54, 122)),
    *((229, 80, 100), (251, 135, 97), (254, 194, 135), (252, 253, 191)),
)
"""From 0 to 1; the colour map magma by S. van der Walt and N. Smith (CC0)."""
NEAREST, LANCZOS = Image.Resampling.NEAREST, Image.Resampling.LANCZOS


def draw_sheet(columns: Sequence[Column], title: str) -> NDArray[np.uint8]:
    """Draw a sheet; returns its pixels, ``[height, width, 3]``."""
    rows = len(columns[0].values)
    width = 2 * MARGIN + len(columns) * (SIDE + GAP) - GAP
    top = MARGIN + TITLE + HEAD
    sheet = Image.new("RGB", (width, top + rows * (SIDE + GAP) + FOOT + MARGIN), PAPER)
    pen = ImageDraw.Draw(sheet)
    write(pen, (MARGIN, MARGIN), title, 15, INK, width - 2 * MARGIN)
    for number, column in enumerate(columns):
        left = MARGIN + number * (SIDE + GAP)
        write(pen, (left, MARGIN + TITLE), column.title, 13, INK, SIDE)
        write(pen, (left, MARGIN + TITLE + 16), column.note, 12, PALE, SIDE)
        for row in range(rows):
            sheet.paste(tile(column, row), (left, top + row * (SIDE + GAP)))
    foot = top + rows * (SIDE + GAP) + 4
    legend = "    ".join(dict.fromkeys(column.legend for column in columns if column.legend))
    write(pen, (MARGIN, foot), legend, 12, PALE, width - 2 * MARGIN)
    return np.asarray(sheet)


def write(
    pen: ImageDraw.ImageDraw,
    place: tuple[int, int],
    text: str,
    size: int,
    colour: tuple[int, int, int],
    room: int,
) -> None:
    """Write one line, smaller where it would not fit into ``room`` pixels, at last cut off."""
    font = ImageFont.load_default(size)
    wide = pen.textlength(text, font)
    if wide > room:
        font = ImageFont.load_default(max(size * room / wide, SMALLEST))
    while text and pen.textlength(text, font) > room:
        text = text[:-2] + "\N{HORIZONTAL ELLIPSIS}" if len(text) > 2 else ""
    pen.text(place, text, colour, font)


def tile(column: Column, row: int) -> Image.Image:
    """One picture."""
    values = column.values[row]
    pixels = shade(values) if values.ndim == 2 else values.numpy()
    picture = resize(pixels, LANCZOS if column.smooth else NEAREST)
    if column.hidden is not None:
        cover = column.hidden[row].numpy()[..., None].repeat(3, axis=-1) * 1.0
        covered = np.asarray(resize(cover, NEAREST)) > 0
        plain = np.full(covered.shape, round(255 * GREY), np.uint8)
        picture = Image.fromarray(np.where(covered, plain, np.asarray(picture)))
    return picture


def resize(pixels: NDArray[np.floating], how: Image.Resampling) -> Image.Image:
    """Colours in [0, 1] ``[h, w, 3]`` as a picture of the tile's size."""
    picture = Image.fromarray((255 * pixels).round().astype(np.uint8))
    return picture.resize((SIDE, SIDE), how)


def shade(values: Tensor) -> NDArray[np.float64]:
    """Values in [0, 1] ``[h, w]`` as colours; grey where there is none."""
    numbers = values.double().numpy()
    knots = np.linspace(0, 1, len(SHADES))
    shades = np.array(SHADES) / 255
    filled = np.nan_to_num(numbers)
    colours = np.stack([np.interp(filled, knots, shades[:, c]) for c in range(3)], axis=-1)
    return np.where(np.isnan(numbers)[..., None], GREY, colours)
