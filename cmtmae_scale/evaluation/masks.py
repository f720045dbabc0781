"""Images with masks of classes: find them, check them, read them together.

Legend: B images in a batch, S their side in pixels, n images of the set.
"""

import hashlib
import json
import logging
import os
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from cmtmae_scale.errors import may_pass
from cmtmae_scale.evaluation.features import ReadOptions
from cmtmae_scale.runtime.collectives import (
    broadcast_bytes,
    is_first,
    on_all_ranks,
    on_all_ranks_for_long,
)
from cmtmae_scale.runtime.launch import World
from dataloading.errors import DataError, ReadError
from dataloading.files import open_regular
from dataloading.headers import PIL_ERRORS, open_image
from dataloading.order import sample_ids
from dataloading.torch_decode import to_rgb

logger = logging.getLogger(__name__)

VOID = 255
"""Value of pixels without a class, as in Pascal VOC."""
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
MASK_FOLDERS = ("masks", "annotations")
TURNED, ORIENTATION = ("JPEG", "MPO", "WEBP"), 0x0112
"""Formats whose images are turned upright, and EXIF's tag; a PNG's header may not hold it."""
CLASS_MODES = ("P", "L", "1", "I", "I;16")
"""Modes of Pillow with one number per pixel."""
GREY_STEPS = {"L;2": 85, "L;4": 17}
"""Factor by which Pillow stretches the grey levels of a PNG of 2 or 4 bits, to end at 255."""
NO_MASK, NO_IMAGE = "without a mask", "without an image"
SAME_NAME = "with another image of the same name"
OTHER_KIND = "that are files of another kind"
OTHER_SIZE, BROKEN = "with a mask of another size", "that cannot be decoded"
LAYOUTS = (
    "name a folder with images/ and masks/ (the same names, masks as PNG), or Pascal VOC's folder "
    "(JPEGImages/, SegmentationClass/, ImageSets/Segmentation/*.txt) or one of its lists"
)
SPLIT_SALT = 0x3A5C


class Pair(NamedTuple):
    """An image and its mask, both relative to the root."""

    image: str
    mask: str


@dataclass
class MaskedSet:
    """Images with masks."""

    root: Path
    pairs: list[Pair]
    excluded: dict[str, int] = field(default_factory=dict)
    """Number of images that were not listed, by reason."""
    digest: str = ""
    """SHA-256 over names and file sizes."""
    broken: set[int] = field(default_factory=set)
    """Listed images of this rank that could not be decoded."""

    def __len__(self) -> int:
        return len(self.pairs)


class Decoded(NamedTuple):
    """A decoded image and its mask, squeezed into squares."""

    views: list[NDArray[np.uint8]]
    """The image at each requested size, ``[S, S, 3]``."""
    mask: NDArray[np.uint8]
    """Classes at the first size, ``[S, S]``."""


class MaskedBatch(NamedTuple):
    """Decoded images of this rank, whole, resized to squares."""

    images: tuple[Tensor, ...]
    """uint8 ``[B, S, S, 3]`` for each requested size."""
    masks: Tensor
    """Classes of the first size, uint8 ``[B, S, S]``; 255: void."""
    numbers: Tensor
    """Index of each image in the set, int64 ``[B]``."""


def open_masked(path: str, part: str) -> MaskedSet:
    """List images with masks and compare their headers on rank 0, for all ranks. A collective.

    Args:
        path: a folder of one of the two layouts, or a list of Pascal VOC's layout.
        part: list to read where the path is a folder of Pascal VOC, ``train`` or ``val``.

    Raises:
        DataError: on every rank: unknown layout, masks in colours, or no usable image.
        ReadError: on every rank, if storage fails.
    """
    found = on_all_ranks_for_long(lambda: list_pairs(Path(path), part) if is_first() else None)
    text = "" if found is None else json.dumps([found.pairs, found.excluded, found.digest])
    pairs, excluded, digest = json.loads(broadcast_bytes(text.encode()))
    root = on_all_ranks(lambda: find_root(Path(path)))
    return MaskedSet(root, [Pair(*pair) for pair in pairs], excluded, digest)


