"""Masks from an attention map, without a config."""

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from cmtmae_scale.config.schema import Mask
from cmtmae_scale.method import masking
from cmtmae_scale.method.masking import PatchChoice


def choose_masks(
    attention: Tensor | NDArray[Any] | None = None,
    *,
    num_patches: int | None = None,
    positions: Tensor | None = None,
    seed: int = 0,
    salient_fraction: float = 0.5,
    **settings: Any,
) -> PatchChoice:
    """Choose masks as a run does: ``cmtmae_scale.method.masking.choose_masks`` by keywords.

    Args:
        attention: attention map over patches, ``[B, N]``; ``None`` for ``sampler="random"``.
        num_patches: N, where there is no attention map.
        positions: global sample indices, int64 ``[B]``, which determine the noise; ``None``: 0, 1,
            2 and so on, or 0 if there is no attention map.
        seed: seed of the noise.
        salient_fraction: fraction of the masked patches that is most salient
            (``sampler="hide_salient_mix"``), in [0, 1].
        settings: keys of the config's group ``mask``, such as ``sampler``, ``ratio`` and
            ``masks_per_view``; ``cmtmae config mask`` describes them.

    Returns:
        ``ids_keep`` ``[R, K]``, ``ids_hidden`` ``[R, M]`` and ``ids_thrown`` ``[R, T]``, int64, R
        rows: row b * k + j is mask j of view b, k = ``masks_per_view``.

    Raises:
        TypeError: for a setting that ``mask`` lacks.
        ValueError: for values that do not fit the attention map or each other.
    """
    values = None if attention is None else torch.as_tensor(attention)
    if values is not None and values.ndim != 2:
        raise ValueError(f"attention has shape {tuple(values.shape)}; expected [B, N]")
    if positions is None:
        positions = torch.arange(1 if values is None else len(values))
    if values is not None:
        positions = positions.to(values.device)
    mask = Mask(**settings)
    return masking.choose_masks(mask, values, positions, seed, salient_fraction, length=num_patches)
