"""The drawn sheet: sizes, shades and places."""

import numpy as np
import torch

from cmtmae_scale.tools.figures.columns import Column
from cmtmae_scale.tools.figures.sheet import (
    GAP,
    GREY,
    HEAD,
    INK,
    MARGIN,
    PAPER,
    SHADES,
    SIDE,
    TITLE,
    apply_colour_map,
    draw_sheet,
    draw_tile,
)


def test_a_sheet_has_a_row_per_image_and_a_column_per_kind() -> None:
    columns = [Column(name, torch.full((3, 2, 2), 0.25 * k)) for k, name in enumerate("abc")]
    sheet = draw_sheet(columns, "title")
    assert sheet.dtype == np.uint8
    assert sheet.shape[1] == 2 * MARGIN + 3 * SIDE + 2 * GAP
    for row in range(3):
        for column in range(3):
            top = MARGIN + TITLE + HEAD + row * (SIDE + GAP) + SIDE // 2
            left = MARGIN + column * (SIDE + GAP) + SIDE // 2
            assert tuple(sheet[top, left]) == tuple(SHADES[2 * column])


def test_long_titles_stay_within_the_sheet() -> None:
    columns = [Column("a very long title of a column indeed", torch.zeros(1, 2, 2), "note " * 30)]
    sheet = draw_sheet(columns, "a title that does not fit " * 9)
    edge = sheet[: MARGIN + TITLE + HEAD, -MARGIN // 2 :]
    assert (edge == np.array(PAPER)).all()
    assert (sheet[: MARGIN + TITLE] < np.array(INK) + 60).all(axis=-1).any()


def test_shades_run_from_dark_to_bright_and_no_value_is_grey() -> None:
    found = apply_colour_map(torch.tensor([[0.0, 0.5, 1.0, torch.nan]]))[0] * 255
    assert np.allclose(found[:3], [SHADES[0], SHADES[4], SHADES[8]])
    assert np.allclose(found[3], 255 * GREY)


def test_hidden_patches_are_grey_with_sharp_edges() -> None:
    hidden = torch.tensor([[[True, False], [False, False]]])
    column = Column("x", torch.ones(1, 20, 20, 3), hidden=hidden, smooth=True)
    pixels = np.asarray(draw_tile(column, 0))
    half = SIDE // 2
    assert (pixels[:half, :half] == round(255 * GREY)).all()
    pixels = pixels.copy()
    pixels[:half, :half] = 255
    assert (pixels == 255).all()