def split_masked(whole: MaskedSet, fraction: float, seed: int) -> tuple[MaskedSet, MaskedSet]:
    """Split a set in two, a fraction of the images in the first, both with one at least.

    Raises:
        DataError: for a set of one image.
    """
    if len(whole) < 2:
        raise DataError(f"{whole.root}: one image cannot be split in two; give --test a set too")
    order, _ = sample_ids(len(whole), seed + SPLIT_SALT, np.arange(len(whole)))
    count = min(max(round(fraction * len(whole)), 1), len(whole) - 1)
    train, test = ([whole.pairs[row] for row in np.sort(part)] for part in np.split(order, [count]))
    first = MaskedSet(whole.root, train, whole.excluded, whole.digest)
    return first, MaskedSet(whole.root, test, {}, whole.digest)


def is_voc(path: Path) -> bool:
    """Return whether a folder has Pascal VOC's layout."""
    return (path / "JPEGImages").is_dir() and (path / "SegmentationClass").is_dir()


def find_root(path: Path) -> Path:
    """Return the folder that holds images and masks.

    Raises:
        DataError: if the path has none of the layouts.
    """
    above = list(path.resolve().parents)[2:3]  # none of a list near the root of the file system
    if path.suffix == ".txt" and path.is_file() and above and is_voc(above[0]):
        return above[0]
    if is_voc(path) or mask_folder(path) is not None:
        return path
    problem = "no images with masks are here" if path.exists() else "no such file or folder"
    raise DataError(f"{path}: {problem}; {LAYOUTS}")


def mask_folder(path: Path) -> Path | None:
    """Return the folder of masks beside ``images/``."""
    if not (path / "images").is_dir():
        return None
    return next((path / name for name in MASK_FOLDERS if (path / name).is_dir()), None)


def list_pairs(path: Path, part: str) -> MaskedSet:
    """List the images with a mask of their size; see ``open_masked``."""
    root = find_root(path)
    found = MaskedSet(root, [])
    excluded: Counter[str] = Counter()
    digest = hashlib.sha256()
    first: dict[str, str] = {}
    candidates = list(list_voc(root, path, part) if is_voc(root) else list_folder(root))
    for image, mask, problem in candidates:
        if image is not None and mask is not None and not problem:
            problem = compare_headers(image, mask)
        if problem:
            excluded[problem] += 1
            first.setdefault(problem, (image or mask or root).name)
        elif image is not None and mask is not None:
            pair = Pair(*(str(file.relative_to(root)) for file in (image, mask)))
            found.pairs.append(pair)
            sizes = image.stat().st_size, mask.stat().st_size
            listed = f"{pair.image} {pair.mask} {sizes}\n"
            digest.update(listed.encode(errors="surrogateescape"))  # names may be invalid UTF-8
    reasons = [f"{n} {reason} (first: {first[reason]})" for reason, n in sorted(excluded.items())]
    if not found.pairs:
        listed = f" of {len(candidates)} images: {', '.join(reasons)}" if reasons else ""
        raise DataError(f"{path}: no image with a mask{listed}; {LAYOUTS}")
    if reasons:
        logger.warning("%s: excluded images: %s", path, ", ".join(reasons))
    found.excluded, found.digest = dict(excluded), digest.hexdigest()
    return found


class Candidate(NamedTuple):
    """An image and its mask; ``None``: it does not exist."""

    image: Path | None
    mask: Path | None
    problem: str
    """Why they are not a pair; empty: they are a pair if their headers fit."""


def make_candidate(image: Path | None, mask: Path | None) -> Candidate:
    """Pair an image with its mask, or record which of them does not exist."""
    problem = NO_IMAGE if image is None else NO_MASK if mask is None else ""
    return Candidate(image, mask, problem)


def list_voc(root: Path, path: Path, part: str) -> Iterator[Candidate]:
    """Yield the images of a list of Pascal VOC, in the order of the list.

    Raises:
        DataError: if there is no list.
    """
    listed = root / "ImageSets" / "Segmentation" / f"{part}.txt" if path.is_dir() else path
    try:
        names = listed.read_text().split()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{listed}: the list cannot be read ({error}); {LAYOUTS}") from error
    for name in dict.fromkeys(names):
        files = root / "JPEGImages" / f"{name}.jpg", root / "SegmentationClass" / f"{name}.png"
        yield make_candidate(*(file if file.is_file() else None for file in files))


