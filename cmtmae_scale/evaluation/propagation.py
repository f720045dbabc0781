"""Label propagation: the mask of a clip's first frame, propagated by similar patches.

Legend: N patches of a frame in a grid of h x w, S side of the frames for the encoder, C classes of
the first mask (0 the background), F frames.

Source: DINO (arXiv 2104.14294, ``eval_video_segmentation.py``), after A. Jabri et al., Space-time
correspondence as a contrastive random walk (arXiv 2006.14613); J and F of F. Perazzi et al., A
benchmark dataset and evaluation methodology for video object segmentation (CVPR 2016).
"""

import json
import logging
import re
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from cmtmae_scale.errors import may_pass
from cmtmae_scale.evaluation.across import gather_from_ranks
from cmtmae_scale.evaluation.encoders import Encoder
from cmtmae_scale.evaluation.masks import (
    CLASS_MODES,
    IMAGE_SUFFIXES,
    VOID,
    decode_upright,
    open_file,
    read_error,
    read_mask,
    upright_size,
)
from cmtmae_scale.evaluation.measured import Measured, mean_with_interval
from cmtmae_scale.evaluation.representation import encode_tokens
from cmtmae_scale.runtime.collectives import broadcast_bytes, is_first, on_all_ranks
from cmtmae_scale.runtime.launch import World
from dataloading.errors import DataError
from dataloading.headers import PIL_ERRORS

logger = logging.getLogger(__name__)

CONTEXT = 7
"""Frames before the present frame that vote beside the first."""
NEIGHBOURS = 5
TEMPERATURE = 0.1
WINDOW = 0.2
"""Half of the window's side as a fraction of the grid: DINO's 12 of 60 rows at 480 pixels."""
FLAT = 1e-6
"""Range of a class as a fraction of its largest value, up to which it is rounding errors."""
TOLERANCE = 0.008
"""Distance at which contours match, as a fraction of the frame's diagonal."""
FRAMES, MASKS = "JPEGImages", "Annotations"
RESOLUTIONS = ("480p", "Full-Resolution", ".")
LAYOUT = (
    "name a folder in DAVIS's layout: JPEGImages/480p/CLIP/*.jpg and Annotations/480p/CLIP/*.png "
    "with the same names, one folder per clip"
)


class Clip(NamedTuple):
    """A clip."""

    name: str
    frames: list[Path]
    masks: dict[int, Path]
    """Mask by number of the frame; 0 is always there."""


@dataclass
class Clips:
    """Clips of a folder, and what is excluded."""

    clips: list[Clip]
    excluded: dict[str, int]
    """Number of clips or frames by reason."""


class Score(NamedTuple):
    """Mean over the scored frames of one object of a clip."""

    clip: str
    object: int
    j: float
    """Intersection over union of the regions."""
    f: float
    """F measure of the contours."""


class ShownClip(NamedTuple):
    """The last scored frame of the first clip, for a figure."""

    frames: tuple[NDArray[np.uint8], NDArray[np.uint8]]
    """First and last frame, ``[S, S, 3]``."""
    masks: tuple[NDArray[np.uint8], NDArray[np.uint8]]
    """Their masks, ``[S, S]``."""
    predicted: NDArray[np.uint8]


def open_clips(path: str) -> Clips:
    """List the clips of a folder on rank 0, for all ranks. A collective.

    Raises:
        DataError: on every rank: another layout, masks in colours, or no usable clip.
        ReadError: on every rank, if storage fails.
    """
    found = on_all_ranks(lambda: list_clips(Path(path)) if is_first() else None)
    text = "" if found is None else json.dumps([found.clips, found.excluded], default=str)
    clips, excluded = json.loads(broadcast_bytes(text.encode()))
    return Clips([restore_clip(*fields) for fields in clips], excluded)


def restore_clip(name: str, frames: list[str], masks: dict[str, str]) -> Clip:
    """Rebuild a clip from its fields in JSON."""
    numbered = {int(number): Path(mask) for number, mask in masks.items()}
    return Clip(name, [Path(frame) for frame in frames], numbered)


