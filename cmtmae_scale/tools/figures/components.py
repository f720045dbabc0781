"""Principal components of patch features as colours, comparable from step to step."""

import torch
from torch import Tensor

SPREAD = 2.0
"""Standard deviations from the mean to black or to full colour."""


def principal_colours(features: Tensor, reference: Tensor) -> Tensor:
    """Return three principal components as red, green and blue.

    Order and sign of the components are arbitrary and change during training. The components are
    whitened and rotated together as close as possible to a constant reference, so the
    colours do not depend on the basis of the decomposition.

    Args:
        features: ``[n, N, D]``, D >= 3.
        reference: ``[n, N, 3]``, such as the patches' mean colours.

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
    whitened = left @ (turn.U @ turn.Vh) * len(rows) ** 0.5
    colours = (0.5 + whitened / (2 * SPREAD)).clamp(0, 1)
    return colours.float().view(*features.shape[:2], 3)