def list_folder(root: Path) -> Iterator[Candidate]:
    """Yield the images of a folder, files that are not images, and masks without an image.

    Of images of one name, such as ``a.jpg`` and ``a.png``, none is known to be the mask's.
    """
    masks = mask_folder(root) or root
    images: dict[Path, list[Path]] = {}
    for file in sorted(walk_files(root / "images")):
        if file.suffix.lower() in IMAGE_SUFFIXES:
            images.setdefault(file.relative_to(root / "images").with_suffix(""), []).append(file)
        elif file.is_file() and not file.name.startswith("."):
            yield Candidate(file, None, OTHER_KIND)
    for name, files in images.items():
        mask = masks / f"{name}.png"
        for image in files:
            found = make_candidate(image, mask if mask.is_file() else None)
            yield found if len(files) == 1 else found._replace(problem=SAME_NAME)
    for mask in sorted(walk_files(masks)):
        if mask.suffix == ".png" and mask.relative_to(masks).with_suffix("") not in images:
            yield make_candidate(None, mask)


def walk_files(folder: Path, above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[Path]:
    """Yield the files under a folder; links are followed, but not back to a folder above.

    ``Path.rglob`` skips links to folders, and folders that cannot be listed, without an error.
    Files of every kind are yielded, so that the caller can count those that it does not use.

    Raises:
        DataError: for a folder that cannot be listed.
        OSError: if storage fails.
    """
    try:
        facts = folder.stat()
        with os.scandir(folder) as entries:
            inside = list(entries)
    except PermissionError as error:
        text = f"{folder}: cannot be listed ({error.strerror}); make it readable"
        raise DataError(text) from error
    own = facts.st_dev, facts.st_ino
    if own in above:
        return
    for entry in inside:
        if entry.is_dir():
            yield from walk_files(Path(entry.path), above | {own})
        else:
            yield Path(entry.path)


def compare_headers(image: Path, mask: Path) -> str:
    """Return why a pair is excluded, or ``""``.

    Raises:
        DataError: for a mask in colours.
        ReadError: if storage fails.
    """
    try:
        with open_file(mask) as opened:
            mode, size = opened.mode, opened.size
        with open_file(image) as opened:
            upright = upright_size(opened)
    except PIL_ERRORS as error:
        if isinstance(error, OSError) and may_pass(error):
            raise read_error(image, error) from error
        return BROKEN
    if mode not in CLASS_MODES:
        raise DataError(
            f"{mask}: the mask is in colours (mode {mode}), and colours are not classes; save "
            "masks as PNG with a palette or with one channel of 8 bits, one number per class"
        )
    return "" if size == upright else OTHER_SIZE


def read_error(file: Path, error: OSError) -> ReadError:
    """Return the error for a file that cannot be read; a failed read does not name the file."""
    return ReadError(f"{error.filename or file}: cannot be read ({error.strerror}); try again")


@contextmanager
def open_file(file: Path) -> Iterator[Image.Image]:
    """Open an image of a format that ``data.path`` takes; nothing is decoded yet.

    Raises:
        PIL_ERRORS: if it cannot be opened.
    """
    with open(open_regular(file), "rb") as data, open_image(data) as opened:
        yield opened


def upright_size(opened: Image.Image) -> tuple[int, int]:
    """Return width and height of an image once it is turned upright."""
    width, height = opened.size
    is_turned = opened.format in TURNED and opened.getexif().get(ORIENTATION, 1) >= 5
    return (height, width) if is_turned else (width, height)


def decode_upright(opened: Image.Image) -> Image.Image:
    """Decode an image as training does: upright, eight bits of RGB.

    Raises:
        PIL_ERRORS: if it cannot be decoded.
    """
    return to_rgb(ImageOps.exif_transpose(opened) if opened.format in TURNED else opened)


def read_mask(file: Path) -> Image.Image:
    """Read a mask as classes 0 to 254 and 255 for void, mode ``L``.

    Raises:
        DataError: for class numbers above 255.
        PIL_ERRORS: if it cannot be decoded.
    """
    with open_file(file) as opened:
        step = grey_step(opened)
        values = np.array(opened).astype(np.int64) // step
    if values.size and not 0 <= values.min() <= values.max() <= VOID:
        raise DataError(
            f"{file}: class numbers from {values.min()} to {values.max()}; expected 0 to 254, and "
            "255 for void: renumber the classes"
        )
    return Image.fromarray(values.astype(np.uint8))


def grey_step(opened: Image.Image) -> int:
    """Return the divisor that restores the stored levels of an image that is not decoded yet."""
    kinds = [tile[3] for tile in getattr(opened, "tile", [])]
    return GREY_STEPS.get(kinds[0], 1) if kinds and isinstance(kinds[0], str) else 1


def read_pair(images: MaskedSet, number: int, sizes: tuple[int, ...]) -> Decoded | None:
    """Read an image at each size and its mask at the first; ``None``: it cannot be decoded.

    The whole image is squeezed into a square: the image bicubic, the mask by its nearest pixels.

    Raises:
        DataError: for class numbers above 255.
        ReadError: if storage fails.

    Source: CAPI (arXiv 2502.08769), ``eval_segmentation.py``.
    """
    pair = images.pairs[number]
    try:
        mask = read_mask(images.root / pair.mask)
        with open_file(images.root / pair.image) as opened:
            image = decode_upright(opened)
    except FileNotFoundError as error:
        raise ReadError(
            f"{error.filename}: the file was deleted; restore it and try again"
        ) from error
    except PIL_ERRORS as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise read_error(images.root / pair.image, error) from error
        logger.warning("%s is excluded: %s", pair.image, error)
        return None
    views = [np.asarray(image.resize((side, side), Image.Resampling.BICUBIC)) for side in sizes]
    square = mask.resize((sizes[0], sizes[0]), Image.Resampling.NEAREST)
    return Decoded(views, np.asarray(square))


def masked_batches(
    images: MaskedSet,
    sizes: tuple[int, ...],
    reading: ReadOptions,
    world: World,
    device: torch.device,
) -> Iterator[MaskedBatch]:
    """Yield every image once over all ranks; equally many batches per rank. A collective.

    Block b of ``reading.micro_batch`` images belongs to rank ``b mod world_size``. The next block
    is read while the present block is used. A batch may be empty. Images that cannot be decoded are
    logged, added to ``images.broken``, and have no row.

    Raises:
        DataError, ReadError: on every rank; see ``read_pair``.
    """
    block = reading.micro_batch
    rounds = -(-len(images) // (block * world.world_size))
    pending: deque[tuple[list[int], list[Future[Decoded | None]]]] = deque()
    with ThreadPoolExecutor(reading.threads) as pool:

        def submit(turn: int) -> None:
            start = (turn * world.world_size + world.rank) * block
            numbers = list(range(start, min(start + block, len(images))))
            pending.append((numbers, [pool.submit(read_pair, images, i, sizes) for i in numbers]))

        submit(0)
        for turn in range(rounds):
            numbers, futures = pending.popleft()
            if turn + 1 < rounds:
                submit(turn + 1)
            found = on_all_ranks(lambda each=futures: [future.result() for future in each])
            yield pack_batch(images, sizes, numbers, found, device)


def pack_batch(
    images: MaskedSet,
    sizes: tuple[int, ...],
    numbers: list[int],
    found: list[Decoded | None],
    device: torch.device,
) -> MaskedBatch:
    """Stack what ``read_pair`` returned, and count what it excluded."""
    kept = [(number, one) for number, one in zip(numbers, found, strict=True) if one is not None]
    images.broken.update(set(numbers) - {number for number, _ in kept})
    views = [np.zeros((len(kept), side, side, 3), np.uint8) for side in sizes]
    masks = np.zeros((len(kept), sizes[0], sizes[0]), np.uint8)
    for row, (_, one) in enumerate(kept):
        masks[row] = one.mask
        for view, pixels in zip(views, one.views, strict=True):
            view[row] = pixels
    return MaskedBatch(
        tuple(torch.from_numpy(view).to(device) for view in views),
        torch.from_numpy(masks).to(device),
        torch.tensor([number for number, _ in kept], dtype=torch.int64, device=device),
    )


def cut_patches(masks: Tensor, rows: int, columns: int) -> Tensor:
    """Return the pixels of each patch, uint8 ``[B, N, p * p]``, from masks ``[B, S, S]``."""
    batch, height, width = masks.shape
    tall, wide = height // rows, width // columns
    cut = masks.reshape(batch, rows, tall, columns, wide)
    return cut.permute(0, 1, 3, 2, 4).reshape(batch, rows * columns, tall * wide)