def list_clips(root: Path) -> Clips:
    """List clips whose first frame has a mask with an object."""
    folders = [(root / FRAMES / name, root / MASKS / name) for name in RESOLUTIONS]
    found = next(((a, b) for a, b in folders if a.is_dir() and b.is_dir()), None)
    if found is None:
        problem = f"no {FRAMES}/ and {MASKS}/ are here" if root.exists() else "no such folder"
        raise DataError(f"{root}: {problem}; {LAYOUT}")
    clips: list[Clip] = []
    excluded = Counter[str]()
    names = {folder.name for place in found for folder in place.glob("[!.]*/")}
    for name in sorted(names):
        frames, others = list_frames(found[0] / name)
        stems = {frame.stem: number for number, frame in enumerate(frames)}
        files = sorted((found[1] / name).glob("*.png"))
        masks = dict(sorted((stems[file.stem], file) for file in files if file.stem in stems))
        reason = refuse_clip(frames, masks)
        if reason:
            logger.warning("%s is excluded: clip %s", name, reason)
            excluded[f"clips {reason}"] += 1
            continue
        clips.append(Clip(name, frames, masks))
        excluded["frames without a mask"] += len(frames) - len(masks)
        excluded["masks without a frame"] += len(files) - len(masks)
        excluded["files among the frames that are no images"] += others
    excluded = +excluded  # without zeros
    if not clips:
        reasons = ", ".join(f"{count} {reason}" for reason, count in excluded.items())
        raise DataError(f"{root}: no usable clip ({reasons or 'no folder of frames'}); {LAYOUT}")
    return Clips(clips, dict(excluded))


def list_frames(folder: Path) -> tuple[list[Path], int]:
    """Return the frames of a clip in the order of the numbers in their names, and other files."""
    files = [one for one in folder.glob("[!.]*") if one.is_file()]
    frames = [one for one in files if one.suffix.lower() in IMAGE_SUFFIXES]
    return sorted(frames, key=frame_order), len(files) - len(frames)


def frame_order(frame: Path) -> tuple[list[str | int], str]:
    """Return a key that puts ``frame_10`` after ``frame_9``."""
    parts = re.split("([0-9]+)", frame.stem)
    return [int(part) if number % 2 else part for number, part in enumerate(parts)], frame.name


def refuse_clip(frames: Sequence[Path], masks: dict[int, Path]) -> str:
    """Return why a clip is excluded, or ``""``.

    Raises:
        DataError: for a mask in colours.
        ReadError: if storage fails.
    """
    if len({frame.stem for frame in frames}) < len(frames):
        return "with two frames of one name"
    if len(frames) < 2:
        return "of fewer than two frames"
    if 0 not in masks:
        return "without a mask of the first frame"
    if len(masks) < 2:
        return "without a mask of a later frame"
    try:
        for number, mask in masks.items():
            with open_file(mask) as opened:
                mode, size = opened.mode, opened.size
            if mode not in CLASS_MODES:
                raise DataError(
                    f"{mask}: the mask is in colours (mode {mode}), and colours are not object "
                    "numbers; save masks as PNG with a palette or one channel, one number per "
                    "object"
                )
            with open_file(frames[number]) as opened:
                if upright_size(opened) != size:
                    return "with a mask of another size than its frame"
        first = np.unique(np.asarray(read_mask(masks[0])))
    except PIL_ERRORS as error:
        if isinstance(error, OSError) and may_pass(error):
            raise read_error(masks[0].parent, error) from error
        return "that cannot be decoded"
    if not any(value not in (0, VOID) for value in first):
        return f"without an object in the first mask (0 is the background, {VOID} void)"
    return ""


def propagate_clips(
    encoder: Encoder, clips: Sequence[Clip], world: World, device: torch.device
) -> tuple[list[Measured], ShownClip | None]:
    """Propagate the first mask of every clip and score all frames after it. A collective.

    Clip c belongs to rank ``c mod world_size``. At most ``CONTEXT + 2`` frames are in memory.

    Returns:
        Rows of J&F, J and F with intervals over objects, the same on every rank; and frames for a
        figure, on rank 0.

    Raises:
        DataError, ReadError: on every rank: features that are not finite, or a file that cannot be
            read.
    """
    own: list[tuple[int, Score]] = []
    shown: ShownClip | None = None

    def propagate_own() -> None:
        nonlocal shown
        for number in range(world.rank, len(clips), world.world_size):
            scores, seen = propagate_clip(encoder, clips[number], device)
            own.extend((number, score) for score in scores)
            shown = shown or seen

    on_all_ranks(propagate_own)
    flat = [[float(number), float(x.object), x.j, x.f] for number, x in own]
    scored = gather_from_ranks(torch.tensor(flat, dtype=torch.float64).view(-1, 4))
    scored = scored[np.lexsort((scored[:, 1].numpy(), scored[:, 0].numpy()))].numpy()
    if not len(scored):
        raise DataError("no object of a first mask can be scored in a later frame")
    j, f = scored[:, 2], scored[:, 3]
    rows: list[Measured] = []
    for measure, values in (("J&F", (j + f) / 2), ("J", j), ("F", f)):
        mean, interval = mean_with_interval(values)
        parts = {
            f"{clips[int(clip)].name}/{int(object_number)}": float(value)
            for (clip, object_number), value in zip(scored[:, :2], values, strict=True)
        }
        rows.append(
            Measured(
                *(encoder.name, "patches", "propagation", measure),
                *(mean, interval, len(values), parts),
            )
        )
    return rows, shown


