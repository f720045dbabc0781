"""Figures of an evaluation: predicted masks, features and attention maps beside the images."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from cmtmae_scale.errors import describe_store, may_pass
from cmtmae_scale.evaluation.foreground import ShownMaps
from cmtmae_scale.evaluation.masks import VOID
from cmtmae_scale.evaluation.propagation import ShownClip
from cmtmae_scale.evaluation.segmentation import Shown
from cmtmae_scale.method.attention import normalise_map
from cmtmae_scale.runtime.storage import atomic_path
from cmtmae_scale.tools.figures.columns import (
    ATTENTION,
    COMPONENTS,
    Column,
    average_patch_colours,
    principal_colours,
)
from cmtmae_scale.tools.figures.sheet import draw_sheet

BLEND = 0.6
"""Share of the class colour on an image."""
WHITE = 1.0


def draw_panels(panels: Shown | ShownMaps | ShownClip, file: Path) -> Path:
    """Draw a figure as PNG, whole or not at all; returns the file.

    Raises:
        StorageError: if its store is full or fails.
    """
    if isinstance(panels, Shown):
        columns, title = segmentation_columns(panels), "segmentation of test images"
    elif isinstance(panels, ShownMaps):
        columns, title = attention_columns(panels), "attention and foreground"
    else:
        columns, title = clip_columns(panels), "label propagation, last frame of a clip"
    try:
        with atomic_path(file) as draft:
            Image.fromarray(draw_sheet(columns, title)).save(draft, "PNG")
    except OSError as error:
        if not may_pass(error):
            raise
        raise describe_store(error, f"for {file}") from error
    return file


def segmentation_columns(shown: Shown) -> list[Column]:
    """Return images, masks, predictions and features."""
    views = shown.images.float() / 255
    columns = [Column("image", views, smooth=True), Column("mask", paint(views, shown.masks))]
    columns[1].legend = "Masks: one colour per class, white void."
    for name, predicted in shown.predicted.items():
        method, _, setting = name.partition(", ")
        columns.append(Column(method.split()[0], paint(views, predicted), setting))
    rows = round(shown.features.shape[1] ** 0.5)
    colours = principal_colours(shown.features, average_patch_colours(views, rows))
    columns.append(Column("features", colours.view(len(views), rows, rows, 3), "PCA", COMPONENTS))
    return columns


def attention_columns(shown: ShownMaps) -> list[Column]:
    """Return images, masks and attention maps."""
    views = shown.images.float() / 255
    columns = [Column("image", views, smooth=True), Column("mask", paint(views, shown.masks))]
    for name, maps in shown.maps.items():
        values = normalise_map(maps.flatten(1), "minmax").view_as(maps)
        title, _, note = name.partition(", ")
        columns.append(Column(title, values, note or "attention", ATTENTION))
    return columns


def clip_columns(shown: ShownClip) -> list[Column]:
    """Return first and last frame with their masks, and the propagated mask."""
    views = [torch.from_numpy(frame.copy())[None].float() / 255 for frame in shown.frames]
    first, last, predicted = (
        torch.from_numpy(mask.copy())[None] for mask in (*shown.masks, shown.predicted)
    )
    return [
        Column("first frame", paint(views[0], first), "its mask", "White: void."),
        Column("later frame", views[1], "image", smooth=True),
        Column("later frame", paint(views[1], last), "its mask"),
        Column("later frame", paint(views[1], predicted), "propagated"),
    ]


def paint(views: Tensor, masks: Tensor) -> Tensor:
    """Blend class colours into images ``[n, S, S, 3]`` in [0, 1]; class 0 keeps the image, grey."""
    grey = views.mean(-1, keepdim=True).expand_as(views)
    colours = torch.from_numpy(class_colours())[masks.long()]
    painted = (1 - BLEND) * grey + BLEND * colours
    painted = torch.where((masks == VOID)[..., None], WHITE, painted)
    return torch.where((masks == 0)[..., None], grey, painted).float()


def class_colours() -> NDArray[np.float32]:
    """Return Pascal VOC's colours of the class numbers, ``[256, 3]`` in [0, 1]."""
    numbers = np.arange(256)
    colours = np.zeros((256, 3), np.int64)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= ((numbers >> (3 * bit + channel)) & 1) << (7 - bit)
    return (colours / 255).astype(np.float32)
