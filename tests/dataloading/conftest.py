"""Generated images."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def smooth(seed: int, width: int, height: int) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def picture() -> Callable[[int, int, int], Image.Image]:
    return smooth


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Twelve JPEGs of different sizes in three sub-folders."""
    root = tmp_path / "photos"
    for i in range(12):
        folder = root / f"class{i % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        smooth(i, 90 + 7 * i, 130 - 5 * i).save(folder / f"{i:02d}.jpg", quality=92)
    return root
