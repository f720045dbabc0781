"""Images with masks, made from the photographs in scikit-image and scikit-learn.

Three sets, the same on every machine and written without a download:

* ``textures/train`` and ``textures/test``: mosaics of three photographed textures (brick, grass,
  gravel). Each mosaic is cut by the nearest of a few random points; the masks are exact. Training
  pixels are from the left 60 % of each photograph, test pixels from the right 37 %, and every
  region's brightness and contrast are changed at random, so that brightness reveals no class.
* ``objects``: seven photographs whose object is outlined by hand below (void within 3 pixels of the
  outline), or found by a threshold (coins).
* ``clips``: clips in DAVIS's layout. ``motorcycle`` is a real stereo pair: the right image's mask
  is the left mask, moved by the measured disparity (D. Scharstein et al., GCPR 2014), void where
  that is unknown. The others are a camera's pan over a photograph of ``objects``.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from cmtmae_scale.tools.demo.folders import read_record, write_folder
from cmtmae_scale.tools.demo.photos import SKIMAGE, SKLEARN
from dataloading.errors import DataError

RECIPE = 1
"""Version of the sets; folders of another version are rewritten."""
TEXTURES = ("brick", "grass", "gravel")
"""Classes 1, 2 and 3 of the mosaics; there is no class 0."""
MOSAICS = {"train": 48, "test": 32}
STRIPS = {"train": (0.0, 0.6), "test": (0.63, 1.0)}
SIDE = 160
"""Side of a mosaic in pixels."""
POINTS = (3, 6)
"""Smallest and largest number of regions of a mosaic."""
BORDER = 3
"""Half of the width of the void along an outline, pixels."""
COIN_LEVEL = 107
"""Threshold of the coins' smoothed brightness above the local background."""
FRAMES = 6
PAN, CROP = 0.3, 0.7
"""Length of a pan and side of its frames, as fractions of the photograph."""
VOID = 255

Point = tuple[float, float]


class Outlined(NamedTuple):
    """A photograph with outlines of its object, points as fractions of width and height."""

    folder: str
    file: str
    outlines: tuple[tuple[Point, ...], ...]


def outline(width: float, height: float, *points: Point) -> tuple[Point, ...]:
    """Return points as fractions of a width and a height."""
    return tuple((x / width, y / height) for x, y in points)


def ellipse(centre: Point, radii: Point) -> tuple[Point, ...]:
    """Return an outline of 48 points, all as fractions."""
    turns = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    return tuple(
        (centre[0] + radii[0] * float(np.cos(t)), centre[1] + radii[1] * float(np.sin(t)))
        for t in turns
    )


