"""Measures without labels: ranks of the features, similarity of patches.

Nothing here needs more memory than two matrices ``[D, D]`` and ``MAX_TOKENS`` patches per encoder.

Legend: n images, q views of an image, B images in a batch, N patches, D width, T tokens.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from cmtmae_scale.evaluation.across import gather_from_ranks, sum_over_ranks
from cmtmae_scale.evaluation.encoders import CLS, PATCHES, Encoder, Tokens
from cmtmae_scale.evaluation.features import ReadOptions
from cmtmae_scale.evaluation.measured import Measured, mean_with_interval
from cmtmae_scale.method.diagnostics import spread_patches
from cmtmae_scale.runtime.collectives import on_all_ranks
from cmtmae_scale.runtime.launch import World
from dataloading.errors import DataError
from dataloading.index import Index
from dataloading.one_pass import OnePass, centre_crop
from dataloading.views import Boxes, crop_boxes

MAX_TOKENS = 2048
"""Patches, evenly over the images, whose pairs give the uniformity."""
PAIRS = 1 << 22
"""Pairs of patches whose cosines are in memory at once."""
SHARPNESS = 2.0
"""t of the uniformity."""
LIDAR_IMAGES, LIDAR_VIEWS = 1000, 10
"""n and q of LiDAR; its paper has q = 50."""
ROUNDING = 1e-12
"""Eigenvalues below this fraction of all variation are rounding errors."""
LIDAR_DELTA, LIDAR_EPSILON = 1e-4, 1e-7
CROP_SCALE, ASPECT_RATIO = (0.2, 1.0), (3 / 4, 4 / 3)
"""LiDAR's views: MAE's crops."""
ALL_IMAGES = "patches of all images"


class Moments:
    """Number, sum and second moment of rows of width D, streamed, in float64."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.total = torch.zeros(width, dtype=torch.float64, device=device)
        self.second = torch.zeros(width, width, dtype=torch.float64, device=device)

    def add(self, rows: Tensor) -> None:
        """Add rows ``[T, D]`` of this rank."""
        rows = rows.double()
        self.count += len(rows)
        self.total += rows.sum(0)
        self.second += rows.T @ rows

    def reduce(self) -> None:
        """Sum over ranks, once. A collective."""
        for each in (self.count, self.total, self.second):
            sum_over_ranks(each)


def entropy_rank(values: Tensor, epsilon: float = 0.0) -> float:
    """Return exp(entropy) of non-negative values ``[D]``, as fractions of their sum plus epsilon.

    1 where one value is all, D where all are equal; 0 where all values are 0.
    """
    total = float(values.sum())
    if not total:
        return 0.0
    share = values.double() / total + epsilon
    entropy = -(share * share.clamp_min(1e-300).log()).sum()
    return math.exp(float(entropy))


def rank_of_moment(second: Tensor, scale: Tensor | None = None) -> float:
    """Effective rank of rows from their second moment ``[D, D]``: of their singular values.

    The singular values are the roots of its eigenvalues. Eigenvalues below 1e-12 of ``scale``, its
    trace or the trace before rows were centred, are rounding errors and count as 0.

    Source: O. Roy, M. Vetterli, The effective rank (EUSIPCO 2007). RankMe (arXiv 2210.02885) is
    this number of the features of images, not centred.
    """
    eigenvalues = torch.linalg.eigvalsh(second.double().cpu()).clamp_min(0.0)
    floor = ROUNDING * float(second.trace() if scale is None else scale)
    return entropy_rank(torch.where(eigenvalues > floor, eigenvalues, 0.0).sqrt())


def centre_moment(moments: Moments) -> Tensor:
    """Return the second moment ``[D, D]`` of rows about their mean."""
    return moments.second - torch.outer(moments.total, moments.total) / moments.count


