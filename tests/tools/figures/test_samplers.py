"""The figure of docs/method.md, drawn in memory."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cmtmae_scale.method.masking import SAMPLERS
from cmtmae_scale.tools.figures.samplers import (
    DRAWS,
    GRID,
    draw_samplers,
    sample_choice,
    synthetic_attention,
    write_figure,
)

FIGURE = Path(__file__).resolve().parents[3] / "docs" / "samplers.png"


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_mask_of_the_figure_keeps_a_quarter(sampler: str) -> None:
    choice = sample_choice(sampler, synthetic_attention())
    assert choice.ids_keep.shape == (DRAWS, GRID * GRID // 4)
    assert all(len(set(row)) == GRID * GRID // 4 for row in choice.ids_keep.tolist())


def test_the_figure_in_the_docs_is_the_one_that_is_drawn(tmp_path: Path) -> None:
    write_figure(str(tmp_path / "samplers.png"))
    pixels = []
    for path in (tmp_path / "samplers.png", FIGURE):
        with Image.open(path) as image:
            pixels.append(np.asarray(image.convert("RGB")).astype(float))
    assert pixels[0].shape == pixels[1].shape == np.asarray(draw_samplers()).shape
    assert FIGURE.stat().st_size < 60_000
    # fonts and rounding may differ between versions of PIL and torch, the tiles may not
    assert float(np.abs(pixels[0] - pixels[1]).mean()) < 3.0
