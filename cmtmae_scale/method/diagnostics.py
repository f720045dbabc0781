"""Diagnostics of training: collapse of the momentum encoder, and the balance of the loss terms.

Legend: B views in a micro-batch, N patches, D channels, R rows (masks), Q predicted tokens, E
decoder width.

Source: docs/method.md, section "Diagnostics".
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

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
    singular = torch.linalg.svdvals(x)
    share = singular / singular.sum().clamp_min(EPS)
    rank = torch.special.entr(share).sum().exp()
    unit = F.normalize(x, dim=-1, eps=EPS)
    cosine = (unit.sum(dim=0).square().sum() - unit.square().sum()) / (count * (count - 1))
    return TokenDiagnostics(*(torch.where(finite, value, torch.nan) for value in (rank, cosine)))


def spread_tokens(tokens: Tensor) -> Tensor:
    """Gather at most ``MAX_TOKENS`` of ``[B, N, D]`` tokens, evenly over images and patches."""
    batch, length, _ = tokens.shape
    images = min(batch, MAX_TOKENS)
    per_image = min(length, MAX_TOKENS // images)
    number = torch.arange(images, device=tokens.device)[:, None]
    patch = torch.arange(per_image, device=tokens.device) * length // per_image
    patch = (patch + number * PATCH_STRIDE) % length  # [images, per_image]
    return tokens[number * batch // images, patch].flatten(0, 1)


def gradient_shares(terms: Mapping[str, Tensor], tokens: Tensor) -> dict[str, Tensor]:
    """Return the share of the gradient norm that each loss term causes at some tokens.

    Args:
        terms: weighted loss terms, 0-dim (``targets.weighted_terms``).
        tokens: a tensor that all terms are computed from: the decoder's output ``[R, Q, E]``, where
            a term costs the backward of one linear head only.

    Returns:
        For each term the norm of its gradient over the sum of these norms, 0-dim float32; 0 for a
        term that does not depend on ``tokens``, and for all if no term does. The graph is kept and
        no ``.grad`` is written. No host synchronisation.

    Source: docs/method.md, section "Diagnostics".
    """
    norms: dict[str, Tensor] = {}
    for name, term in terms.items():
        gradient = None
        if term.requires_grad:
            (gradient,) = torch.autograd.grad(term, tokens, retain_graph=True, allow_unused=True)
        norms[name] = (
            torch.zeros((), device=tokens.device) if gradient is None else gradient.float().norm()
        )
    total = torch.stack(list(norms.values())).sum().clamp_min(torch.finfo(torch.float32).tiny)
    return {name: norm / total for name, norm in norms.items()}
