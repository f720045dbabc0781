"""Features of patches as colours that can be compared from step to step."""

import torch
from torch import Tensor

SPREAD = 2.0
"""Deviations from the mean to black or to full colour."""


def principal_colours(features: Tensor, reference: Tensor) -> Tensor:
    """Three principal components as red, green and blue.

    The components have no order or sign of their own, and change both as training goes on. They are
    whitened, and rotated together to lie as near as they can to a reference that stays the same: so
    whatever basis the decomposition gives, the colours are the same.

    Args:
        features: ``[n, N, D]``, D >= 3.
        reference: ``[n, N, 3]``, such as the patches' own colours.

    Returns:
        ``[n, N, 3]`` in [0, 1]; grey where the features do not vary.

    Source: orthogonal Procrustes, P. H. Schonemann, Psychometrika 31 (1966).
    """
    rows = features.double().flatten(0, 1).cpu()
    rows = rows - rows.mean(0)
    axes = torch.linalg.svd(rows, full_matrices=False)
    left = axes.U[:, :3] * (axes.S[:3] > 1e-9 * axes.S[0].clamp_min(1e-300))
    target = reference.double().flatten(0, 1).cpu()
    turn = torch.linalg.svd(left.T @ (target - target.mean(0)))
    deviations = left @ (turn.U @ turn.Vh) * len(rows) ** 0.5
    colours = (0.5 + deviations / (2 * SPREAD)).clamp(0, 1)
    return colours.float().view(*features.shape[:2], 3)
