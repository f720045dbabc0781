"""What a teacher is: the view it gives of a batch, and the tower of a library behind it.

Legend: B views in a micro-batch, S side of the teacher's picture, N patches, P prefix tokens (class
token first, then registers), T tokens = P + N, H heads, d head width, D tower width, F feature
width.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from dataloading.stream import Batch


class TeacherView(NamedTuple):
    """What the trainer sees of a teacher; a part that the run does not use is ``None``.

    Attributes:
        attention: map over patches, ``[B, N]``, float32, rows sum to 1.
        features: tokens ``[B, 1 + N, F]`` (class token first) or ``[B, N, F]``.
        cached: whether they were read from a cache.
    """

    attention: Tensor | None
    features: Tensor | None
    cached: bool = False


class TeacherSource(Protocol):
    """Where the trainer gets its teacher's view from: a live model, or a cache.

    Attributes:
        width: F, channels of the features.
        has_cls: whether the features begin with a class token.
        image_size: S, pixels; ``None``: it looks at no picture.
    """

    width: int
    has_cls: bool

    @property
    def image_size(self) -> int | None:
        """See above."""
        ...

    def forward_batch(self, batch: Batch) -> TeacherView:
        """View of a batch, whose last pictures are the teacher's; no gradient."""
        ...


def view_sizes(size: int, teacher: TeacherSource | None) -> tuple[int, ...]:
    """Sides of the pictures in a batch: the student's, then the teacher's where it differs."""
    own = None if teacher is None else teacher.image_size
    return (size,) if own is None or own == size else (size, own)


class Teacher(TeacherSource, Protocol):
    """A frozen model.

    Attributes:
        model: the network (its parameters are counted).
        width: F, channels of the features.
        has_cls: whether the features begin with a class token.
        image_size: S, pixels.
        grid: rows and columns of the maps and features that are returned: the student's.
        mean: mean of each channel that the network expects, of pixels in [0, 1].
        std: deviation of each channel.
    """

    model: nn.Module
    grid: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def image_size(self) -> int:
        """See above."""
        ...

    def __call__(self, images: Tensor) -> TeacherView:
        """Look at uint8 pictures ``[B, S, S, 3]``; no gradient, no host synchronisation."""
        ...

    def fingerprint(self) -> dict[str, object]:
        """Everything that its outputs depend on, as JSON values; reads the weights file once."""
        ...

    def to(self, device: torch.device | str) -> "Teacher":
        """Move the network; returns itself."""
        ...


class QueryKey(NamedTuple):
    """What an attention row is made of: query ``[B, H, Q, d]``, key ``[B, H, T, d]``, scale."""

    query: Tensor
    key: Tensor
    scale: float


class Tower(ABC):
    """A library's image transformer, seen as an embedding, blocks, a last norm and a projection.

    A new library is one subclass. Nothing here runs a block with attention weights switched on:
    rows come from the queries and keys of a block's own input.

    Attributes:
        model: the network.
        blocks: its transformer blocks, called on tokens ``[B, T, D]``.
        grid: rows and columns of its own patches.
        num_prefix: P.
        has_cls: whether token 0 is a class token.
        mean: mean of each channel.
        std: deviation of each channel.
        source: library's part of the fingerprint.
    """

    model: nn.Module
    blocks: Sequence[nn.Module]
    grid: tuple[int, int]
    num_prefix: int
    has_cls: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: dict[str, object]

    @abstractmethod
    def embed(self, images: Tensor) -> Tensor:
        """Normalised pictures ``[B, 3, S, S]`` to the first block's input ``[B, T, D]``."""

    @abstractmethod
    def query_key(self, block: int, tokens: Tensor, queries: slice) -> QueryKey:
        """Queries of some tokens and keys of all, from a block's input ``[B, T, D]``."""

    @abstractmethod
    def pool_query_key(self, tokens: Tensor) -> tuple[QueryKey, int]:
        """Latent query and keys of the pooling head, and the prefix tokens among its keys.

        ``tokens``: output of the last norm, ``[B, T, D]``.
        """

    @abstractmethod
    def norm(self, tokens: Tensor) -> Tensor:
        """Last norm of every token, ``[B, T, D]``."""

    @abstractmethod
    def project(self, tokens: Tensor) -> Tensor:
        """Projection of normed tokens into the model's joint space, ``[B, T, F]``."""

    @abstractmethod
    def width(self, feature: str) -> int:
        """Channels of ``proj``, ``ln_post`` or ``block`` features."""

    @abstractmethod
    def check_feature(self, feature: str) -> None:
        """Refuse features that the model does not have.

        Raises:
            TeacherError: naming ``teacher.feature``.
        """

    @abstractmethod
    def check_source(self, source: str, layers: Sequence[int]) -> None:
        """Refuse attention maps that the model does not have.

        Args:
            source: ``cls``, ``pool`` or ``mean_query``.
            layers: blocks, counted from 0.

        Raises:
            TeacherError: naming ``attention.source``.
        """
