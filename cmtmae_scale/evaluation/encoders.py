"""Encoders that turn images into features: a student, a teacher, any ViT of timm, or raw pixels.

Legend: B images, S their side, P prefix tokens (class token, registers), N patches in a grid of
h x w, D width.
"""

import hashlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, unfold

from cmtmae_scale.method.attention import Grid
from cmtmae_scale.method.images import IMAGENET_MEAN, IMAGENET_STD, normalise_images
from cmtmae_scale.method.student import Student
from cmtmae_scale.teachers.base import Tower

CLS, PATCHES, PIXELS = "cls", "patches", "pixels"
PIXEL_SIDE = 16
"""Side in pixels to which raw images are averaged down."""
PATCH_PIXEL_SIDE = 4
"""Side in pixels to which raw patches are averaged down."""


class Tokens(NamedTuple):
    """Features of a batch after the last norm, float32."""

    cls: Tensor | None
    """Class token ``[B, D]``; ``None``: the network has none."""
    patches: Tensor
    """Patch tokens in row-major order, ``[B, N, D]``."""


class Encoder(NamedTuple):
    """A function from images to features, with the network behind it."""

    name: str
    """Name in reports."""
    size: int
    """S."""
    encode: Callable[[Tensor], dict[str, Tensor]]
    """From uint8 images ``[B, S, S, 3]`` to float32 features ``[B, D]`` by kind: ``cls``, the
    class token after the last norm, where there is one; ``patches``, the mean of the patch tokens
    after the last norm; or ``pixels``."""
    digest: str | None = None
    """SHA-256 of the weights; ``None``: no weights, or not computed."""
    network: Student | Tower | None = None
    """The network; ``None``: none, or not needed."""
    grid: Grid = (0, 0)
    """h and w."""
    encode_tokens: Callable[[Tensor], Tokens] | None = None
    """From uint8 images ``[B, S, S, 3]`` to the features of all patches; of raw pixels the
    normalised pixels of each patch, averaged down to 4 x 4."""


def encoder_from_student(name: str, student: Student, size: int, device: torch.device) -> Encoder:
    """Wrap a student, or a momentum encoder in a student's layout."""
    student = student.to(device).eval().requires_grad_(False)

    def encode_tokens(images: Tensor) -> Tokens:
        pixels = normalise_images(images, IMAGENET_MEAN, IMAGENET_STD)
        with inference_autocast(device):
            tokens = student(pixels)
        return split_tokens(tokens, student.num_prefix, student.has_class_token)

    return token_encoder(name, size, student.grid, encode_tokens)


def encoder_from_tower(name: str, tower: Tower, size: int, device: torch.device) -> Encoder:
    """Wrap a frozen teacher or a model of timm."""
    tower.model.to(device).eval().requires_grad_(False)

    def encode_tokens(images: Tensor) -> Tokens:
        pixels = normalise_images(images, tower.mean, tower.std)
        with inference_autocast(device):
            tokens = tower.normed_tokens(pixels)
        return split_tokens(tokens, tower.num_prefix, tower.has_cls)

    return token_encoder(name, size, tower.grid, encode_tokens)


def token_encoder(
    name: str, size: int, grid: Grid, encode_tokens: Callable[[Tensor], Tokens]
) -> Encoder:
    """Wrap a function from images to tokens."""

    def encode(images: Tensor) -> dict[str, Tensor]:
        tokens = encode_tokens(images)
        features = {} if tokens.cls is None else {CLS: tokens.cls}
        return features | {PATCHES: tokens.patches.mean(1)}

    return Encoder(name, size, encode, grid=grid, encode_tokens=encode_tokens)


def pixel_encoder(size: int, grid: Grid) -> Encoder:
    """Return the baseline of raw pixels: normalised images averaged down to 16 x 16."""

    def encode(images: Tensor) -> dict[str, Tensor]:
        pixels = normalise_images(images, IMAGENET_MEAN, IMAGENET_STD)
        return {PIXELS: adaptive_avg_pool2d(pixels, PIXEL_SIDE).flatten(1)}

    def encode_tokens(images: Tensor) -> Tokens:
        pixels = normalise_images(images, IMAGENET_MEAN, IMAGENET_STD)
        rows, columns = grid
        pooled = adaptive_avg_pool2d(pixels, (rows * PATCH_PIXEL_SIDE, columns * PATCH_PIXEL_SIDE))
        return Tokens(None, unfold(pooled, PATCH_PIXEL_SIDE, stride=PATCH_PIXEL_SIDE).mT)

    return Encoder("raw pixels", size, encode, grid=grid, encode_tokens=encode_tokens)


def inference_autocast(device: torch.device) -> torch.autocast:
    """Return autocast to bfloat16 on a GPU, float32 on a CPU; the caller disables gradients."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def split_tokens(tokens: Tensor, num_prefix: int, has_cls: bool) -> Tokens:
    """Split the tokens ``[B, P + N, D]`` of a network."""
    cls = tokens[:, 0].float() if has_cls else None
    return Tokens(cls, tokens[:, num_prefix:].float())


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names, shapes and float32 values; that of an export is equal."""
    total = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().to("cpu", torch.float32).contiguous()
        total.update(f"{name} {tuple(value.shape)}\n".encode())
        total.update(value.numpy().tobytes())
    return total.hexdigest()
