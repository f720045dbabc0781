"""Diagnostics of target tokens: whether they collapse.

Legend: B views in a micro-batch, N patches, D channels.

Source: docs/method.md, section "Diagnostics".
"""

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from cmtmae_scale.method.targets import token_loss

MAX_TOKENS = 256
PATCH_STRIDE = 89
"""Offset between the patches of consecutive images; a prime, so that it meets all patches."""
EPS = 1e-12


class TokenDiagnostics(NamedTuple):
    """Two measures of collapse, 0-dim float32; NaN where a token is not finite."""

    effective_rank: Tensor
    """In [1, min(tokens, D)]; 1 where all tokens are collinear."""
    pairwise_cosine: Tensor
    """Mean over pairs of distinct tokens, in [-1, 1]; 1 where all tokens have one direction."""


@torch.no_grad()
def token_diagnostics(tokens: Tensor) -> TokenDiagnostics:
    """Return the effective rank and the mean pairwise cosine of a micro-batch of tokens.

    Args:
        tokens: patch tokens without class token, ``[B, N, D]``, any float dtype; not centred here,
            so that a constant vector common to all tokens lowers the rank.

    Returns:
        Both measures over at most 256 tokens, spread evenly over images and patches; the same
        tokens every time. The singular value decomposition synchronises with the host on a GPU;
        nothing else does.

    Raises:
        ValueError: if there are fewer than two tokens.

    Source: docs/method.md, section "Diagnostics"; effective rank of Roy and Vetterli, EUSIPCO 2007.
    """
    x = spread_tokens(tokens).float()  # [T, D]
    count = x.shape[0]
    if count < 2:
        raise ValueError(f"tokens {tuple(tokens.shape)}: at least two tokens are needed")
    finite = x.isfinite().all()
    x = x.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)  # the decomposition refuses anything else
    singular = cast(Tensor, torch.linalg.svdvals(x))  # pyright: ignore[reportUnknownMemberType]
    share = singular / singular.sum().clamp_min(EPS)
    entropy = cast(Tensor, torch.special.entr(share))  # pyright: ignore[reportUnknownMemberType]
    rank = entropy.sum().exp()
    unit = F.normalize(x, dim=-1, eps=EPS)
    cosine = (unit.sum(dim=0).square().sum() - unit.square().sum()) / (count * (count - 1))
    return TokenDiagnostics(*(torch.where(finite, value, torch.nan) for value in (rank, cosine)))


@torch.no_grad()
def constant_loss(tokens: Tensor, kind: str, beta: float) -> Tensor:
    """Return the mean loss of one and the same prediction for all tokens: their mean.

    A decoder that ignores its input reaches this loss, so a loss near it is no sign of learning.

    Args:
        tokens: normalised target tokens, ``[..., D]``.
        kind: ``loss.type``; for ``cosine`` the prediction is the mean of the unit tokens, which is
            the best constant, as the mean is for ``mse``.
        beta: ``loss.beta``.

    Returns:
        0-dim float32; no host synchronisation.
    """
    x = tokens.float().flatten(0, -2)
    mean = (F.normalize(x, dim=-1, eps=EPS) if kind == "cosine" else x).mean(0)
    return token_loss(mean.expand_as(x), x, kind, beta).mean()


def spread_tokens(tokens: Tensor) -> Tensor:
    """Gather at most ``MAX_TOKENS`` of ``[B, N, D]`` tokens, evenly over images and patches."""
    batch, length, _ = tokens.shape
    images = min(batch, MAX_TOKENS)
    per_image = min(length, MAX_TOKENS // images)
    number = torch.arange(images, device=tokens.device)[:, None]
    patch = spread_patches(number, per_image, length)
    return tokens[number * batch // images, patch].flatten(0, 1)


def spread_patches(number: Tensor, per_image: int, length: int) -> Tensor:
    """Choose evenly spread patches of N = ``length``, other ones in each image.

    Args:
        number: of the image, int64 ``[B, 1]``.
        per_image: patches to choose of each image, at most N.
        length: N.

    Returns:
        Patches, int64 ``[B, per_image]``.
    """
    start = torch.arange(per_image, device=number.device) * length // per_image
    return (start + number * PATCH_STRIDE) % length
