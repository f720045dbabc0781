"""Convert uint8 images of the loader (channels last) to the input of a network.

Source: docs/method.md, section "Teacher".
"""

from collections.abc import Sequence

import torch
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def normalise_images(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Scale pixels to ``(x / 255 - mean) / std`` and put the channels first.

    Args:
        images: uint8, ``[B, S, S, 3]``, values 0 to 255.
        mean: mean of each channel, of pixels in [0, 1].
        std: standard deviation of each channel, above 0.

    Returns:
        float32, ``[B, 3, S, S]``, contiguous. No host synchronisation: the constants are scalars
        of the kernels, never copied to the device.

    Raises:
        TypeError: if the images are not uint8.
        ValueError: if the last dimension, ``mean`` or ``std`` has not 3 entries.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"images are {images.dtype}; expected uint8 as the loader gives them")
    if images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"images have shape {tuple(images.shape)}; expected [B, S, S, 3]")
    if len(mean) != 3 or len(std) != 3:
        raise ValueError(f"mean and std need 3 numbers each; found {len(mean)} and {len(std)}")
    channels = [
        images[..., c].float().mul_(1.0 / (255.0 * std[c])).sub_(mean[c] / std[c]) for c in range(3)
    ]
    return torch.stack(channels, dim=1)
