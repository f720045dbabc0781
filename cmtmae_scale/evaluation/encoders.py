"""Encoders that turn images into features: a student, a teacher, any ViT of timm, or raw pixels.

Legend: B images, S their side, P prefix tokens (class token, registers), N patches, D width.
"""

import hashlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from cmtmae_scale.method.images import IMAGENET_MEAN, IMAGENET_STD, normalise_images
from cmtmae_scale.method.student import Student
from cmtmae_scale.teachers.base import Tower

CLS, PATCHES, PIXELS = "cls", "patches", "pixels"
PIXEL_SIDE = 16
"""Side in pixels to which raw images are averaged down."""


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


def encoder_from_student(name: str, student: Student, size: int, device: torch.device) -> Encoder:
    """Wrap a student, or a momentum encoder in a student's layout."""
    student = student.to(device).eval().requires_grad_(False)

    def encode(images: Tensor) -> dict[str, Tensor]:
        pixels = normalise_images(images, IMAGENET_MEAN, IMAGENET_STD)
        with inference_autocast(device):
            tokens = student(pixels)
        return pool_tokens(tokens, student.num_prefix, student.has_class_token)

    return Encoder(name, size, encode)


def encoder_from_tower(name: str, tower: Tower, size: int, device: torch.device) -> Encoder:
    """Wrap a frozen teacher or a model of timm."""
    tower.model.to(device).eval().requires_grad_(False)

    def encode(images: Tensor) -> dict[str, Tensor]:
        pixels = normalise_images(images, tower.mean, tower.std)
        with inference_autocast(device):
            tokens = tower.embed(pixels)
            for block in tower.blocks:
                tokens = block(tokens)
            tokens = tower.norm(tokens)
        return pool_tokens(tokens, tower.num_prefix, tower.has_cls)

    return Encoder(name, size, encode)


def pixel_encoder(size: int) -> Encoder:
    """Return the baseline of raw pixels: normalised images averaged down to 16 x 16."""

    def encode(images: Tensor) -> dict[str, Tensor]:
        pixels = normalise_images(images, IMAGENET_MEAN, IMAGENET_STD)
        return {PIXELS: adaptive_avg_pool2d(pixels, PIXEL_SIDE).flatten(1)}

    return Encoder("raw pixels", size, encode)


def inference_autocast(device: torch.device) -> torch.autocast:
    """Autocast to bfloat16 on a GPU, float32 on a CPU; the caller disables gradients."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def pool_tokens(tokens: Tensor, num_prefix: int, has_cls: bool) -> dict[str, Tensor]:
    """Return features by kind from the tokens ``[B, P + N, D]``."""
    features = {CLS: tokens[:, 0].float()} if has_cls else {}
    return features | {PATCHES: tokens[:, num_prefix:].float().mean(1)}


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes and float32 values; a checkpoint and its export are equal."""
    total = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().to("cpu", torch.float32).contiguous()
        total.update(f"{name} {tuple(value.shape)}\n".encode())
        total.update(value.numpy().tobytes())
    return total.hexdigest()
