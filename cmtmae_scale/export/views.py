"""Images on which an export must agree with the run's own network."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from cmtmae_scale.config.images import open_images_read_only
from cmtmae_scale.errors import ConfigError
from cmtmae_scale.export.origin import Origin
from dataloading.errors import DataError
from dataloading.index import Index, build_index
from dataloading.one_pass import OnePass

COUNT = 10


class Views(NamedTuple):
    """Centre crops of some images."""

    images: Tensor
    """uint8, ``[B, S, S, 3]``."""
    place: str
    """Source, as named on the command line."""
    num_images: int | None
    """Number of images of the run's data set; ``None``: these are other images."""


def open_views(images: str | Path | None, origin: Origin) -> Views:
    """Decode the same few images, spread evenly over a data set.

    ``images`` is a folder of images, or tars or their address; ``None``: the run's own.

    Raises:
        ConfigError: if the run's images cannot be read.
        DataError: if none of the images can be decoded.
    """
    index = build_index(images) if images is not None else open_run_index(origin)
    chosen = np.unique(np.linspace(0, len(index) - 1, COUNT).round().astype(np.int64))
    size = origin.config.views.image_size
    with OnePass(index, chosen, micro_batch=len(chosen), size=size, threads=1) as batches:
        (batch,) = batches
    found = batch.images[0][batch.valid].clone()
    if not len(found):
        raise DataError(f"{index.root}: none of {len(chosen)} images could be decoded")
    own = index.digest == origin.state["index_digest"]
    return Views(found, str(index.root), len(index) if own else None)


def open_run_index(origin: Origin) -> Index:
    """Open the run's index, from its folder where that is still valid, or build it in memory.

    Raises:
        ConfigError: if the images cannot be read.
    """
    data, run_dir = origin.config.data, origin.run_dir
    folder = Path(data.index) if data.index else run_dir and run_dir / "index"
    try:
        return open_images_read_only(data, folder, recheck_excluded=False)
    except DataError as error:
        raise ConfigError(
            f"an export is verified on images, and the run's cannot be read ({error}); name others "
            "with --images FOLDER"
        ) from error
