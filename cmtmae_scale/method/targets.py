"""Targets of the decoder, the order of the predicted tokens, and the losses.

Targets and losses are float32; nothing synchronises with the host.

Legend: B views in a micro-batch, R rows (masks_per_view masks of each view), N patches, K visible,
M masked, Q predicted tokens, D student width, F teacher width, P patch side in pixels.

Source: docs/method.md, sections "Targets" and "Losses".
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from cmtmae_scale.config.derive import term_name
from cmtmae_scale.config.schema import Config, Loss
from cmtmae_scale.method.channels import ChannelScaling
from cmtmae_scale.method.masking import PatchChoice

EPS = 1e-6
RUNNING_NORMS = ("channel", "center")
"""Norms of a target that use running statistics per channel."""


class Predictions(NamedTuple):
    """One tensor per target, ``None`` for an unused target; also holds the targets themselves."""

    teacher: Tensor | None
    """``[R, Q, F]``."""
    student: Tensor | None
    """``[R, Q, D]``."""
    pixel: Tensor | None
    """``[R, Q', 3 P P]``, without class token."""


class SeveralPredictions(NamedTuple):
    """Predictions or targets of a run with several teachers."""

    others: Predictions
    """Those of the momentum encoder and of the pixels."""
    teachers: tuple[Tensor, ...]
    """``[R, Q, F]`` for each teacher whose features are a target, in order."""


def feature_terms(
    found: Predictions | SeveralPredictions, names: Iterable[str]
) -> dict[str, Tensor | None]:
    """Return predictions or targets of features by the name of their term.

    Args:
        found: predictions or targets.
        names: of several teachers, in order; unused for a single teacher.
    """
    if isinstance(found, Predictions):
        return {"teacher": found.teacher, "student": found.student}
    each = dict(zip(map(term_name, names), found.teachers, strict=True))
    return {**each, "student": found.others.student}


class Losses(NamedTuple):
    """Sums over valid rows, 0-dim float32; an unused term is 0."""

    total: Tensor
    """Weighted sum of the terms, to differentiate."""
    teacher: Tensor
    """Without weight and alpha."""
    student: Tensor
    """Without weight and alpha."""
    pixel: Tensor
    """Without weight."""


@dataclass(frozen=True)
class TokenLayout:
    """Predicted tokens of a row, in the order [class token][visible][masked], with weights."""

    cls: bool
    """Whether the class token is predicted (weight 1)."""
    num_visible: int
    """Visible patches predicted: K or 0."""
    num_hidden: int
    """Masked patches predicted: the first of ``PatchChoice.ids_hidden``, or 0."""
    visible_weight: float = 1.0
    """Weight of a visible patch; a masked patch has 1."""

    @classmethod
    def from_config(
        cls, config: Config, num_keep: int, num_hidden: int, num_thrown: int = 0
    ) -> Self:
        """Return the layout of the feature targets.

        Args:
            config: ``loss`` sets which tokens count, ``decoder.predict_ratio`` how many masked
                patches are predicted.
            num_keep: K.
            num_hidden: M.
            num_thrown: T; ``predict_ratio`` is a fraction of all N = K + M + T patches.

        Returns:
            The layout. The class token is predicted with ``loss.include_cls``, except under
            ``loss.tokens=masked``.
        """
        loss, share = config.loss, config.decoder.predict_ratio
        predicted = num_hidden
        if share is not None:
            length = num_keep + num_hidden + num_thrown
            predicted = min(max(int(length * share + EPS), 1), num_hidden)
        visible = loss.tokens != "masked"
        return cls(
            cls=loss.include_cls and visible,
            num_visible=num_keep if visible else 0,
            num_hidden=0 if loss.tokens == "visible" else predicted,
            visible_weight=loss.visible_weight if loss.tokens == "weighted" else 1.0,
        )

    @property
    def num_tokens(self) -> int:
        """Q."""
        return int(self.cls) + self.num_visible + self.num_hidden

    @property
    def weight_sum(self) -> float:
        """Sum of the weights of one row."""
        return int(self.cls) + self.num_visible * self.visible_weight + self.num_hidden

    def without_cls(self) -> "TokenLayout":
        """Return this layout without class token: that of the pixel target."""
        return replace(self, cls=False)

    def weights(self, device: torch.device | str | None = None) -> Tensor:
        """Return the weight of each token, float32 ``[Q]``."""
        ones = torch.ones(self.num_tokens, dtype=torch.float32, device=device)
        start = int(self.cls)
        ones[start : start + self.num_visible] *= self.visible_weight
        return ones

    def gather(self, features: Tensor, choice: PatchChoice) -> Tensor:
        """Gather the predicted tokens from the features of whole images.

        Args:
            features: ``[B, N, F]``, or ``[B, 1 + N, F]`` with the class token first.
            choice: masks with R = B * masks_per_view rows.

        Returns:
            ``[R, Q, F]``; a view's features serve all its masks.

        Raises:
            ValueError: if the shapes do not fit, or the features lack a class token to predict.
        """
        views, tokens, width = features.shape
        rows = choice.ids_keep.shape[0]
        length = sum(ids.shape[1] for ids in choice)
        prefix = tokens - length
        if prefix not in (0, 1) or rows % views:
            raise ValueError(
                f"features {tuple(features.shape)} do not fit {rows} masks of {length} patches"
            )
        if self.cls and not prefix:
            raise ValueError(
                "loss.include_cls asks for the class token, but these features have none; "
                "set loss.include_cls=false"
            )
        ids = [choice.ids_keep[:, : self.num_visible], choice.ids_hidden[:, : self.num_hidden]]
        index = torch.cat(ids, dim=1) + prefix
        if self.cls:
            index = torch.cat([torch.zeros_like(choice.ids_keep[:, :1]), index], dim=1)
        if index.shape[1] != self.num_tokens:
            raise ValueError(f"{self} does not fit masks with {ids[0].shape[1]} visible patches")
        index = index.reshape(views, -1, 1).expand(-1, -1, width)
        return features.gather(1, index).reshape(rows, self.num_tokens, width)


def normalise(
    features: Tensor, kind: str, num_prefix: int = 0, scaling: ChannelScaling | None = None
) -> Tensor:
    """Normalise the tokens of a target.

    Args:
        features: ``[..., F]``; for ``instance``, ``channel`` and ``center`` ``[B, T, F]``.
        kind: ``l2`` (unit length; zero stays zero), ``ln`` (layer norm without affine, biased
            variance, eps 1e-6), ``instance`` (each channel over the patches of a view, biased
            variance, eps 1e-6; the class token as in ``ln``), ``channel`` or ``center`` (each
            channel over the views of all ranks, by ``scaling``) or ``none``.
        num_prefix: class tokens before the patches, 0 or 1; used by ``instance``.
        scaling: of ``channel`` and ``center``.

    Returns:
        Same shape, float32, detached.

    Raises:
        ValueError: for an unknown kind, or without the scaling that it needs.

    Source: docs/method.md, section "Targets".
    """
    x = features.detach().float()
    if kind == "l2":
        return F.normalize(x, dim=-1, eps=EPS)
    if kind == "ln":
        return F.layer_norm(x, x.shape[-1:], eps=EPS)
    if kind == "instance":
        var, mean = torch.var_mean(x[:, num_prefix:], dim=1, keepdim=True, correction=0)
        patches = (x[:, num_prefix:] - mean) / (var + EPS).sqrt()
        return torch.cat([normalise(x[:, :num_prefix], "ln"), patches], dim=1)
    if kind in RUNNING_NORMS:
        if scaling is None:
            raise ValueError(f"target norm {kind!r} needs statistics; give scaling")
        return scaling.apply(x)
    if kind == "none":
        return x
    raise ValueError(f"target norm {kind!r} is not one of l2, ln, instance, channel, center, none")


def token_loss(prediction: Tensor, target: Tensor, kind: str, beta: float = 2.0) -> Tensor:
    """Return the distance of each token.

    Args:
        prediction: ``[..., F]``, any float type.
        target: same shape; no gradient flows into it.
        kind: ``cosine`` (2 - 2 cos, in [0, 4]; 2 for a zero vector), ``mse`` or ``smooth_l1`` (both
            means over channels).
        beta: corner of smooth L1: ``0.5 d d / beta`` for |d| < beta, else ``|d| - 0.5 beta``.

    Returns:
        ``[...]``, float32.

    Raises:
        ValueError: for an unknown kind or different shapes.

    Source: docs/method.md, section "Losses".
    """
    if prediction.shape != target.shape:
        raise ValueError(
            f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} differ in shape"
        )
    p, t = prediction.float(), target.detach().float()
    if kind == "cosine":
        cosine = (F.normalize(p, dim=-1, eps=EPS) * F.normalize(t, dim=-1, eps=EPS)).sum(dim=-1)
        return 2.0 - 2.0 * cosine
    if kind == "mse":
        return (p - t).square().mean(dim=-1)
    if kind == "smooth_l1":
        return F.smooth_l1_loss(p, t, reduction="none", beta=beta).mean(dim=-1)
    raise ValueError(f"loss type {kind!r} is not one of cosine, mse, smooth_l1")


