"""Crops of the photographs in scikit-image and scikit-learn, as a folder of small JPEGs.

The crops are the same on every machine; some are grey, as in every real data set. Training crops
are from the left part of each photograph, evaluation crops from the right part, so the two sets
share no pixel. Evaluation crops overlap each other.
"""

import logging
import zlib
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from cmtmae_scale.errors import ConfigError
from cmtmae_scale.tools.demo.folders import read_record, write_folder
from dataloading.errors import DataError

logger = logging.getLogger(__name__)

RECIPE = 3
"""Version of the crops; folders of another version are rewritten."""
SIDE_PIXELS = (160, 256)
SCALE = (0.4, 1.0)
RATIO = (0.75, 1.3333333333333333)
QUALITY = 90


class Photograph(NamedTuple):
    """An image file inside an installed package, which is not imported."""

    name: str
    folder: str
    file: str


class Strip(NamedTuple):
    """A vertical strip of every photograph."""

    name: str
    left: float
    right: float
    """Edges, fractions of the width."""
    crops: int
    """Crops per photograph."""


TRAINING = Strip("training", 0.0, 0.6, 26)
EVALUATION = Strip("evaluation", 0.63, 1.0, 24)
SKIMAGE, SKLEARN = "skimage/data", "sklearn/datasets/images"
PHOTOGRAPHS = (
    Photograph("astronaut", SKIMAGE, "astronaut.png"),
    Photograph("chelsea", SKIMAGE, "chelsea.png"),
    Photograph("china", SKLEARN, "china.jpg"),
    Photograph("coffee", SKIMAGE, "coffee.png"),
    Photograph("flower", SKLEARN, "flower.jpg"),
    Photograph("rocket", SKIMAGE, "rocket.jpg"),
    Photograph("hubble_deep_field", SKIMAGE, "hubble_deep_field.jpg"),
    Photograph("immunohistochemistry", SKIMAGE, "ihc.png"),
    Photograph("retina", SKIMAGE, "retina.jpg"),
    Photograph("stereo_motorcycle", SKIMAGE, "motorcycle_left.png"),
    Photograph("brick", SKIMAGE, "brick.png"),
    Photograph("camera", SKIMAGE, "camera.png"),
    Photograph("coins", SKIMAGE, "coins.png"),
    Photograph("grass", SKIMAGE, "grass.png"),
    Photograph("gravel", SKIMAGE, "gravel.png"),
    Photograph("moon", SKIMAGE, "moon.png"),
)


def prepare_photos(folder: Path, strip: Strip = TRAINING) -> int:
    """Write ``FOLDER/NAME/NNN.jpg``, unless they exist, whole or not at all.

    ``FOLDER.json`` beside the folder records version and count.

    Returns:
        Number of JPEGs. A photograph that the installed package lacks is skipped with a warning;
        nothing is downloaded.

    Raises:
        ConfigError: if the folder is not the demo's, or has other images than the demo's.
        DataError: without scikit-image and scikit-learn (extra ``demo``).
    """
    record, images = read_record(folder) or {}, count_jpegs(folder)
    if folder.is_dir() and record == {"recipe": RECIPE, "images": images}:
        return images
    if images > record.get("images", images):
        raise ConfigError(
            f"{folder}: holds {images} images, and the demo wrote {record['images']}; move the "
            "others to a folder of their own, and name it with data.path"
        )

    def fill(draft: Path) -> dict[str, int]:
        for photograph in PHOTOGRAPHS:
            write_crops(photograph, strip, draft / photograph.name)
        return {"recipe": RECIPE, "images": count_jpegs(draft)}

    write_folder(folder, fill)
    return count_jpegs(folder)


def count_jpegs(folder: Path) -> int:
    """Count the JPEGs one level down."""
    return sum(1 for _ in folder.glob("*/*.jpg"))


def write_crops(photograph: Photograph, strip: Strip, folder: Path) -> None:
    """Write crops of a strip of one photograph, 160 to 256 pixels on the longer side."""
    package, _, inside = photograph.folder.partition("/")
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise DataError(f"the demo needs {package}: pip install 'cmtmae-scale[demo]'")
    source = Path(spec.origin).parent / inside / photograph.file
    if not source.is_file():
        logger.warning(
            "%s is not inside the installed %s; the demo skips it", photograph.file, package
        )
        return
    with Image.open(source) as opened:
        image = opened.convert("L" if opened.mode in ("L", "I", "I;16", "1") else "RGB")
    edges = (round(strip.left * image.width), 0, round(strip.right * image.width), image.height)
    image = image.crop(edges)
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(zlib.crc32(f"{strip.name}/{photograph.name}".encode()))
    for number in range(strip.crops):
        random_crop(image, rng).save(folder / f"{number:03d}.jpg", quality=QUALITY)


def random_crop(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Return a random box of 0.4 to 1 of the shorter side, resized."""
    side = min(image.size) * rng.uniform(*SCALE)
    ratio = np.exp(rng.uniform(*np.log(RATIO)))
    width = min(round(side * ratio**0.5), image.width)
    height = min(round(side / ratio**0.5), image.height)
    left = int(rng.integers(image.width - width + 1))
    top = int(rng.integers(image.height - height + 1))
    longer = int(rng.integers(SIDE_PIXELS[0], SIDE_PIXELS[1] + 1))
    factor = longer / max(width, height)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    box = (left, top, left + width, top + height)
    return image.resize(size, Image.Resampling.LANCZOS, box=box)
