"""The index of a run's images, as the run's settings ask for it."""

from pathlib import Path

from cmtmae_scale.config.schema import Data
from dataloading.data_set import Request
from dataloading.index import Index, build_index
from dataloading.kept_index import load_or_build
from dataloading.stores import as_root


def request_images(data: Data) -> Request:
    """Return what the index of ``data.path`` is built from."""
    return Request(as_root(data.path), data.source, data.max_pixels, data.exif_orientation)


def open_images(data: Data, folder: Path | None, look_again: bool) -> Index:
    """Open the index of ``data.path`` that a folder keeps, or build it there, in one process.

    Args:
        data: the settings.
        folder: as for ``load_or_build``; ``None``: the index is built in memory.
        look_again: as for ``load_or_build``; not where a run or a cache began with the index.

    Raises:
        DataError, ReadError: as ``load_or_build``.
    """
    settings = data.source, data.max_pixels, data.exif_orientation
    if folder is None:
        return build_index(data.path, *settings)
    return load_or_build(data.path, folder, *settings, data.verify_index, look_again)
