"""Attention maps over patches: extract, normalise, resize, mix and measure them.

Every attention map is float32 without gradient; nothing here synchronises with the host.

Legend: B views in a micro-batch, R rows (several masks of a view), N patches, K visible, P prefix
tokens (class token, registers), T tokens = P + N, H heads, d head width.

Source: docs/method.md, sections "Attention maps", "Normalisation", "Grids" and "Collaborative
attention".
"""

import itertools
from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from cmtmae_scale.config.schema import Attention

Grid = tuple[int, int]

EMPTY_MASS = 1e-12
"""An attention map whose sum is at most this carries no information and becomes uniform."""


@torch.no_grad()
def mean_query_row(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Return the attention over all tokens, averaged over heads and queries.

    Args:
        query: ``[B, H, Q, d]``, after q_norm if the model has one: the class token, a pooling
            query, or the patches of a model without class token.
        key: ``[B, H, T, d]``.
        scale: factor of the scores, usually ``d ** -0.5``.

    Returns:
        ``[B, T]``, float32, rows sum to 1; scores and softmax are float32 even under autocast. The
        prefix is included: ``patch_map`` drops it after the mean over heads and renormalises.

    Source: docs/method.md, section "Attention maps".
    """
    with torch.autocast("cpu" if query.is_meta else query.device.type, enabled=False):
        scores = query.float() @ key.float().transpose(-2, -1) * scale  # [B, H, Q, T]
        return scores.softmax(dim=-1).mean(dim=(1, 2))


@torch.no_grad()
def patch_map(row: Tensor, num_prefix: int) -> Tensor:
    """Return the patch part of an attention row, renormalised.

    Args:
        row: ``[B, P + N]``.
        num_prefix: P, tokens before the first patch.

    Returns:
        ``[B, N]``, float32, rows sum to 1; NaN for a row that is not finite.
    """
    return normalise_finite(row[:, num_prefix:])


@torch.no_grad()
def activation_map(tokens: Tensor) -> Tensor:
    """Return the length of each patch's features as a map, for networks without attention.

    Args:
        tokens: features of the patches, ``[B, N, C]``.

    Returns:
        Euclidean norm over channels, ``[B, N]``, float32, rows sum to 1; NaN for a row that is not
        finite.

    Source: docs/method.md, section "Attention maps"; arXiv 1612.03928, activation-based attention.
    """
    return normalise_finite(tokens.float().square().sum(dim=-1).sqrt())


def normalise_finite(values: Tensor) -> Tensor:
    """Return ``normalise_map`` of ``[B, N]``, and NaN for each row that is not finite.

    NaN reveals a failed network. Masks count NaN as 0, so that they would be chosen as if the
    network had attended everywhere alike.
    """
    is_finite = values.isfinite().all(dim=-1, keepdim=True)
    return torch.where(is_finite, normalise_map(values, "prob"), torch.nan)


def sanitise(attention: Tensor) -> Tensor:
    """Replace NaN, infinities and negative values by 0; float32."""
    return torch.nan_to_num(attention.float(), nan=0.0, posinf=0.0, neginf=0.0).clamp_min(0.0)


def ascending_rank(values: Tensor) -> Tensor:
    """Return the rank of each value in its row, 0 for the smallest, ties by index; int64."""
    order = torch.argsort(values, dim=-1, stable=True)
    return torch.argsort(order, dim=-1, stable=True)


@torch.no_grad()
def normalise_map(attention: Tensor, kind: str = "prob") -> Tensor:
    """Normalise attention maps so that those of different models can be mixed.

    Args:
        attention: ``[B, N]``; NaN, infinities and negative values count as 0.
        kind: ``prob`` (sum 1; uniform if the sum is not above 1e-12), ``minmax`` ([0, 1]),
            ``rank`` ((rank + 0.5) / N, ties by index) or ``zscore`` (biased standard deviation).

    Returns:
        ``[B, N]``, float32, finite.

    Raises:
        ValueError: for an unknown kind.

    Source: docs/method.md, section "Normalisation".
    """
    a = sanitise(attention)
    if kind == "prob":
        peak = a.amax(dim=-1, keepdim=True)
        scaled = a / peak.clamp_min(torch.finfo(torch.float32).tiny)  # so that no sum overflows
        mass = scaled.sum(dim=-1, keepdim=True)
        empty = peak * mass <= EMPTY_MASS
        return torch.where(empty, 1.0 / a.shape[-1], scaled / mass.clamp_min(EMPTY_MASS))
    if kind == "minmax":
        low = a.amin(dim=-1, keepdim=True)
        return (a - low) / (a.amax(dim=-1, keepdim=True) - low).clamp_min(1e-12)
    if kind == "rank":
        return (ascending_rank(a).float() + 0.5) / a.shape[-1]
    if kind == "zscore":
        centred = a - a.mean(dim=-1, keepdim=True)
        return centred / centred.square().mean(dim=-1, keepdim=True).sqrt().clamp_min(1e-12)
    raise ValueError(f"attention norm {kind!r} is not one of prob, minmax, rank, zscore")


def row_quantile(values: Tensor, share: float) -> Tensor:
    """Return the linearly interpolated quantile of each row, ``[B, 1]``.

    Equals ``torch.quantile``, which synchronises with the host to check its argument.
    """
    ordered = values.sort(dim=-1).values
    place = share * (values.shape[-1] - 1)
    low = int(place)
    high = min(low + 1, values.shape[-1] - 1)
    return torch.lerp(ordered[:, low : low + 1], ordered[:, high : high + 1], place - low)


@torch.no_grad()
def sharpen(attention: Tensor, temperature: float = 1.0, clip_quantile: float = 1.0) -> Tensor:
    """Clamp outliers of an attention map, then raise it to the power 1 / T.

    Args:
        attention: ``[B, N]``.
        temperature: T > 0; below 1 sharpens, above 1 flattens.
        clip_quantile: values above this quantile of their row are clamped to it; 1 is off.

    Returns:
        ``[B, N]``, float32, rows sum to 1.

    Raises:
        ValueError: if a setting is out of range.

    Source: docs/method.md, section "Normalisation".
    """
    if not temperature > 0.0:
        raise ValueError(f"temperature={temperature} must be above 0")
    if not 0.0 <= clip_quantile <= 1.0:
        raise ValueError(f"clip_quantile={clip_quantile} must lie in [0, 1]")
    a = sanitise(attention)
    if clip_quantile < 1.0:
        a = torch.minimum(a, row_quantile(a, clip_quantile))
    a = normalise_map(a, "prob")
    if temperature == 1.0:
        return a
    # relative to the largest value, so that no power underflows everywhere
    return normalise_map((a / a.amax(dim=-1, keepdim=True)).pow(1.0 / temperature), "prob")


@torch.no_grad()
def resize_tokens(tokens: Tensor, from_grid: Grid, to_grid: Grid) -> Tensor:
    """Resample patch tokens to another grid, without renormalising.

    Args:
        tokens: ``[B, N, C]`` in row-major order.
        from_grid: rows and columns of ``tokens``.
        to_grid: rows and columns of the result.

    Returns:
        float32 ``[B, N', C]``: unchanged for equal grids, exact means for integer reductions, exact
        copies for integer enlargements, else bilinear with antialiasing.

    Raises:
        ValueError: if N is not the size of ``from_grid``.

    Source: docs/method.md, section "Grids".
    """
    batch, count, width = tokens.shape
    if count != from_grid[0] * from_grid[1]:
        raise ValueError(f"{count} tokens do not fill a {from_grid[0]} x {from_grid[1]} grid")
    if from_grid == to_grid:
        return tokens.float()
    images = tokens.float().transpose(1, 2).reshape(batch, width, *from_grid)
    if all(a % b == 0 for a, b in zip(from_grid, to_grid, strict=True)):
        images = F.interpolate(images, size=to_grid, mode="area")
    elif all(b % a == 0 for a, b in zip(from_grid, to_grid, strict=True)):
        images = F.interpolate(images, size=to_grid, mode="nearest")
    else:
        images = F.interpolate(
            images, size=to_grid, mode="bilinear", align_corners=False, antialias=True
        )
    return images.flatten(2).transpose(1, 2)


@torch.no_grad()
def resize_map(attention: Tensor, from_grid: Grid, to_grid: Grid) -> Tensor:
    """Resample an attention map to another grid and renormalise it.

    Args:
        attention: ``[B, N]``, row-major.
        from_grid: rows and columns of ``attention``.
        to_grid: rows and columns of the result.

    Returns:
        ``[B, N']``, float32, rows sum to 1; NaN for a row that is not finite.
    """
    positive = attention.float().clamp_min(0.0)
    resized = resize_tokens(positive.unsqueeze(-1), from_grid, to_grid)
    return normalise_finite(resized.squeeze(-1))


@torch.no_grad()
def collaborative_attention(
    teacher: Tensor | None, student: Tensor | None, alpha: float | Tensor, norm: str = "prob"
) -> Tensor:
    """Mix the attention maps of the teacher and the momentum encoder.

    Args:
        teacher: attention map of the frozen teacher, ``[B, N]``; ``None`` where its weight is 0
            throughout the run and it was not built.
        student: attention map of the momentum encoder, same shape; ``None`` likewise.
        alpha: weight of the teacher in [0, 1], a float or a 0-dim tensor; 1 ignores the student.
        norm: normalisation of both before mixing (``normalise_map``).

    Returns:
        ``alpha * teacher + (1 - alpha) * student``, ``[B, N]``, float32; rows sum to 1 with
        ``prob``. No gradient, no host synchronisation.

    Raises:
        ValueError: if both are missing, the shapes differ, or a float alpha gives weight to a
            missing attention map.

    Source: docs/method.md, section "Collaborative attention"; arXiv 2412.17566.
    """
    teacher, student = (
        None if one is None else normalise_map(one, norm) for one in (teacher, student)
    )
    return mix_normalised(teacher, student, alpha)


def mix_normalised(teacher: Tensor | None, student: Tensor | None, alpha: float | Tensor) -> Tensor:
    """Return the mix of normalised maps; see ``collaborative_attention``."""
    if teacher is None or student is None:
        present, weight = (teacher, 1.0) if student is None else (student, 0.0)
        if present is None:
            raise ValueError("neither a teacher's nor a student's attention map was given")
        if not isinstance(alpha, Tensor) and alpha != weight:
            missing = "student" if student is None else "teacher"
            raise ValueError(
                f"alpha={alpha} gives weight to the {missing}'s attention map, which is missing"
            )
        return present
    if teacher.shape != student.shape:
        raise ValueError(
            f"attention maps differ in shape: teacher {tuple(teacher.shape)}, student "
            f"{tuple(student.shape)}"
        )
    return alpha * teacher + (1.0 - alpha) * student


@torch.no_grad()
def mix_attention(
    settings: Attention,
    teachers: Mapping[str, Tensor],
    weights: Mapping[str, float],
    student: Tensor | None,
    alpha: float | Tensor,
) -> Tensor | None:
    """Mix the attention maps of the teachers and of the momentum encoder.

    Each map is sharpened and normalised; the weighted mean of the teachers' maps is then mixed with
    the momentum encoder's as in ``collaborative_attention``.

    Args:
        settings: the config's group ``attention``.
        teachers: attention maps ``[B, N]`` by the teacher's name; empty without a teacher's map.
        weights: of each map in the teachers' mean, above 0; others are ignored.
        student: attention map of the momentum encoder, or ``None``.
        alpha: weight of the teachers in [0, 1].

    Returns:
        ``[B, N]``, float32; rows sum to 1 with ``norm=prob``; ``None`` without any map. No host
        synchronisation.

    Raises:
        ValueError: as ``collaborative_attention``.

    Source: docs/method.md, section "Several teachers".
    """
    if not teachers and student is None:
        return None

    def normalised(one: Tensor) -> Tensor:
        sharp = sharpen(one, settings.temperature, settings.clip_quantile)
        return normalise_map(sharp, settings.norm)

    whole = sum(weights[name] for name in teachers)
    mean = None
    for name, one in teachers.items():
        weighted = weights[name] / whole * normalised(one)
        mean = weighted if mean is None else mean + weighted
    return mix_normalised(mean, None if student is None else normalised(student), alpha)


@torch.no_grad()
def mean_agreement(maps: Iterable[Tensor]) -> Tensor:
    """Return the mean of ``map_agreement`` over all pairs of two or more maps ``[B, N]``, 0-dim."""
    pairs = [map_agreement(a, b) for a, b in itertools.combinations(maps, 2)]
    return torch.stack(pairs).mean()


@torch.no_grad()
def map_agreement(a: Tensor, b: Tensor, kind: str = "rank") -> Tensor:
    """Return the agreement of two attention maps, for the log.

    Args:
        a: ``[B, N]``.
        b: ``[B, N]``.
        kind: ``rank`` (correlation of ranks, ties by index) or ``cosine`` (of the raw values).

    Returns:
        0-dim float32: mean over the batch, in [-1, 1]. No host synchronisation.

    Raises:
        ValueError: for an unknown kind.
    """
    if kind == "rank":
        finite = (torch.nan_to_num(x.float(), nan=0.0, posinf=0.0, neginf=0.0) for x in (a, b))
        first, second = (ascending_rank(x).float() for x in finite)
        first, second = (x - (x.shape[-1] - 1) / 2.0 for x in (first, second))
    elif kind == "cosine":
        first, second = sanitise(a), sanitise(b)
    else:
        raise ValueError(f"agreement {kind!r} is not one of rank, cosine")
    return F.cosine_similarity(first, second, dim=-1).mean()


@torch.no_grad()
def visible_mass(attention: Tensor, ids_keep: Tensor) -> Tensor:
    """Return the fraction of the attention on visible patches.

    Args:
        attention: ``[B, N]``.
        ids_keep: ``[R, K]``, R a multiple of B (row b * k + j is mask j of view b).

    Returns:
        0-dim float32: mean over rows, in [0, 1]. About K / N for random masks; a value on the other
        side of K / N than expected shows that the sampler works in the wrong direction.
    """
    views = attention.shape[0]
    kept = normalise_map(attention, "prob").gather(1, ids_keep.reshape(views, -1))
    return kept.sum() / ids_keep.shape[0]