def lidar_of_moments(every: Moments, means: Moments) -> float:
    """Return LiDAR from the moments of all views' features and of the images' mean features.

    Returns:
        Effective rank of ``W^-1/2 B W^-1/2`` from its eigenvalues, in [0, D]: B the covariance of
        the mean features, W that of the views about their image's mean, plus 1e-4 I. At most n - 1
        eigenvalues are above 0; 0 where the images do not differ beyond rounding errors.

    Source: LiDAR (arXiv 2312.04000), section 3.
    """
    between = centre_moment(means) / means.count
    # every image has q views, so that the mean over views of the images' means is that over images
    within = every.second / every.count - means.second / means.count
    within = within + LIDAR_DELTA * torch.eye(len(within), dtype=within.dtype, device=within.device)
    values, axes = torch.linalg.eigh(within.cpu())
    whiten = axes / values.clamp_min(LIDAR_DELTA / 2).sqrt()  # W^-1/2 up to a rotation
    eigenvalues = torch.linalg.eigvalsh(whiten.T @ between.cpu() @ whiten)
    floor = ROUNDING * float(every.second.trace() / every.count) / LIDAR_DELTA
    return entropy_rank(torch.where(eigenvalues > floor, eigenvalues, 0.0), LIDAR_EPSILON)


def patch_similarity(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean cosine and mean Gaussian potential of the pairs of patches of each image.

    Args:
        patches: ``[B, N, D]``, N >= 2.

    Returns:
        Both float64 ``[B]``: the mean over pairs of distinct patches of the cosine, and of
        ``exp(-2 |x - y|^2)`` of patches of length 1.
    """
    unit = normalize(patches.double(), dim=-1)
    count = unit.shape[1]
    distinct = 1 - torch.eye(count, dtype=unit.dtype, device=unit.device)
    sums = [unit.new_zeros(0, 2)]
    for part in unit.split(max(PAIRS // count**2, 1)):
        cosines = part @ part.mT  # [b, N, N]
        potential = torch.exp(-SHARPNESS * (2 - 2 * cosines).clamp_min(0.0))
        both = [(x * distinct).sum((1, 2)) for x in (cosines, potential)]
        sums.append(torch.stack(both, dim=1))
    cosine, potential = (torch.cat(sums) / (count * (count - 1))).unbind(1)
    return cosine, potential


class Representation:
    """Streams the tokens of one encoder; ``rows`` gives its measures."""

    def __init__(self, encoder: Encoder, num_images: int, device: torch.device) -> None:
        probe = encode_blank(encoder, device)
        length, width = probe.patches.shape[1:]
        self.encoder = encoder
        self.images = {kind: Moments(width, device) for kind in feature_kinds(probe)}
        self.tokens = Moments(width, device)
        self.similarity = [torch.zeros(0, 3, dtype=torch.float64, device=device)]
        self.sample = [probe.patches[:0, 0]]
        self.every = max(math.ceil(num_images / MAX_TOKENS), 1)
        self.per_image = min(max(MAX_TOKENS // num_images, 1), length)
        self.bad = 0
        self.decoded = np.zeros(0, np.int64)
        """Places of all ranks' images, once ``rows`` has been called."""

    def add(self, tokens: Tokens, positions: Tensor) -> None:
        """Add images of this rank; ``positions`` are their numbers in the set, ``[B]``."""
        finite = tokens.patches.isfinite().flatten(1).all(1)
        if tokens.cls is not None:
            finite &= tokens.cls.isfinite().all(1)
        self.bad += int((~finite).sum())
        patches, positions = tokens.patches[finite], positions[finite]
        for kind, features in feature_kinds(tokens).items():
            self.images[kind].add(features[finite])
        self.tokens.add(patches.flatten(0, 1))
        self.similarity.append(torch.stack([positions.double(), *patch_similarity(patches)], 1))
        chosen = (positions % self.every == 0).nonzero()  # [b, 1]
        length = patches.shape[1]
        place = spread_patches(positions[chosen], self.per_image, length)
        self.sample.append(patches[chosen, place].flatten(0, 1))

    def rows(self) -> list[Measured]:
        """Return the measures over all ranks' images. A collective.

        Raises:
            DataError: on every rank, if features are not finite or there are none.
        """
        by_image = gather_from_ranks(torch.cat(self.similarity)).cpu()
        refuse_non_finite(self.encoder, self.bad, len(by_image))
        count = len(by_image)
        places, cosine, potential = by_image[by_image[:, 0].argsort()].numpy().T
        self.decoded = places.astype(np.int64)
        found: list[Measured] = []
        for kind, moments in self.images.items():
            moments.reduce()
            value = rank_of_moment(moments.second)
            found.append(Measured(self.encoder.name, kind, "rank", "RankMe", value, None, count))
        self.tokens.reduce()
        centred = rank_of_moment(centre_moment(self.tokens), self.tokens.second.trace())
        mean, interval = mean_with_interval(cosine)
        spread, between = mean_with_interval(potential)
        logs = None if between is None else (math.log(between[0]), math.log(between[1]))
        sample = gather_from_ranks(torch.cat(self.sample))
        values = [
            ("rank", "effective rank", rank_of_moment(self.tokens.second), None),
            ("rank", "effective rank, centred", centred, None),
            ("patches of an image", "cosine", mean, interval),
            ("patches of an image", "uniformity", math.log(spread), logs),
            (ALL_IMAGES, "uniformity", uniformity(sample), None),
        ]
        for method, measure, value, ends in values:
            row = Measured(self.encoder.name, "tokens", method, measure, value, ends, count)
            found.append(row)
        return found


def uniformity(tokens: Tensor) -> float:
    """Return the log of the mean Gaussian potential over pairs of distinct tokens ``[T, D]``.

    At most 0, and 0 where all tokens have one direction; -2 to -4 where they spread out.

    Source: T. Wang, P. Isola (arXiv 2005.10242), t = 2.
    """
    _, potential = patch_similarity(tokens[None])
    return math.log(float(potential))


def represent(
    encoders: Sequence[Encoder],
    index: Index,
    ids: NDArray[np.int64],
    reading: ReadOptions,
    world: World,
    device: torch.device,
) -> tuple[list[Measured], NDArray[np.int64]]:
    """Measure the features of listed images of an index, centre crops as for k-NN. A collective.

    The encoders have one image size.

    Returns:
        The measures, the same on every rank; and those of ``ids`` that can be decoded.

    Raises:
        DataError: on every rank: no image can be decoded, or features are not finite.
        ReadError: on every rank, if storage did not return an image to one of them.
    """
    found = [Representation(encoder, len(ids), device) for encoder in encoders]

    def add(images: Tensor, positions: Tensor) -> None:
        for one in found:
            one.add(encode_tokens(one.encoder, images), positions)

    read_views(add, index, ids, 1, encoders[0].size, reading, world, device)
    rows = [row for one in found for row in one.rows()]
    return rows, ids[found[0].decoded]


def measure_lidar(
    encoders: Sequence[Encoder],
    index: Index,
    ids: NDArray[np.int64],
    reading: ReadOptions,
    world: World,
    device: torch.device,
) -> list[Measured]:
    """Measure LiDAR of every encoder and kind of features. A collective; see ``represent``.

    Views are ten random crops of each of at most 1,000 images, evenly over ``ids``; at least two
    images are needed.
    """
    places = np.linspace(0, len(ids) - 1, min(LIDAR_IMAGES, len(ids))).round()
    ids = ids[places.astype(np.int64)]
    kinds: list[tuple[Encoder, str]] = []
    moments: dict[tuple[str, str], tuple[Moments, Moments]] = {}
    for encoder in encoders:
        for kind, blank in feature_kinds(encode_blank(encoder, device)).items():
            kinds.append((encoder, kind))
            width = blank.shape[1]
            moments[encoder.name, kind] = Moments(width, device), Moments(width, device)
    bad = dict.fromkeys(moments, 0)

    def add(images: Tensor, positions: Tensor) -> None:
        for encoder in encoders:
            for kind, rows in feature_kinds(encode_tokens(encoder, images)).items():
                views = rows.double().unflatten(0, (-1, LIDAR_VIEWS))  # [b, q, D]
                finite = views.isfinite().flatten(1).all(1)
                bad[encoder.name, kind] += int((~finite).sum())
                every, means = moments[encoder.name, kind]
                every.add(views[finite].flatten(0, 1))
                means.add(views[finite].mean(1))

    read_views(add, index, ids, LIDAR_VIEWS, encoders[0].size, reading, world, device)
    found: list[Measured] = []
    for encoder, kind in kinds:
        every, means = moments[encoder.name, kind]
        for each in (every, means):
            each.reduce()
        refuse_non_finite(encoder, bad[encoder.name, kind], int(means.count))
        value = lidar_of_moments(every, means)
        row = Measured(encoder.name, kind, "rank", "LiDAR", value, None, int(means.count))
        found.append(row)
    return found


def refuse_non_finite(encoder: Encoder, bad: int, good: int) -> None:
    """Refuse features that are not finite. A collective.

    Args:
        encoder: for its name.
        bad: number of this rank's images with such features.
        good: number of all ranks' other images.

    Raises:
        DataError: on every rank, also if there are no images.
    """
    bad = int(sum_over_ranks(torch.tensor([bad])))
    if bad:
        raise DataError(
            f"the features of {encoder.name} are not finite for {bad} of {bad + good} images: "
            "nothing is computed from them; evaluate other weights, or remove these images if the "
            "same images fail each time"
        )
    if not good:
        raise DataError("none of the images could be decoded; name a folder of intact images")


def encode_tokens(encoder: Encoder, images: Tensor) -> Tokens:
    """Encode images ``[B, S, S, 3]``, B >= 1."""
    if encoder.encode_tokens is None:
        raise TypeError(f"{encoder.name} has no patch features")
    return encoder.encode_tokens(images)


def encode_blank(encoder: Encoder, device: torch.device) -> Tokens:
    """Encode one grey image, for the shapes."""
    side = encoder.size
    return encode_tokens(
        encoder, torch.full((1, side, side, 3), 128, dtype=torch.uint8, device=device)
    )


def feature_kinds(tokens: Tokens) -> dict[str, Tensor]:
    """Return the features of whole images by kind, ``[B, D]``."""
    features = {} if tokens.cls is None else {CLS: tokens.cls}
    return features | {PATCHES: tokens.patches.mean(1)}


def read_views(
    use: Callable[[Tensor, Tensor], None],
    index: Index,
    ids: NDArray[np.int64],
    views: int,
    size: int,
    reading: ReadOptions,
    world: World,
    device: torch.device,
) -> None:
    """Call a function with each batch of decodable images. A collective.

    Args:
        use: takes uint8 images ``[B q, S, S, 3]``, the q views of an image together, and the
            images' places in ``ids``, int64 ``[B]``; takes part in no collective.
        index: the images.
        ids: rows of the index.
        views: q, number of random crops of each image; 1: the centre crop.
        size: S.
        reading: images per rank and forward, threads, decoder.
        world: this rank.
        device: of the images.

    Raises:
        ReadError: on every rank, if storage did not return an image to one of them.
    """

    def crop(positions: NDArray[np.int64], widths: Any, heights: Any) -> Boxes:
        place = positions // views
        boxes, _ = crop_boxes(
            0, place, positions % views, widths, heights, CROP_SCALE, ASPECT_RATIO
        )
        return boxes

    def read() -> None:
        with OnePass(
            index,
            np.repeat(ids, views),
            micro_batch=views * max(reading.micro_batch // views, 1),
            size=size,
            rank=world.rank,
            world_size=world.world_size,
            threads=reading.threads,
            decode=reading.decode,
            device=device,
            crop=centre_crop if views == 1 else crop,
        ) as batches:
            for batch in batches:
                whole = batch.valid.unflatten(0, (-1, views)).all(1)
                if bool(whole.any()):
                    images = batch.images[0].unflatten(0, (-1, views))[whole].flatten(0, 1)
                    use(images, batch.position[::views][whole] // views)

    on_all_ranks(read)