OBJECTS = {
    "astronaut": Outlined(
        SKIMAGE,
        "astronaut.png",
        (
            outline(
                *(329, 329),
                *((13, 329), (18, 290), (20, 225), (35, 180), (75, 158), (76, 130), (90, 108)),
                *((118, 98), (104, 75), (97, 55), (103, 25), (125, 12), (150, 8), (178, 16)),
                *((194, 45), (193, 75), (180, 85), (166, 92), (190, 118), (197, 150), (223, 165)),
                *((232, 195), (238, 222), (265, 219), (300, 235), (322, 270), (327, 329)),
            ),
        ),
    ),
    "camera": Outlined(
        SKIMAGE,
        "camera.png",
        (
            outline(
                *(329, 329),
                *((0, 155), (24, 115), (36, 84), (75, 75), (104, 66), (112, 48), (138, 40)),
                *((163, 50), (174, 70), (172, 92), (208, 90), (211, 122), (196, 148), (188, 175)),
                *((185, 196), (160, 198), (142, 188), (130, 215), (108, 262), (98, 329), (0, 329)),
            ),
        ),
    ),
    "china": Outlined(
        SKLEARN,
        "china.jpg",
        (
            outline(
                *(384, 256),
                *((117, 18), (131, 18), (133, 38), (152, 55), (191, 70), (184, 80), (172, 85)),
                *(
                    (174, 96),
                    (202, 102),
                    (194, 115),
                    (190, 140),
                    (212, 155),
                    (204, 168),
                    (198, 190),
                ),
                *((218, 212), (212, 232), (130, 228), (74, 222), (60, 205), (76, 192), (72, 178)),
                *((52, 158), (63, 142), (60, 120), (48, 102), (62, 96), (62, 84), (54, 70)),
                *((90, 60), (114, 40)),
            ),
        ),
    ),
    "coffee": Outlined(
        SKIMAGE,
        "coffee.png",
        (
            outline(
                *(384, 256),
                *((49, 135), (55, 105), (75, 80), (110, 66), (111, 45), (128, 24), (168, 11)),
                *((210, 11), (248, 25), (268, 44), (270, 62), (292, 88), (305, 122), (301, 155)),
                *((282, 195), (245, 228), (200, 246), (150, 245), (104, 222), (70, 185)),
            ),
        ),
    ),
    "flower": Outlined(
        SKLEARN,
        "flower.jpg",
        (
            ellipse((186 / 384, 133 / 256), (83 / 384, 82 / 256)),
            outline(
                *(384, 256),
                *((172, 256), (178, 236), (200, 227), (222, 225), (246, 228), (262, 238)),
                *((270, 256),),
            ),
        ),
    ),
    "motorcycle": Outlined(
        SKIMAGE,
        "motorcycle_left.png",
        (
            outline(
                *(384, 259),
                *((47, 122), (60, 106), (76, 98), (80, 85), (130, 90), (150, 100), (175, 88)),
                *((222, 74), (214, 44), (250, 52), (265, 40), (290, 60), (308, 85), (300, 118)),
                *((325, 140), (335, 158), (352, 168), (361, 200), (350, 232), (318, 228)),
                *((285, 200), (268, 172), (250, 185), (210, 205), (178, 202), (176, 226)),
                *((165, 226), (164, 196), (140, 192), (125, 214), (98, 216), (65, 195)),
                *((60, 150), (70, 125)),
            ),
        ),
    ),
    "coins": Outlined(SKIMAGE, "coins.png", ()),
}
DISPARITY = (SKIMAGE, "motorcycle_disp.npz")
RIGHT = (SKIMAGE, "motorcycle_right.png")


def prepare_masks(folder: Path) -> Path:
    """Write the sets below a folder, unless they exist, whole or not at all; returns the folder.

    Raises:
        ConfigError: if the folder is not the demo's.
        DataError: without scikit-image and scikit-learn (extra ``demo``).
    """
    if folder.is_dir() and read_record(folder) == {"recipe": RECIPE}:
        return folder

    def fill(draft: Path) -> dict[str, int]:
        for part, count in MOSAICS.items():
            write_mosaics(draft / "textures" / part, part, count)
        for name in OBJECTS:
            image, mask = outlined_photograph(name)
            write_pair(draft / "objects", name, image, mask)
            write_clip(draft / "clips", name, image, mask)
        return {"recipe": RECIPE}

    write_folder(folder, fill)
    return folder


def find_data(folder: str, file: str) -> Path:
    """Return a file inside an installed package, which is not imported.

    Raises:
        DataError: if the package or the file is not installed.
    """
    package, _, inside = folder.partition("/")
    spec = find_spec(package)
    found = (
        None if spec is None or spec.origin is None else Path(spec.origin).parent / inside / file
    )
    if found is None or not found.is_file():
        raise DataError(f"the masks need {folder}/{file}: run make setup, or install 'demo'")
    return found


def write_pair(folder: Path, name: str, image: Image.Image, mask: NDArray[np.uint8]) -> None:
    """Write an image and its mask."""
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    image.save(folder / "images" / f"{name}.jpg", quality=92)
    Image.fromarray(mask).save(folder / "masks" / f"{name}.png")


def write_mosaics(folder: Path, part: str, count: int) -> None:
    """Write mosaics of textures: classes 1 to 3 in the order of ``TEXTURES``."""
    strips: list[NDArray[np.float64]] = []
    for name in TEXTURES:
        with Image.open(find_data(SKIMAGE, f"{name}.png")) as opened:
            pixels = np.asarray(opened.convert("L"), dtype=np.float64)
        left, right = (round(edge * pixels.shape[1]) for edge in STRIPS[part])
        strips.append(pixels[:, left:right])
    rng = np.random.default_rng([RECIPE, sorted(MOSAICS).index(part)])
    for number in range(count):
        image, mask = mosaic(strips, rng)
        write_pair(folder, f"{number:03d}", Image.fromarray(image), mask)


