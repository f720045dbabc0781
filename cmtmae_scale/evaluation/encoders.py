"""What turns pictures into features: a student, a teacher, any ViT of timm, or the pixels.

Legend: B pictures, S their side, P prefix tokens (class token, registers), N patches, D width.
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
"""Raw pixels are averaged down to squares of this side."""


class Encoder(NamedTuple):
    """A network, or none, and what it says of a picture."""

    name: str
    """For people."""
    size: int
    """S."""
    describe: Callable[[Tensor], dict[str, Tensor]]
    """From uint8 pictures ``[B, S, S, 3]`` to float32 features ``[B, D]`` by kind: ``cls``, the
    class token after the last norm, where there is one; ``patches``, the mean of the patch tokens
    after it; or ``pixels``."""
    digest: str | None = None
    """SHA-256 of the weights; ``None`` where there are none or nobody asks."""
    network: Student | Tower | None = None
    """What computes; ``None`` where nothing does or nobody asks."""


def of_student(name: str, student: Student, size: int, device: torch.device) -> Encoder:
    """A student, or its moving average, as every checkpoint holds it."""
    student = student.to(device).eval().requires_grad_(False)

    def describe(images: Tensor) -> dict[str, Tensor]:
        pictures = normalise_images(images, IMAGENET_MEAN, IMAGENET_STD)
        with computing(device):
            tokens = student(pictures)
        return kinds(tokens, student.num_prefix, student.has_class_token)

    return Encoder(name, size, describe)


def of_tower(name: str, tower: Tower, size: int, device: torch.device) -> Encoder:
    """A frozen teacher, or any other model that could be one."""
    tower.model.to(device).eval().requires_grad_(False)

    def describe(images: Tensor) -> dict[str, Tensor]:
        pictures = normalise_images(images, tower.mean, tower.std)
        with computing(device):
            tokens = tower.embed(pictures)
            for block in tower.blocks:
                tokens = block(tokens)
            tokens = tower.norm(tokens)
        return kinds(tokens, tower.num_prefix, tower.has_cls)

    return Encoder(name, size, describe)


def of_pixels(size: int) -> Encoder:
    """The picture itself, averaged down to 16 x 16 and normalised as a network's input."""

    def describe(images: Tensor) -> dict[str, Tensor]:
        pictures = normalise_images(images, IMAGENET_MEAN, IMAGENET_STD)
        return {PIXELS: adaptive_avg_pool2d(pictures, PIXEL_SIDE).flatten(1)}

    return Encoder("raw pixels", size, describe)


def computing(device: torch.device) -> torch.autocast:
    """No gradient is the caller's; bfloat16 products on a GPU, float32 on a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def kinds(tokens: Tensor, num_prefix: int, has_cls: bool) -> dict[str, Tensor]:
    """Features of pictures from their tokens ``[B, P + N, D]``."""
    found = {CLS: tokens[:, 0].float()} if has_cls else {}
    return found | {PATCHES: tokens[:, num_prefix:].float().mean(1)}


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes and float32 values: the same for a checkpoint and its export."""
    total = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().to("cpu", torch.float32).contiguous()
        total.update(f"{name} {tuple(value.shape)}\n".encode())
        total.update(value.numpy().tobytes())
    return total.hexdigest()