def patchify(images: Tensor, patch: int) -> Tensor:
    """Cut images into patches.

    Args:
        images: ``[B, 3, S, S]``.
        patch: P, pixels.

    Returns:
        ``[B, N, P * P * 3]``: patches in row-major order, each in (row, column, channel) order.

    Raises:
        ValueError: if a side is not a multiple of the patch.

    Source: MAE's patchify.
    """
    batch, channels, height, width = images.shape
    if height % patch or width % patch:
        raise ValueError(f"{height} x {width} pixels are not a multiple of patch={patch}")
    rows, columns = height // patch, width // patch
    x = images.reshape(batch, channels, rows, patch, columns, patch)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, patch * patch * channels)


def pixel_targets(patches: Tensor, norm: str) -> Tensor:
    """Return the pixel target.

    Args:
        patches: ``[B, N, P * P * 3]``.
        norm: ``patch`` (each patch standardised with the unbiased variance + 1e-6, as MAE does) or
            ``none``.

    Returns:
        Same shape, float32, detached.

    Raises:
        ValueError: for an unknown norm.
    """
    x = patches.detach().float()
    if norm == "none":
        return x
    if norm == "patch":
        var, mean = torch.var_mean(x, dim=-1, keepdim=True, correction=1)
        return (x - mean) / (var + EPS).sqrt()
    raise ValueError(f"pixel norm {norm!r} is not one of patch, none")


