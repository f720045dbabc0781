"""Protocols of a teacher, its outputs, and the abstract image towers of a library.

Legend: B views in a micro-batch, S side of the teacher's images, N patches, P prefix tokens (class
token first, then registers), T tokens = P + N, H heads, d head width, D tower width, F feature
width.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from cmtmae_scale.config.needs import Needs
from cmtmae_scale.config.schema import Config
from cmtmae_scale.config.teachers import term_name
from cmtmae_scale.errors import TeacherError
from cmtmae_scale.method.attention import activation_map, mean_query_row, patch_map
from dataloading.stream import Batch


def are_channels(values: object, above_zero: bool = False) -> bool:
    """Return whether a value is three finite numbers, one per channel, above 0 if requested."""
    return (
        isinstance(values, Sequence)
        and len(values) == 3
        and all(is_finite_number(value) and (value > 0 or not above_zero) for value in values)
    )


def is_count(value: object) -> bool:
    """Return whether a value is a whole number above 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def is_finite_number(value: object) -> bool:
    """Return whether a value is a finite number of Python or numpy, and not a bool."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


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


def forward_all(sources: Mapping[str, TeacherSource], batch: Batch) -> dict[str, TeacherView]:
    """Return the teachers' outputs for a batch by name; each gets the images of its size."""
    return {
        name: source.forward_batch(batch._replace(images=images_for(source, batch.images)))
        for name, source in sources.items()
    }


def feature_widths(sources: Mapping[str, TeacherSource]) -> dict[str, int]:
    """Return F of each teacher by the term of the loss."""
    return {term_name(name): source.width for name, source in sources.items()}


