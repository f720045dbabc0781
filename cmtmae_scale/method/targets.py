"""Targets of the decoder, the order of the predicted tokens, and the losses.

Targets and losses are float32; nothing synchronises with the host.

Legend: B views in a micro-batch, R rows (masks_per_view masks of each view), N patches, K visible,
M masked, Q predicted tokens, D student width, F teacher width, P patch side in pixels.

Source: docs/method.md, sections "Targets" and "Losses".
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from cmtmae_scale.config.derive import loss_terms
from cmtmae_scale.config.schema import Config, Loss
from cmtmae_scale.config.teachers import teacher_shares
from cmtmae_scale.method.channels import ChannelScaling
from cmtmae_scale.method.masking import PatchChoice

EPS = 1e-6
RUNNING_NORMS = ("channel", "center")
"""Norms of a target that use running statistics per channel."""


Predictions = dict[str, Tensor]
"""Predictions, or their targets, by term of the loss, in the order of ``loss_terms``; an unused
term is absent.

``teacher``, or ``teacher_NAME`` for each of several: ``[R, Q, F]``; ``student``: ``[R, Q, D]``;
``pixel``: ``[R, Q', 3 P P]``, without class token.
"""


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
                "loss.include_cls requires the class token, but these features have none; "
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
    weights: Mapping[str, float | Tensor],
) -> dict[str, Tensor]:
    """Return the losses against all targets, and their weighted sum.

    Args:
        predictions: of the decoder, rows in the order of ``layout``.
        targets: normalised and gathered like the predictions; no gradient flows into them.
        valid: bool ``[R]``; an invalid row adds exactly 0 to losses and gradients, whatever finite
            values it holds.
        layout: of the feature targets; pixels follow ``layout.without_cls()``.
        loss: the config's group.
        weights: of each term, see ``term_weights``.

    Returns:
        ``total``, the weighted sum to differentiate, then each term without its weight: sums over
        valid rows of the rows' weighted token means, 0-dim float32. The caller divides by the
        constant global_batch_size * masks_per_view, so that the mean is the same for every split of
        a batch.

    Raises:
        ValueError: if a term lacks its prediction, target or weight, or shapes differ.

    Source: docs/method.md, section "Losses".
    """
    given = {"prediction": predictions, "target": targets, "weight": weights}
    for name in (*predictions, *targets, *weights):
        for kind, terms in given.items():
            if name not in terms:
                raise ValueError(f"the {name} term has no {kind}")
    losses: dict[str, Tensor] = {}
    for name, prediction in predictions.items():
        is_pixel = name == "pixel"
        kind, order = ("mse", layout.without_cls()) if is_pixel else (loss.type, layout)
        per_token = token_loss(prediction, targets[name], kind, loss.beta)
        losses[name] = sum_rows(per_token, valid, order)
    return {"total": weighted_sum(losses, weights), **losses}


def term_weights(config: Config, alpha_target: float | Tensor) -> dict[str, float | Tensor]:
    """Return the weight of each term of a run's loss.

    Args:
        config: the run.
        alpha_target: weight of the teachers in [0, 1], a float or a 0-dim tensor.

    Source: docs/method.md, sections "Losses" and "Several teachers".
    """
    loss, shares = config.loss, teacher_shares(config)
    weights = {name: alpha_target * loss.teacher * share for name, share in shares.items()}
    weights |= {"student": (1.0 - alpha_target) * loss.student, "pixel": loss.pixel}
    return {name: weights[name] for name in loss_terms(config)}


def weighted_sum(losses: Mapping[str, Tensor], weights: Mapping[str, float | Tensor]) -> Tensor:
    """Return the sum of the losses that have a weight, each times its weight, 0-dim float32."""
    return cast(Tensor, sum(weight * losses[name] for name, weight in weights.items())).float()


def sum_rows(per_token: Tensor, valid: Tensor, layout: TokenLayout) -> Tensor:
    """Return the sum over valid rows of the weighted mean over tokens of ``[R, Q]`` losses."""
    if per_token.shape != (valid.shape[0], layout.num_tokens):
        raise ValueError(
            f"losses {tuple(per_token.shape)} do not fit {valid.shape[0]} rows of "
            f"{layout.num_tokens} tokens"
        )
    rows = (per_token * layout.weights(per_token.device)).sum(dim=1) / layout.weight_sum
    return torch.where(valid, rows, 0.0).sum()