def objective(
    predictions: Predictions,
    targets: Predictions,
    valid: Tensor,
    layout: TokenLayout,
    loss: Loss,
    alpha_target: float | Tensor,
) -> Losses:
    """Return the weighted sum of the losses against both targets and the pixels.

    Args:
        predictions: of the decoder, rows in the order of ``layout``.
        targets: normalised and gathered like the predictions; no gradient flows into them.
        valid: bool ``[R]``; an invalid row adds exactly 0 to losses and gradients, whatever finite
            values it holds.
        layout: of the feature targets; pixels follow ``layout.without_cls()``.
        loss: the config's group.
        alpha_target: weight of the teacher in [0, 1], a float or a 0-dim tensor.

    Returns:
        Sums over valid rows of the rows' weighted token means. The caller divides by the constant
        global_batch_size * masks_per_view, so that the mean is the same for every
        split of a batch.

    Raises:
        ValueError: if a prediction lacks its target, or shapes differ.

    Source: docs/method.md, section "Losses".
    """
    zero = torch.zeros((), dtype=torch.float32, device=valid.device)

    def term(name: str, layout: TokenLayout, kind: str) -> Tensor:
        prediction, target = getattr(predictions, name), getattr(targets, name)
        if prediction is None and target is None:
            return zero
        if prediction is None or target is None:
            absent = "prediction" if prediction is None else "target"
            raise ValueError(f"the {name} term has no {absent}")
        return sum_rows(token_loss(prediction, target, kind, loss.beta), valid, layout)

    losses = Losses(
        total=zero,
        teacher=term("teacher", layout, loss.type),
        student=term("student", layout, loss.type),
        pixel=term("pixel", layout.without_cls(), "mse"),
    )
    teacher, student, pixel = weighted_terms(losses, loss, alpha_target).values()
    # torch 2.11 cannot compile _replace
    total = (teacher + student + pixel).float()
    return Losses(total, losses.teacher, losses.student, losses.pixel)


def weighted_terms(losses: Losses, loss: Loss, alpha_target: float | Tensor) -> dict[str, Tensor]:
    """Return the terms that sum to the total; arguments as in ``objective``."""
    return {
        "teacher": alpha_target * loss.teacher * losses.teacher,
        "student": (1.0 - alpha_target) * loss.student * losses.student,
        "pixel": loss.pixel * losses.pixel,
    }


def teacher_shares(weights: Mapping[str, float]) -> dict[str, float]:
    """Return the weights of several teachers' terms, whose sum is 1, by the term's name."""
    whole = sum(weights.values())
    return {term_name(name): weight / whole for name, weight in weights.items()}


def several_objective(
    predictions: SeveralPredictions,
    targets: SeveralPredictions,
    valid: Tensor,
    layout: TokenLayout,
    loss: Loss,
    alpha_target: float | Tensor,
    shares: Sequence[float],
) -> tuple[Losses, tuple[Tensor, ...]]:
    """Return ``objective`` with the weighted mean of several teachers' terms as the teacher's.

    Args:
        predictions: as in ``objective``, one per teacher.
        targets: likewise.
        valid: as in ``objective``.
        layout: as in ``objective``.
        loss: as in ``objective``.
        alpha_target: as in ``objective``.
        shares: weight of each teacher's term, with the sum 1.

    Returns:
        The losses, and each teacher's term without weight and alpha, a 0-dim float32 sum over valid
        rows.

    Raises:
        ValueError: as ``objective``.

    Source: docs/method.md, section "Several teachers".
    """
    each = tuple(
        sum_rows(token_loss(prediction, target, loss.type, loss.beta), valid, layout)
        for prediction, target in zip(predictions.teachers, targets.teachers, strict=True)
    )
    teacher = torch.zeros((), dtype=torch.float32, device=valid.device)
    for term, share in zip(each, shares, strict=True):
        teacher = teacher + share * term
    rest = objective(predictions.others, targets.others, valid, layout, loss, alpha_target)
    total = (alpha_target * loss.teacher * teacher + rest.total).float()
    return Losses(total, teacher, rest.student, rest.pixel), each


def sum_rows(per_token: Tensor, valid: Tensor, layout: TokenLayout) -> Tensor:
    """Return the sum over valid rows of the weighted mean over tokens of ``[R, Q]`` losses."""
    if per_token.shape != (valid.shape[0], layout.num_tokens):
        raise ValueError(
            f"losses {tuple(per_token.shape)} do not fit {valid.shape[0]} rows of "
            f"{layout.num_tokens} tokens"
        )
    rows = (per_token * layout.weights(per_token.device)).sum(dim=1) / layout.weight_sum
    return torch.where(valid, rows, 0.0).sum()