def images_for(source: TeacherSource, images: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the images of a source's size, ``[B, S, S, 3]``; all images if it needs none."""
    return tuple(one for one in images if source.image_size in (None, one.shape[1]))


def view_sizes(size: int, sources: Mapping[str, TeacherSource]) -> tuple[int, ...]:
    """Return the image sizes of a batch: the student's, then each other size of a teacher."""
    sizes = (one.image_size for one in sources.values())
    return tuple(dict.fromkeys([size, *(own for own in sizes if own is not None)]))


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


class TeacherOutputs(NamedTuple):
    """Which outputs of a tower are computed; blocks count from 0, no blocks: not computed."""

    source: str
    attention_layers: tuple[int, ...]
    feature: str
    feature_layers: tuple[int, ...]

    @classmethod
    def from_config(cls, config: Config, needs: Needs, depth: int) -> "TeacherOutputs":
        """Return the outputs that a run needs from a tower of ``depth`` blocks.

        Raises:
            TeacherError: for a block that the tower lacks, or layers with ``source=pool``.
        """
        source, layers = config.attention.source, config.attention.layers
        if needs.teacher_attention and source == "pool" and list(layers) != [-1]:
            raise TeacherError(
                f"attention.layers={list(layers)}: attention.source=pool reads the pooling head, "
                "not a block; set attention.layers=[-1]"
            )
        attention = features = ()
        if needs.teacher_attention:
            attention = resolve_teacher_layers(layers, depth, "attention.layers")
        if needs.teacher_features:
            key, layers = "target.teacher.layers", config.target.teacher.layers
            features = resolve_teacher_layers(layers, depth, key)
        return cls(source, attention, config.teacher.feature, features)


def resolve_teacher_layers(layers: list[int], depth: int, key: str) -> tuple[int, ...]:
    """Return block numbers counted from 0.

    Raises:
        TeacherError: for a block that the tower lacks, or that is named twice.
    """
    for layer in layers:
        if not -depth <= layer < depth:
            raise TeacherError(
                f"{key}={list(layers)}: the teacher has {depth} blocks, "
                f"{-depth} to {depth - 1}; found {layer}"
            )
    counted = tuple(layer % depth for layer in layers)
    if len(set(counted)) != len(counted):
        raise TeacherError(f"{key}={list(layers)} names a block twice; name each block once")
    return counted


class TowerOutput(NamedTuple):
    """Output of a tower's forward, in the tower's grid.

    Attributes:
        maps: attention maps over patches, one per requested layer, ``[B, N]``, float32.
        layers: tokens of each feature layer, before the final norm, ``[B, T, D]``.
    """

    maps: list[Tensor]
    layers: list[Tensor]


class Tower(ABC):
    """A frozen image network: images to attention maps and tokens on a grid of patches.

    A new library is one subclass: of a transformer, of ``Transformer``; else of ``WholeNetwork``.

    Attributes:
        model: the network.
        blocks: its parts that outputs are numbered by; ``teacher.precision`` is that of their
            linear layers.
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
    def forward(self, images: Tensor, outputs: TeacherOutputs) -> TowerOutput:
        """Compute outputs from normalised images ``[B, 3, S, S]``; no host synchronisation."""

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
            source: a value of ``attention.source``.
            layers: blocks, counted from 0.

        Raises:
            TeacherError: naming ``attention.source``.
        """

    def fuse_attention(self) -> None:  # noqa: B027 - most networks need nothing
        """Prepare modules for ``torch.compile``."""

    def normed_tokens(self, images: Tensor) -> Tensor:
        """Return the tokens of the last block after the final norm, ``[B, T, D]``."""
        last = TeacherOutputs("cls", (), "block", (len(self.blocks) - 1,))
        return self.norm(self.forward(images, last).layers[0])


class WholeNetwork(Tower):
    """A network that is run as one block; its only features are the tokens that it returns.

    Attributes:
        channels: F, of the tokens.
    """

    channels: int

    def norm(self, tokens: Tensor) -> Tensor:
        """Return the tokens, which the network has normed, if at all."""
        return tokens

    def project(self, tokens: Tensor) -> Tensor:
        """Raise: ``check_feature`` refuses it earlier."""
        raise TeacherError("teacher.feature=proj: use block")

    def width(self, feature: str) -> int:
        return self.channels


class QueryKey(NamedTuple):
    """Inputs of an attention row: query ``[B, H, Q, d]``, key ``[B, H, T, d]``, scale."""

    query: Tensor
    key: Tensor
    scale: float


class Transformer(Tower):
    """A library's vision transformer as embedding, blocks, final norm and projection.

    Attention rows are computed from the queries and keys of a block's input, so that the blocks
    keep their fused attention.
    """

    @abstractmethod
    def embed(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Embed normalised images ``[B, 3, S, S]``.

        Returns:
            The first block's input ``[B, T, D]``, and the table of rotary positions that every
            block takes, or ``None``.
        """

    @abstractmethod
    def run_block(self, block: int, tokens: Tensor, rotary: Tensor | None) -> Tensor:
        """Apply a block, ``[B, T, D]``."""

    @abstractmethod
    def query_key(
        self, block: int, tokens: Tensor, queries: slice, rotary: Tensor | None
    ) -> QueryKey:
        """Return queries of some tokens and keys of all, from a block's input ``[B, T, D]``.

        ``queries`` is the class token, ``slice(0, 1)``, or all patches, ``slice(P, None)``.
        """

    @abstractmethod
    def pool_query_key(self, tokens: Tensor) -> tuple[QueryKey, int]:
        """Return query and keys of the pooling head, and the number of prefix tokens in its keys.

        ``tokens``: output of the final norm, ``[B, T, D]``.
        """

    def forward(self, images: Tensor, outputs: TeacherOutputs) -> TowerOutput:
        """Run the blocks up to the last one that an output depends on."""
        tokens, rotary = self.embed(images)
        reads_pool = outputs.source == "pool" and bool(outputs.attention_layers)
        found = TowerOutput([], [])
        for number in range(len(self.blocks)):
            has_map = number in outputs.attention_layers
            if has_map and outputs.source in ("cls", "mean_query"):
                found.maps.append(self.block_attention(number, tokens, rotary, outputs.source))
            if not reads_pool and not needs_block(outputs, number):
                break
            tokens = self.run_block(number, tokens, rotary)
            if has_map and outputs.source == "activation_norm":
                found.maps.append(activation_map(tokens[:, self.num_prefix :]))
            if number in outputs.feature_layers:
                found.layers.append(tokens)
        if reads_pool:
            (query, key, scale), prefix = self.pool_query_key(self.norm(tokens))
            found.maps.append(patch_map(mean_query_row(query, key, scale), prefix))
        return found

    def block_attention(
        self, number: int, tokens: Tensor, rotary: Tensor | None, source: str
    ) -> Tensor:
        """Return the attention map of a block from its input, ``[B, N]``."""
        queries = slice(0, 1) if source == "cls" else slice(self.num_prefix, None)
        query, key, scale = self.query_key(number, tokens, queries, rotary)
        return patch_map(mean_query_row(query, key, scale), self.num_prefix)


def needs_block(outputs: TeacherOutputs, number: int) -> bool:
    """Return whether an output depends on the output of block ``number``."""
    first = number if outputs.source == "activation_norm" else number + 1
    maps_left = any(layer >= first for layer in outputs.attention_layers)
    return maps_left or any(layer >= number for layer in outputs.feature_layers)
