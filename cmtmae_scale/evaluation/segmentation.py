"""Semantic segmentation of frozen patch features: k-NN and a linear classifier.

Legend: n patches of this rank, N patches of an image in a grid of h x w, p pixels along a patch, D
width, C classes, S side of the images, I images.

Source: CAPI (arXiv 2502.08769, ``eval_segmentation.py``): standardised features, k-NN over pixel
labels of patches, logistic regression on the most frequent label of a patch, hyperparameters chosen
on a tenth of the training images. DINOv2 (arXiv 2304.07193): the linear head's logits are
upsampled bilinearly.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from cmtmae_scale.errors import ConfigError
from cmtmae_scale.evaluation.across import gather_from_ranks, sum_over_ranks
from cmtmae_scale.evaluation.encoders import Encoder
from cmtmae_scale.evaluation.features import (
    Column,
    FeatureTable,
    ReadOptions,
    Standardiser,
    fit_standardiser,
)
from cmtmae_scale.evaluation.knn import find_neighbours
from cmtmae_scale.evaluation.logistic import fit_logistic
from cmtmae_scale.evaluation.masks import VOID, MaskedSet, cut_patches, masked_batches
from cmtmae_scale.evaluation.measured import Measured
from cmtmae_scale.evaluation.overlap import VALUES, count_pixels, mean_iou, score_rows
from cmtmae_scale.method.diagnostics import spread_patches
from cmtmae_scale.runtime.launch import World
from dataloading.errors import DataError
from dataloading.order import sample_ids

NEIGHBOURS = (1, 3, 10, 30)
STRENGTHS = (1e-4, 1e-2, 1.0)
"""C of the logistic regression; CAPI has eight between 1e-6 and 1e5."""
HELD_OUT = 0.1
MAX_PATCHES = 1 << 19
"""Training patches over all ranks; of more images each gives fewer patches."""
QUERIES = 2048
"""Patches whose neighbours are found at once."""
VOTERS = 256
"""Patches whose pixels vote at once."""
SHOWN = 6
"""Images whose predictions are kept for a figure."""
HELD_OUT_SALT = 0x4E1D
COLUMN = Column("segmentation", "patches")


class PatchTable(NamedTuple):
    """Labelled training patches of this rank, standardised with the patches of all ranks."""

    positions: Tensor
    """Image number times N plus patch, ascending int64 ``[n]``."""
    images: Tensor
    """Image number, int64 ``[n]``."""
    features: Tensor
    """float32 ``[n, D]``."""
    pixels: Tensor
    """Class index of every pixel, uint8 ``[n, p * p]``; C: void."""
    labels: Tensor
    """Most frequent class index of each patch, int64 ``[n]``."""

    def where(self, chosen: Tensor) -> "PatchTable":
        """Select patches by a mask, bool ``[n]``."""
        return PatchTable(*(part[chosen] for part in self))


class Training(NamedTuple):
    """All that is learnt from the training images before a classifier."""

    table: PatchTable
    standard: Standardiser
    classes: Tensor
    """Class numbers in the masks, ascending int64 ``[C]``."""


class Shown(NamedTuple):
    """Some test images for a figure, of rank 0."""

    images: Tensor
    """uint8 ``[I, S, S, 3]``."""
    masks: Tensor
    """uint8 ``[I, S, S]``."""
    features: Tensor
    """float32 ``[I, N, D]``."""
    predicted: dict[str, Tensor]
    """uint8 ``[I, S, S]`` by method."""


def segment(
    encoder: Encoder,
    train: MaskedSet,
    test: MaskedSet,
    reading: ReadOptions,
    seed: int,
    world: World,
    device: torch.device,
    neighbours: Sequence[int] = NEIGHBOURS,
    strengths: Sequence[float] = STRENGTHS,
) -> tuple[list[Measured], Shown | None]:
    """Segment the test images by k-NN and by a linear classifier. A collective.

    Training patches stay in memory, at most ``MAX_PATCHES`` over all ranks; test images are read
    one batch at a time.

    Args:
        encoder: with ``encode_tokens``.
        train: images to learn from; with several values to choose from, a tenth of the images is
            held out to choose on, and is learnt from after the choice.
        test: images to segment.
        reading: images per rank and forward, reader threads.
        seed: of the held-out images.
        world: this rank.
        device: of the encoder.
        neighbours: values of k to choose from; one: nothing is chosen; none: no k-NN.
        strengths: values of C to choose from, likewise.

    Returns:
        Rows of mIoU and pixel accuracy, the same on every rank; and some predictions.

    Raises:
        ConfigError: if nothing can be held out.
        DataError: features that are not finite, or fewer than two classes.
    """
    fit = learn_patches(encoder, train, reading, world, device)
    k = neighbours[0] if neighbours else None
    strength = strengths[0] if strengths else None
    if len(neighbours) > 1 or len(strengths) > 1:
        k, strength = choose(fit, seed, neighbours, strengths)
    methods: dict[str, KnnSegmenter | LinearSegmenter] = {}
    if k is not None:
        methods[f"k-NN segmentation, k={k}"] = KnnSegmenter(fit, k)
    if strength is not None:
        methods[f"linear segmentation, C={strength:g}"] = LinearSegmenter(fit, strength)
    parts: dict[str, list[Tensor]] = {name: [] for name in methods}
    shown: Shown | None = None
    for batch in masked_batches(test, (encoder.size,), reading, world, device):
        features = encode_patches(encoder, batch.images[0])
        refuse_bad(encoder, features, "test")
        queries = fit.standard(features.flatten(0, 1)).float()
        predicted = {name: method(queries, encoder) for name, method in methods.items()}
        for name in methods:
            parts[name].append(count_pixels(batch.numbers, batch.masks, predicted[name]))
        if shown is None and len(features):
            part = slice(0, SHOWN)
            cut = {name: one[part].cpu() for name, one in predicted.items()}
            images, masks = batch.images[0][part].cpu(), batch.masks[part].cpu()
            shown = Shown(images, masks, features[part].cpu(), cut)
    rows: list[Measured] = []
    for name, found in parts.items():
        counts = gather_from_ranks(torch.cat(found))
        counts = counts[counts[:, 0].argsort(), 1:].cpu().numpy()
        rows += score_rows(encoder.name, name, counts)
    return rows, shown


def encode_patches(encoder: Encoder, images: Tensor) -> Tensor:
    """Encode images; patch features ``[B, N, D]``, also of no image."""
    if encoder.encode_tokens is None:
        raise TypeError(f"{encoder.name} has no patch features")
    if len(images):
        return encoder.encode_tokens(images).patches
    one = images.new_zeros(1, *images.shape[1:])
    return encoder.encode_tokens(one).patches[:0]


def refuse_bad(encoder: Encoder, features: Tensor, name: str) -> None:
    """Refuse features ``[B, N, D]`` of a batch that are not finite. A collective.

    Raises:
        DataError: on every rank.
    """
    wrong = ~features.isfinite().flatten(1).all(1)
    counts = torch.tensor([int(wrong.sum()), len(wrong)], device=features.device)
    bad, total = sum_over_ranks(counts).tolist()
    if bad:
        raise DataError(
            f"the features of {encoder.name} (patches) are not finite for {bad} of {total} {name} "
            "images of a batch: nothing is computed from them; evaluate other weights, or remove "
            "these images if the same images fail each time"
        )


def learn_patches(
    encoder: Encoder, train: MaskedSet, reading: ReadOptions, world: World, device: torch.device
) -> Training:
    """Encode the training images and keep labelled patches. A collective."""
    rows, columns = encoder.grid
    length = rows * columns
    per_image = max(min(length, MAX_PATCHES // len(train)), 1)
    parts: list[tuple[Tensor, ...]] = []
    for batch in masked_batches(train, (encoder.size,), reading, world, device):
        features = encode_patches(encoder, batch.images[0])
        refuse_bad(encoder, features, "training")
        patch = spread_patches(batch.numbers[:, None], per_image, length)
        patch = patch.sort(1).values if per_image < length else patch.new_tensor(range(length))
        patch = patch.expand(len(features), -1)
        every = torch.arange(len(features), device=device)[:, None]
        pixels = cut_patches(batch.masks, rows, columns)[every, patch].flatten(0, 1)
        number = batch.numbers[:, None].expand_as(patch).flatten()
        labels = most_frequent(pixels)
        kept = labels != VOID
        position = number * length + patch.flatten()
        chosen = features[every, patch].flatten(0, 1)
        parts.append(tuple(x[kept] for x in (position, number, chosen, pixels, labels)))
    table = PatchTable(*(torch.cat(fields) for fields in zip(*parts, strict=True)))
    present = torch.zeros(VALUES, dtype=torch.int64, device=device)
    present[table.pixels.unique().long()] = 1
    classes = sum_over_ranks(present)[:VOID].nonzero()[:, 0]
    if len(classes) < 2:
        only = f"one class only, {int(classes[0])}" if len(classes) else "no pixel with a class"
        raise DataError(
            f"{train.root}: the training masks have {only} ({VOID} is void, as in Pascal VOC); "
            "segmentation needs two classes: save a foreground as 1 on 0, not as 255"
        )
    index = torch.full((VALUES,), len(classes), device=device)
    index[classes] = torch.arange(len(classes), device=device)
    standard = fit_standardiser(table.features)
    return Training(
        table._replace(
            features=standard(table.features).float(),
            pixels=index[table.pixels.long()].to(torch.uint8),
            labels=index[table.labels],
        ),
        standard,
        classes,
    )


def most_frequent(pixels: Tensor) -> Tensor:
    """Return the most frequent value of each patch, int64 ``[n]``; of equals the smallest."""
    if not len(pixels):
        return pixels.new_zeros(0, dtype=torch.int64)
    return torch.mode(pixels, dim=1).values.long()


def choose(
    fit: Training, seed: int, neighbours: Sequence[int], strengths: Sequence[float]
) -> tuple[int | None, float | None]:
    """Choose k and C by the mIoU over the patches of held-out training images. A collective.

    Returns:
        The first of the best values; ``None`` where there is none to choose from.

    Raises:
        ConfigError: if only one training image has labelled patches.
    """
    images = gather_from_ranks(fit.table.images.unique()).sort().values
    if len(images) < 2:
        raise ConfigError(
            "one training image has patches with a class, and none can be held out to choose k and "
            "C on; give more images"
        )
    order, _ = sample_ids(len(images), seed + HELD_OUT_SALT, np.arange(len(images)))
    held = torch.from_numpy(order[: max(round(HELD_OUT * len(images)), 1)])
    is_held = torch.isin(fit.table.images, images[held.to(images.device)])
    rest, queries = fit._replace(table=fit.table.where(~is_held)), fit.table.where(is_held)
    by_k: dict[int, Tensor] = {}
    by_strength: dict[float, Tensor] = {}
    if neighbours:
        segmenter = KnnSegmenter(rest, max(neighbours))
        near = segmenter.find(queries.features)
        for k in neighbours:
            by_k[k] = count_classes(segmenter.vote(near[:, :k]), queries.pixels, fit.classes)
    for strength in strengths:
        linear = LinearSegmenter(rest, strength)
        labels = linear.classifier(queries.features.double()).argmax(1)
        predicted = labels[:, None].expand_as(queries.pixels)
        by_strength[strength] = count_classes(predicted, queries.pixels, fit.classes)
    return best_of(by_k), best_of(by_strength)


Value = TypeVar("Value", int, float)


def best_of(counts: Mapping[Value, Tensor]) -> Value | None:
    """Return the first value of the largest mIoU from counts ``[3, C]``. A collective."""
    found = {value: sum_over_ranks(one).cpu().numpy() for value, one in counts.items()}
    scores = {value: float(np.nan_to_num(mean_iou(*one))) for value, one in found.items()}
    return max(scores, key=scores.__getitem__, default=None)


def count_classes(predicted: Tensor, pixels: Tensor, classes: Tensor) -> Tensor:
    """Count hits, predicted and true pixels by class index; int64 ``[3, C]``, void excluded."""
    count = len(classes)
    known = pixels < count
    truth, predicted = pixels[known].long(), predicted[known].long()
    return torch.stack(
        [one.bincount(minlength=count) for one in (truth[truth == predicted], predicted, truth)]
    )


class KnnSegmenter:
    """Labels every pixel by the same pixel of the k nearest training patches, by cosine.

    Of classes with equally many votes the smallest number wins; void does not vote.
    """

    def __init__(self, fit: Training, k: int) -> None:
        table = fit.table
        self.classes = fit.classes
        self.table = FeatureTable(table.positions, table.labels, {COLUMN: table.features})
        positions = gather_from_ranks(table.positions)
        order = positions.argsort()
        self.positions, self.pixels = positions[order], gather_from_ranks(table.pixels)[order]
        self.k = min(k, len(positions))

    def __call__(self, rows: Tensor, encoder: Encoder) -> Tensor:
        """Segment images of this rank from their patches ``[B N, D]``; uint8 ``[B, S, S]``."""
        return join_patches(self.classes[self.vote(self.find(rows)).long()], encoder)

    def find(self, rows: Tensor) -> Tensor:
        """Return rows of ``pixels`` of the k nearest patches, int64 ``[Q, k]``. A collective."""
        lengths = gather_from_ranks(torch.tensor([len(rows)], device=rows.device)).tolist()
        queries = gather_from_ranks(rows)
        found = [
            find_neighbours(part, self.table, COLUMN, self.k).positions
            for part in queries.split(QUERIES)
            if len(part)
        ]
        start = sum(lengths[: dist.get_rank()]) if len(lengths) > 1 else 0
        near = torch.cat(found)[start : start + len(rows)] if found else rows.new_zeros(0, self.k)
        return torch.searchsorted(self.positions, near.long())

    def vote(self, near: Tensor) -> Tensor:
        """Return the class index of every pixel, uint8 ``[Q, p * p]``, from rows ``[Q, k]``."""
        count = len(self.classes)
        labels: list[Tensor] = [self.pixels[:0]]
        order = torch.arange(count, device=near.device)
        for part in near.split(VOTERS):
            pixels = self.pixels[part].long()  # [q, k, p * p]
            shape = (len(part), pixels.shape[2], count + 1)
            votes = torch.zeros(shape, dtype=torch.int32, device=near.device)
            one = torch.ones((), dtype=torch.int32, device=near.device).expand(
                shape[0], shape[1], 1
            )
            for j in range(part.shape[1]):
                votes.scatter_add_(2, pixels[:, j, :, None], one)
            best = votes[..., :count].long() * count - order  # unique: no tie is left to argmax
            labels.append(best.argmax(-1).to(torch.uint8))
        return torch.cat(labels)


class LinearSegmenter:
    """Logistic regression on the labels of patches; logits are upsampled bilinearly to pixels."""

    def __init__(self, fit: Training, strength: float) -> None:
        self.classes = fit.classes
        rows = fit.table.features.double()
        self.classifier = fit_logistic(rows, fit.table.labels, len(fit.classes), strength)

    def __call__(self, rows: Tensor, encoder: Encoder) -> Tensor:
        """Segment images of this rank from their patches ``[B N, D]``; uint8 ``[B, S, S]``."""
        height, width = encoder.grid
        if not len(rows):
            return rows.new_zeros(0, encoder.size, encoder.size, dtype=torch.uint8)
        logits = self.classifier(rows.double()).view(-1, height, width, len(self.classes))
        size = (encoder.size, encoder.size)
        logits = F.interpolate(logits.permute(0, 3, 1, 2), size=size, mode="bilinear")
        return self.classes[logits.argmax(1)].to(torch.uint8)


def join_patches(pixels: Tensor, encoder: Encoder) -> Tensor:
    """Join patches ``[B N, p * p]`` to masks, uint8 ``[B, S, S]``."""
    rows, columns = encoder.grid
    tall, wide = encoder.size // rows, encoder.size // columns
    grid = pixels.to(torch.uint8).view(-1, rows, columns, tall, wide)
    return grid.permute(0, 1, 3, 2, 4).reshape(-1, encoder.size, encoder.size)
