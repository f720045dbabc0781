"""A contact sheet: random views, as a run would cut them, in a grid."""

from pathlib import Path

import numpy as np
from PIL import Image

from dataloading.errors import DataError
from dataloading.files import atomic_path
from dataloading.index import Index
from dataloading.stream import Stream

_COLUMNS, _ROWS = 10, 8
_SIDE, _GAP = 128, 4  # pixels


def draw_sheet(
    index: Index,
    path: Path,
    *,
    seed: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    flip: bool,
    threads: int,
) -> None:
    """Write the first 80 views of a run with these settings, fewer of a smaller data set.

    The extension of ``path`` sets the format; the other arguments are those of ``Stream``.

    Raises:
        DataError: if the image cannot be written.
    """
    number = min(_COLUMNS * _ROWS, len(index))
    with Stream(
        index,
        seed=seed,
        micro_batch=number,
        sizes=(_SIDE,),
        scale=scale,
        ratio=ratio,
        flip=flip,
        threads=threads,
        decode="torch",
    ) as stream:
        views = next(stream).images[0].numpy()
    cell = _SIDE + _GAP
    height = -(-number // _COLUMNS) * cell + _GAP
    sheet = np.full((height, min(number, _COLUMNS) * cell + _GAP, 3), 255, dtype=np.uint8)
    for place, view in enumerate(views):
        row, column = divmod(place, _COLUMNS)
        top, left = row * cell + _GAP, column * cell + _GAP
        sheet[top : top + _SIDE, left : left + _SIDE] = view
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as draft:
            form = "PNG" if path.suffix.lower() == ".png" else "JPEG"
            Image.fromarray(sheet).save(draft, form, quality=90)
    except OSError as error:
        raise DataError(
            f"{path}: the contact sheet cannot be written ({error}); name another file"
        ) from error
