"""Protocols of a teacher, its output, and the abstract image tower of a library.

Legend: B views in a micro-batch, S side of the teacher's images, N patches, P prefix tokens (class
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
    """Output of a teacher for a batch; an output that the run does not use is ``None``.

    Attributes:
        attention: attention map over patches, ``[B, N]``, float32, rows sum to 1.
        features: tokens ``[B, 1 + N, F]`` (class token first) or ``[B, N, F]``.
        cached: whether it was read from a cache.
    """

    attention: Tensor | None
    features: Tensor | None
    cached: bool = False


class TeacherSource(Protocol):
    """Source of teacher outputs: an online model or a cache.

    Attributes:
        width: F, channels of the features.
        has_cls: whether the features begin with a class token.
        image_size: S in pixels; ``None``: it needs no images.
    """

    width: int
    has_cls: bool

    @property
    def image_size(self) -> int | None: ...

    def forward_batch(self, batch: Batch) -> TeacherView:
        """Return the teacher's output for a batch, whose last images are the teacher's."""
        ...


def view_sizes(size: int, teacher: TeacherSource | None) -> tuple[int, ...]:
    """Return the image sizes of a batch: the student's, then the teacher's if it differs."""
    own = None if teacher is None else teacher.image_size
    return (size,) if own is None or own == size else (size, own)


class Teacher(TeacherSource, Protocol):
    """A frozen model.

    Attributes:
        model: the network (its parameters are counted).
        grid: rows and columns of the attention maps and features: the student's.
        mean: mean of each channel that the network expects, of pixels in [0, 1].
        std: standard deviation of each channel.
    """

    model: nn.Module
    grid: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def image_size(self) -> int: ...

    def __call__(self, images: Tensor) -> TeacherView:
        """Run uint8 images ``[B, S, S, 3]``; no gradient, no host synchronisation."""
        ...

    def compile(self) -> None:
        """Compile ``forward_batch``, whose batches have one shape."""
        ...

    def fingerprint(self) -> dict[str, object]:
        """Return all that the outputs depend on, as JSON values; reads the weights file once."""
        ...

    def to(self, device: torch.device | str) -> "Teacher":
        """Move the network; returns itself."""
        ...


class QueryKey(NamedTuple):
    """Inputs of an attention row: query ``[B, H, Q, d]``, key ``[B, H, T, d]``, scale."""

    query: Tensor
    key: Tensor
    scale: float


class Tower(ABC):
    """A library's image transformer as embedding, blocks, final norm and projection.

    A new library is one subclass. Attention rows are computed from the queries and keys of a
    block's input, so that the blocks keep their fused attention.

    Attributes:
        model: the network.
        blocks: its transformer blocks, called on tokens ``[B, T, D]``.
        grid: rows and columns of its patches.
        num_prefix: P.
        has_cls: whether token 0 is a class token.
        mean: mean of each channel.
        std: standard deviation of each channel.
        source: the library's entries of the fingerprint.
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
        """Map normalised images ``[B, 3, S, S]`` to the first block's input ``[B, T, D]``."""

    @abstractmethod
    def query_key(self, block: int, tokens: Tensor, queries: slice) -> QueryKey:
        """Return queries of some tokens and keys of all, from a block's input ``[B, T, D]``."""

    @abstractmethod
    def pool_query_key(self, tokens: Tensor) -> tuple[QueryKey, int]:
        """Return query and keys of the pooling head, and the number of prefix tokens in its keys.

        ``tokens``: output of the final norm, ``[B, T, D]``.
        """

    @abstractmethod
    def norm(self, tokens: Tensor) -> Tensor:
        """Apply the final norm to every token, ``[B, T, D]``."""

    @abstractmethod
    def project(self, tokens: Tensor) -> Tensor:
        """Project normed tokens into the model's joint space, ``[B, T, F]``."""

    @abstractmethod
    def width(self, feature: str) -> int:
        """Return the channels of ``proj``, ``ln_post`` or ``block`` features."""

    @abstractmethod
    def check_feature(self, feature: str) -> None:
        """Refuse features that the model lacks.

        Raises:
            TeacherError: naming ``teacher.feature``.
        """

    @abstractmethod
    def check_source(self, source: str, layers: Sequence[int]) -> None:
        """Refuse attention maps that the model lacks.

        Args:
            source: ``cls``, ``pool`` or ``mean_query``.
            layers: blocks, counted from 0.

        Raises:
            TeacherError: naming ``attention.source``.
        """
