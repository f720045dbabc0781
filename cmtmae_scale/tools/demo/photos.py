"""Cut the photographs that scikit-image and scikit-learn carry into a folder of small JPEGs.

The crops are the same on every machine; some are grey, as in every real data set. Training crops
are cut from the left part of each photograph, evaluation crops from the right part: the two share
no pixel, and no evaluation pixel is seen in training. Evaluation crops do overlap each other.
"""

import json
import logging
import os
import shutil
import zlib
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from dataloading.errors import DataError

logger = logging.getLogger(__name__)

RECIPE = 2
"""Raised when other crops come out; folders of another recipe are made anew."""
SIDE_PIXELS = (160, 256)
SHARE = (0.4, 1.0)
RATIO = (0.75, 1.3333333333333333)
QUALITY = 90


class Photograph(NamedTuple):
    """A picture file inside an installed package, which is not imported."""

    name: str
    folder: str
    file: str
    crops: int


class Part(NamedTuple):
    """A strip of every photograph, from top to bottom."""

    name: str
    left: float
    right: float
    """Edges, shares of the width."""
    most: int
    """Crops of a photograph at most."""


TRAINING = Part("training", 0.0, 0.6, 26)
EVALUATION = Part("evaluation", 0.63, 1.0, 8)
SKIMAGE, SKLEARN = "skimage/data", "sklearn/datasets/images"
PHOTOGRAPHS = (
    Photograph("astronaut", SKIMAGE, "astronaut.png", 26),
    Photograph("chelsea", SKIMAGE, "chelsea.png", 26),
    Photograph("china", SKLEARN, "china.jpg", 26),
    Photograph("coffee", SKIMAGE, "coffee.png", 26),
    Photograph("flower", SKLEARN, "flower.jpg", 26),
    Photograph("rocket", SKIMAGE, "rocket.jpg", 26),
    Photograph("hubble_deep_field", SKIMAGE, "hubble_deep_field.jpg", 24),
    Photograph("immunohistochemistry", SKIMAGE, "ihc.png", 24),
    Photograph("retina", SKIMAGE, "retina.jpg", 24),
    Photograph("stereo_motorcycle", SKIMAGE, "motorcycle_left.png", 24),
    Photograph("brick", SKIMAGE, "brick.png", 8),
    Photograph("camera", SKIMAGE, "camera.png", 8),
    Photograph("coins", SKIMAGE, "coins.png", 8),
    Photograph("grass", SKIMAGE, "grass.png", 8),
    Photograph("gravel", SKIMAGE, "gravel.png", 8),
    Photograph("moon", SKIMAGE, "moon.png", 8),
)


def prepare_photos(folder: Path, part: Part = TRAINING) -> int:
    """Write ``FOLDER/NAME/NNN.jpg``, unless they are there already.

    Args:
        folder: appears complete or not at all; ``FOLDER.json`` beside it says what it holds.
        part: strip of the photographs that is cut.

    Returns:
        Number of JPEGs. A photograph that the installed package does not carry is left out with
        a warning; none is fetched.

    Raises:
        DataError: without scikit-image and scikit-learn (extra ``demo``).
    """
    note = folder.with_name(folder.name + ".json")
    if note.is_file() and folder.is_dir():
        known = json.loads(note.read_text())
        if known["recipe"] == RECIPE and known["images"] == count_images(folder):
            return known["images"]
    draft = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    for photograph in PHOTOGRAPHS:
        cut(photograph, part, draft / photograph.name)
    images = count_images(draft)
    note.unlink(missing_ok=True)
    if folder.exists():
        shutil.rmtree(folder)
    draft.rename(folder)
    note_draft = note.with_name(f"{note.name}.{os.getpid()}.tmp")
    note_draft.write_text(json.dumps({"recipe": RECIPE, "images": images}) + "\n")
    note_draft.replace(note)
    return images


def count_images(folder: Path) -> int:
    """Number of JPEGs one level down."""
    return sum(1 for _ in folder.glob("*/*.jpg"))


def cut(photograph: Photograph, part: Part, folder: Path) -> None:
    """Write crops of a part of one photograph, 160 to 256 pixels on the longer side."""
    package, _, inside = photograph.folder.partition("/")
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise DataError(f"the demo needs {package}: run make setup, or install the extra 'demo'")
    source = Path(spec.origin).parent / inside / photograph.file
    if not source.is_file():
        logger.warning(
            "%s is not inside the installed %s; the demo goes on without it",
            photograph.file,
            package,
        )
        return
    with Image.open(source) as opened:
        picture = opened.convert("L" if opened.mode in ("L", "I", "I;16", "1") else "RGB")
    edges = (round(part.left * picture.width), 0, round(part.right * picture.width), picture.height)
    picture = picture.crop(edges)
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(zlib.crc32(f"{part.name}/{photograph.name}".encode()))
    for number in range(min(photograph.crops, part.most)):
        crop(picture, rng).save(folder / f"{number:03d}.jpg", quality=QUALITY)


def crop(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Take a random box of 0.4 to 1 of the shorter side, resized."""
    side = min(picture.size) * rng.uniform(*SHARE)
    ratio = np.exp(rng.uniform(*np.log(RATIO)))
    width = min(round(side * ratio**0.5), picture.width)
    height = min(round(side / ratio**0.5), picture.height)
    left = int(rng.integers(picture.width - width + 1))
    top = int(rng.integers(picture.height - height + 1))
    longer = int(rng.integers(SIDE_PIXELS[0], SIDE_PIXELS[1] + 1))
    factor = longer / max(width, height)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    box = (left, top, left + width, top + height)
    return picture.resize(size, Image.Resampling.LANCZOS, box=box)
