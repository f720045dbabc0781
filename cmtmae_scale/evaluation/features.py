"""Features of all images of a set, and their standardisation; each rank holds its own rows.

Legend: n rows of this rank, D width.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cmtmae_scale.evaluation.across import gather_from_ranks, sum_over_ranks
from cmtmae_scale.evaluation.encoders import Encoder
from cmtmae_scale.evaluation.images import ImageSet
from cmtmae_scale.runtime.collectives import on_all_ranks
from cmtmae_scale.runtime.launch import World
from cmtmae_scale.runtime.log import progress_bar
from dataloading.errors import DataError
from dataloading.one_pass import OnePass
from dataloading.stream import DecoderName

EPSILON = 1e-6
"""Added to the variance, as MAE's probe does in its batch norm."""


class Column(NamedTuple):
    """Encoder and kind of features."""

    encoder: str
    kind: str


@dataclass
class FeatureTable:
    """This rank's rows; all ranks together hold each image of the set once."""

    positions: Tensor
    """Index of each row in the set, ascending int64 ``[n]``."""
    labels: Tensor
    """Class of each row, int64 ``[n]``."""
    columns: dict[Column, Tensor]
    """float32 ``[n, D]``."""


def refuse_non_finite(tables: Mapping[str, FeatureTable], column: Column) -> None:
    """Refuse features that are not finite, before any scorer sees them. A collective.

    Args:
        tables: this rank's rows of each set, by the set's name for the message.
        column: the features to check.

    Raises:
        DataError: on every rank; names the weights and counts the rows of each set.
    """
    found: list[str] = []
    for name, table in tables.items():
        bad = ~table.columns[column].isfinite().all(1)
        counts = torch.tensor([int(bad.sum()), len(bad)], device=bad.device)
        num_bad, total = sum_over_ranks(counts).tolist()
        first = gather_from_ranks(table.positions[bad])
        if num_bad:
            found.append(f"{num_bad} of {total} {name} images (first: image {int(first.min())})")
    if found:
        raise DataError(
            f"the features of {column.encoder} ({column.kind}) are not finite for "
            f"{' and '.join(found)}: no accuracy is computed from them; evaluate other weights, or "
            "remove these images if the same images fail each time"
        )


class ReadOptions(NamedTuple):
    """Batch size, reader threads and decoder."""

    micro_batch: int
    threads: int
    decode: DecoderName


class Standardiser(NamedTuple):
    """Mean and standard deviation per channel over the training rows, float64 ``[D]``.

    MAE's probe uses a batch norm without affine parameters; here the statistics are those of all
    training rows in place of a batch's: ``(x - mean) / sqrt(var + 1e-6)``, var biased.
    """

    mean: Tensor
    std: Tensor

    def __call__(self, rows: Tensor) -> Tensor:
        """Standardise rows ``[n, D]``; float64."""
        return (rows.double() - self.mean) / self.std


def fit_standardiser(rows: Tensor) -> Standardiser:
    """Compute the statistics of the rows ``[n, D]`` of all ranks. A collective."""
    count = sum_over_ranks(torch.tensor(float(len(rows)), device=rows.device).double())
    mean = sum_over_ranks(rows.double().sum(0)) / count
    variance = sum_over_ranks((rows.double() - mean).square().sum(0)) / count
    return Standardiser(mean, (variance + EPSILON).sqrt())


@torch.no_grad()
def encode_batches(
    images: ImageSet,
    encoders: Sequence[Encoder],
    reading: ReadOptions,
    world: World,
    device: torch.device,
) -> Iterator[tuple[Tensor, dict[Column, Tensor]]]:
    """Yield this rank's images batch by batch: positions in the set ``[b]``, features ``[b, D]``.

    Encoders have one image size and are on the device, as the yielded tensors. Images that cannot
    be decoded are logged and have no row.

    Raises:
        ReadError: if storage did not return an image.
    """
    share, done = -(-len(images) // world.world_size), 0
    with (
        progress_bar("encoding", share, "images") as report_done,
        OnePass(
            images.index,
            images.ids,
            micro_batch=reading.micro_batch,
            size=encoders[0].size,
            rank=world.rank,
            world_size=world.world_size,
            threads=reading.threads,
            decode=reading.decode,
            device=device,
        ) as batches,
    ):
        for batch in batches:
            yield (
                batch.position[batch.valid],
                {
                    Column(encoder.name, kind): values[batch.valid]
                    for encoder in encoders
                    for kind, values in encoder.encode(batch.images[0]).items()
                },
            )
            done = min(done + len(batch.position), share)
            report_done(done)


def extract_features(
    images: ImageSet,
    encoders: Sequence[Encoder],
    reading: ReadOptions,
    world: World,
    device: torch.device,
) -> FeatureTable:
    """Encode every image once with every encoder. A collective.

    Encoders, rows and images that cannot be decoded are as in ``encode_batches``.

    Raises:
        ReadError: on every rank, if storage did not return an image to one of them.
        DataError: if no image could be decoded.
    """
    positions: list[Tensor] = []
    rows: dict[Column, list[Tensor]] = {}

    def encode() -> None:
        for found, columns in encode_batches(images, encoders, reading, world, device):
            positions.append(found)
            for column, values in columns.items():
                rows.setdefault(column, []).append(values)

    on_all_ranks(encode)
    order = torch.cat(positions)
    total = torch.tensor([len(order)], device=device)
    if not int(sum_over_ranks(total)):
        raise DataError(f"{images.index.root}: none of {len(images)} images could be decoded")
    labels = torch.as_tensor(images.labels, device=device)[order]
    return FeatureTable(order, labels, {column: torch.cat(parts) for column, parts in rows.items()})