@torch.no_grad()
def propagate_clip(
    encoder: Encoder, clip: Clip, device: torch.device
) -> tuple[list[Score], ShownClip]:
    """Propagate the mask of a clip's first frame.

    Returns:
        A score per object of the first mask, and the last scored frame.
    """
    grid = encoder.grid
    first_mask = np.asarray(load_mask(clip.masks[0]))
    objects = [int(value) for value in np.unique(first_mask) if value not in (0, VOID)]
    classes = [0, *objects]
    allowed = window_mask(grid, device)
    first = encode_frame(encoder, clip.frames[0], device)
    labels = patch_labels(first_mask, classes, grid, device)
    context: deque[tuple[Tensor, Tensor]] = deque(maxlen=CONTEXT)
    sums: dict[int, list[tuple[float, float]]] = {value: [] for value in objects}
    side, seen = encoder.size, None
    for number in range(1, len(clip.frames)):
        features = encode_frame(encoder, clip.frames[number], device)
        sources = [(first, labels), *context]
        votes = propagate(features, sources, allowed)
        context.append((features, votes))
        if number not in clip.masks:
            continue
        truth = np.asarray(load_mask(clip.masks[number]))
        predicted = upsample_labels(votes, classes, grid, truth.shape)
        known = truth != VOID
        for value in objects:
            pair = (predicted == value) & known, (truth == value) & known
            sums[value].append((region_similarity(*pair), contour_accuracy(*pair)))
        seen = number, truth, predicted
    if seen is None:
        raise ValueError(f"{clip.name} has no mask after its first frame")
    number, truth, predicted = seen
    frames = [load_frame(clip.frames[i], side) for i in (0, number)]
    squares = [resize_mask(mask, side) for mask in (first_mask, truth, predicted)]
    shown = ShownClip((frames[0], frames[1]), (squares[0], squares[1]), squares[2])
    scores = [
        Score(clip.name, value, *(float(x) for x in np.mean(found, axis=0)))
        for value, found in sums.items()
    ]
    return scores, shown


def load_frame(file: Path, side: int) -> NDArray[np.uint8]:
    """Read a frame, squeezed into a square, uint8 ``[S, S, 3]``.

    Raises:
        ReadError: if it cannot be read.
        DataError: if it cannot be decoded.
    """
    try:
        with open_file(file) as opened:
            image = decode_upright(opened)
    except PIL_ERRORS as error:
        raise refuse_file(file, error) from error
    return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))


def load_mask(file: Path) -> Image.Image:
    """Read a mask; errors as ``load_frame``."""
    try:
        return read_mask(file)
    except PIL_ERRORS as error:
        raise refuse_file(file, error) from error


def refuse_file(file: Path, error: Exception) -> DataError:
    """Return the error for a file that cannot be used."""
    if isinstance(error, OSError) and error.errno is not None:
        return read_error(file, error)
    return DataError(f"{file}: cannot be decoded ({error}); repair it or remove its clip")


