"""A figure sheet: one row per image, one column per kind, titles above, legends below."""

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
"""Smallest legible type size."""
INK, PALE, PAPER = (28, 28, 30), (104, 104, 110), (255, 255, 255)
GREY = 0.55
MAGMA = bytes.fromhex("000004 1c1044 4f127b 812581 b5367a e55064 fb8761 fec287 fcfdbf")
SHADES = np.frombuffer(MAGMA, np.uint8).reshape(-1, 3)
"""From 0 to 1; the colour map magma by S. van der Walt and N. Smith (CC0)."""
NEAREST, LANCZOS = Image.Resampling.NEAREST, Image.Resampling.LANCZOS


def draw_sheet(columns: Sequence[Column], title: str) -> NDArray[np.uint8]:
    """Draw a sheet; returns its pixels, uint8 ``[height, width, 3]``."""
    rows = len(columns[0].values)
    width = 2 * MARGIN + len(columns) * (SIDE + GAP) - GAP
    top = MARGIN + TITLE + HEAD
    sheet = Image.new("RGB", (width, top + rows * (SIDE + GAP) + FOOT + MARGIN), PAPER)
    pen = ImageDraw.Draw(sheet)
    draw_text(pen, (MARGIN, MARGIN), title, 15, INK, width - 2 * MARGIN)
    for number, column in enumerate(columns):
        left = MARGIN + number * (SIDE + GAP)
        draw_text(pen, (left, MARGIN + TITLE), column.title, 13, INK, SIDE)
        draw_text(pen, (left, MARGIN + TITLE + 16), column.note, 12, PALE, SIDE)
        for row in range(rows):
            sheet.paste(draw_tile(column, row), (left, top + row * (SIDE + GAP)))
    foot = top + rows * (SIDE + GAP) + 4
    legend = "    ".join(dict.fromkeys(column.legend for column in columns if column.legend))
    draw_text(pen, (MARGIN, foot), legend, 12, PALE, width - 2 * MARGIN)
    return np.asarray(sheet)


def draw_text(
    pen: ImageDraw.ImageDraw,
    place: tuple[int, int],
    text: str,
    size: int,
    colour: tuple[int, int, int],
    room: int,
) -> None:
    """Draw one line of text, shrunk to fit into ``room`` pixels and cut off as a last resort."""
    font = ImageFont.load_default(size)
    wide = pen.textlength(text, font)
    if wide > room:
        font = ImageFont.load_default(max(size * room / wide, SMALLEST))
    while text and pen.textlength(text, font) > room:
        text = text[:-2] + "\N{HORIZONTAL ELLIPSIS}" if len(text) > 2 else ""
    pen.text(place, text, colour, font)


def draw_tile(column: Column, row: int) -> Image.Image:
    """Draw one image's tile of a column."""
    values = column.values[row]
    pixels = apply_colour_map(values) if values.ndim == 2 else values.numpy()
    tile = resize_to_tile(pixels, LANCZOS if column.smooth else NEAREST)
    if column.hidden is not None:
        cover = column.hidden[row].numpy()[..., None].repeat(3, axis=-1) * 1.0
        covered = np.asarray(resize_to_tile(cover, NEAREST)) > 0
        plain = np.full(covered.shape, round(255 * GREY), np.uint8)
        tile = Image.fromarray(np.where(covered, plain, np.asarray(tile)))
    return tile


def resize_to_tile(pixels: NDArray[np.floating], how: Image.Resampling) -> Image.Image:
    """Resize colours in [0, 1] ``[h, w, 3]`` to the side of a tile."""
    tile = Image.fromarray((255 * pixels).round().astype(np.uint8))
    return tile.resize((SIDE, SIDE), how)


def apply_colour_map(values: Tensor) -> NDArray[np.float64]:
    """Map values in [0, 1] ``[h, w]`` to colours; NaN is grey."""
    numbers = values.double().numpy()
    shades, knots = SHADES / 255, np.linspace(0, 1, len(SHADES))
    filled = np.nan_to_num(numbers)
    colours = np.stack([np.interp(filled, knots, shades[:, c]) for c in range(3)], axis=-1)
    return np.where(np.isnan(numbers)[..., None], GREY, colours)