def mosaic(
    strips: list[NDArray[np.float64]], rng: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return a mosaic and its mask, both uint8 ``[160, 160]``; at least two classes."""
    regions = int(rng.integers(POINTS[0], POINTS[1] + 1))
    centres = rng.uniform(0, SIDE, (regions, 2))
    classes = np.concatenate([rng.permutation(len(strips))[:2], rng.integers(3, size=regions - 2)])
    grid = np.stack(np.meshgrid(np.arange(SIDE), np.arange(SIDE), indexing="ij"), -1)
    nearest = np.square(grid[:, :, None] - centres).sum(-1).argmin(-1)
    image = np.zeros((SIDE, SIDE))
    for region, number in enumerate(classes):
        strip = strips[number]
        top, left = (int(rng.integers(size - SIDE + 1)) for size in strip.shape)
        texture = strip[top : top + SIDE, left : left + SIDE]
        contrast, brightness = rng.uniform(30, 60), rng.uniform(90, 165)
        texture = brightness + contrast * (texture - texture.mean()) / texture.std()
        image[nearest == region] = texture[nearest == region]
    return image.clip(0, 255).astype(np.uint8), (classes[nearest] + 1).astype(np.uint8)


def outlined_photograph(name: str) -> tuple[Image.Image, NDArray[np.uint8]]:
    """Return a photograph and its mask: 1 the object, 255 along its outline."""
    found = OBJECTS[name]
    with Image.open(find_data(found.folder, found.file)) as opened:
        image = opened.convert("RGB")
    inside = Image.new("L", image.size, 0)
    pen = ImageDraw.Draw(inside)
    for points in found.outlines:
        pen.polygon([(x * image.width, y * image.height) for x, y in points], fill=1)
    if not found.outlines:
        inside = find_coins(image)
    grown = np.asarray(inside.filter(ImageFilter.MaxFilter(2 * BORDER + 1)))
    shrunk = np.asarray(inside.filter(ImageFilter.MinFilter(2 * BORDER + 1)))
    return image, np.where(grown != shrunk, VOID, np.asarray(inside)).astype(np.uint8)


def find_coins(image: Image.Image) -> Image.Image:
    """Return where a smoothed image is brighter than its surroundings."""
    smooth = image.convert("L").filter(ImageFilter.GaussianBlur(3))
    around = smooth.filter(ImageFilter.GaussianBlur(40))
    bright = np.asarray(smooth, np.int64) - np.asarray(around, np.int64) + 100 > COIN_LEVEL
    closed = Image.fromarray(bright.astype(np.uint8))
    for kind in (ImageFilter.MaxFilter, ImageFilter.MinFilter):
        closed = closed.filter(kind(7))
    return closed


def write_clip(folder: Path, name: str, image: Image.Image, mask: NDArray[np.uint8]) -> None:
    """Write a clip: the stereo pair of the motorcycle, a pan over every other photograph."""
    frames = [(image, mask)]
    if name == "motorcycle":
        with Image.open(find_data(*RIGHT)) as opened:
            frames.append((opened.convert("RGB"), move_by_disparity(mask)))
    else:
        whole = Image.fromarray(mask)
        width, height = (round(CROP * side) for side in image.size)
        frames = []
        for number in range(FRAMES):
            way = PAN * number / (FRAMES - 1)
            left, top = round(way * image.width), round(way / 2 * image.height)
            box = (left, top, left + width, top + height)
            frames.append((image.crop(box), np.asarray(whole.crop(box))))
    for kind in ("JPEGImages", "Annotations"):
        (folder / kind / "480p" / name).mkdir(parents=True, exist_ok=True)
    for number, (frame, truth) in enumerate(frames):
        frame.save(folder / "JPEGImages" / "480p" / name / f"{number:05d}.jpg", quality=92)
        file = folder / "Annotations" / "480p" / name / f"{number:05d}.png"
        Image.fromarray(truth).save(file)


def move_by_disparity(mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the mask of the right image: each pixel of the left moved, the nearest object wins."""
    with np.load(find_data(*DISPARITY)) as opened:
        disparity = opened["arr_0"]
    moved = np.full(mask.shape, VOID, np.uint8)
    rows, columns = np.nonzero(np.isfinite(disparity))
    order = np.argsort(disparity[rows, columns], kind="stable")  # far to near
    rows, columns = rows[order], columns[order]
    targets = np.rint(columns - disparity[rows, columns]).astype(np.int64)
    inside = (targets >= 0) & (targets < mask.shape[1])
    rows, columns, targets = rows[inside], columns[inside], targets[inside]
    moved[rows, targets] = mask[rows, columns]
    return moved