def resize_mask(mask: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Squeeze a mask into a square by its nearest pixels."""
    return np.asarray(Image.fromarray(mask).resize((side, side), Image.Resampling.NEAREST))


def encode_frame(encoder: Encoder, file: Path, device: torch.device) -> Tensor:
    """Return a frame's patches of length 1, float32 ``[N, D]``.

    Raises:
        DataError: if they are not finite, or the frame cannot be decoded.
    """
    image = torch.from_numpy(load_frame(file, encoder.size).copy())[None].to(device)
    patches = encode_tokens(encoder, image).patches[0]
    if not bool(patches.isfinite().all()):
        raise DataError(
            f"the features of {encoder.name} are not finite for {file}: nothing is propagated; "
            "evaluate other weights"
        )
    return F.normalize(patches, dim=-1)


def window_mask(grid: tuple[int, int], device: torch.device) -> Tensor:
    """Return which patches may vote for which, bool ``[N, N]``: those near in both directions."""
    height, width = grid
    row = torch.arange(height * width, device=device) // width
    column = torch.arange(height * width, device=device) % width
    reach = max(round(WINDOW * height), 1), max(round(WINDOW * width), 1)
    near_rows = (row[:, None] - row).abs() <= reach[0]
    return near_rows & ((column[:, None] - column).abs() <= reach[1])


def patch_labels(
    mask: NDArray[np.uint8], classes: Sequence[int], grid: tuple[int, int], device: torch.device
) -> Tensor:
    """Return each class's fraction of each patch, float32 ``[N, C]``; void belongs to no class.

    DINO takes the class of one pixel per patch, which loses small objects on small grids.
    """
    whole = torch.from_numpy(mask.copy()).to(device)
    each = torch.stack([(whole == value).float() for value in classes])[None]
    return F.adaptive_avg_pool2d(each, grid)[0].flatten(1).T.contiguous()


def propagate(
    features: Tensor, sources: Sequence[tuple[Tensor, Tensor]], allowed: Tensor
) -> Tensor:
    """Return the labels of a frame from those of other frames.

    Args:
        features: patches of the frame of length 1, ``[N, D]``.
        sources: patches ``[N, D]`` and labels ``[N, C]`` of other frames.
        allowed: patches that may vote, bool ``[N, N]``.

    Returns:
        float32 ``[N, C]``: the mean label of the 5 nearest patches of all sources within the
        window, weighted with ``exp(cosine / 0.1)``.
    """
    cosines = torch.cat([features @ theirs.T for theirs, _ in sources], dim=1)
    cosines = cosines.masked_fill(~allowed.repeat(1, len(sources)), -torch.inf)
    labels = torch.cat([theirs for _, theirs in sources])
    near, places = cosines.topk(min(NEIGHBOURS, cosines.shape[1]), dim=1)
    weights = (near / TEMPERATURE).softmax(1)
    return torch.einsum("nk,nkc->nc", weights, labels[places])


def upsample_labels(
    labels: Tensor, classes: Sequence[int], grid: tuple[int, int], size: tuple[int, ...]
) -> NDArray[np.uint8]:
    """Return the class of each pixel from labels ``[N, C]``, uint8 of the frame's size.

    Each class is scaled to [0, 1] over the frame before the largest wins, as in DINO; a class
    that does not vary beyond rounding, as an object that fills the frame, keeps its values.
    """
    maps = labels.T.view(1, len(classes), *grid)
    maps = F.interpolate(maps, size=(size[0], size[1]), mode="bilinear")[0]
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    varies = high - low > FLAT * high
    scaled = torch.where(varies, (maps - low) / (high - low).clamp_min(1e-12), maps)
    return np.asarray(classes, np.uint8)[scaled.argmax(0).cpu().numpy()]


def region_similarity(predicted: NDArray[np.bool_], truth: NDArray[np.bool_]) -> float:
    """J: intersection over union of two regions, bool ``[H, W]``; 1 where both are empty."""
    union = (predicted | truth).sum()
    return float((predicted & truth).sum() / union) if union else 1.0


def contour_accuracy(predicted: NDArray[np.bool_], truth: NDArray[np.bool_]) -> float:
    """F: harmonic mean of precision and recall of the contours, bool ``[H, W]``.

    Pixels of two contours match within 0.008 of the diagonal. 1 where both contours are empty, 0
    where one is.
    """
    contours = contour_of(predicted), contour_of(truth)
    reach = int(np.ceil(TOLERANCE * np.hypot(*truth.shape)))
    near = [widen(contour, reach) for contour in contours]
    counts = [contour.sum() for contour in contours]
    if not all(counts):
        return float(not any(counts))
    precision = (contours[0] & near[1]).sum() / counts[0]
    recall = (contours[1] & near[0]).sum() / counts[1]
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def contour_of(region: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return pixels whose right, lower or lower right neighbour differs, bool ``[H, W]``."""
    padded = np.pad(region, ((0, 1), (0, 1)), mode="edge")
    right, below, across = padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    return (region != right) | (region != below) | (region != across)


def widen(contour: NDArray[np.bool_], reach: int) -> NDArray[np.bool_]:
    """Return the pixels within ``reach`` pixels of a contour, bool ``[H, W]``."""
    padded = np.pad(contour, reach)
    height, width = contour.shape
    found = np.zeros_like(contour)
    for down in range(-reach, reach + 1):
        for right in range(-reach, reach + 1):
            if down * down + right * right <= reach * reach:
                top, left = reach + down, reach + right
                found |= padded[top : top + height, left : left + width]
    return found
