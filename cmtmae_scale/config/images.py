"""Open the index of a run's images as the run's settings require."""

import os
from pathlib import Path

from cmtmae_scale.config.schema import Data
from cmtmae_scale.errors import ConfigError
from dataloading.data_set import Request
from dataloading.index import Index, build_index, build_listed
from dataloading.kept_index import find_kept, load_or_build
from dataloading.stores import as_root


def request_images(data: Data) -> Request:
    """Return the request from which the index of ``data.path`` is built."""
    return Request(as_root(data.path), data.source, data.max_pixels, data.exif_orientation)


def open_images(data: Data, folder: Path, recheck_excluded: bool) -> Index:
    """Open the index of ``data.path`` that a folder keeps, or build it there, in one process.

    Args:
        data: the settings.
        folder: as for ``load_or_build``.
        recheck_excluded: as for ``load_or_build``; false where a run or a cache already uses the
            index.

    Raises:
        DataError, ReadError: as ``load_or_build``.
    """
    settings = data.source, data.max_pixels, data.exif_orientation
    return load_or_build(data.path, folder, *settings, data.verify_index, recheck_excluded)


def open_images_read_only(data: Data, folder: Path | None, recheck_excluded: bool) -> Index:
    """Open the index of ``data.path`` that a folder keeps, or build it in memory.

    The arguments are those of ``open_images``. Nothing is written: the folder may be that of a
    run in progress, on a machine where the images have other times.

    Raises:
        DataError, ReadError: as ``load_or_build``.
    """
    if folder is None or not os.path.isdir(folder):
        return build_index(data.path, data.source, data.max_pixels, data.exif_orientation)
    request = request_images(data)
    found = find_kept(request, folder, data.verify_index, recheck_excluded, published=False)
    return found[0] if found[0] is not None else build_listed(found[1])


def require_expected_images(data: Data, index: Index) -> None:
    """Refuse a number of images other than ``data.expected_images``.

    Raises:
        ConfigError: names both numbers.
    """
    if data.expected_images is not None and data.expected_images != len(index):
        raise ConfigError(
            f"data.path={data.path} has {len(index)} usable images, "
            f"data.expected_images={data.expected_images}; correct one of them"
        )
