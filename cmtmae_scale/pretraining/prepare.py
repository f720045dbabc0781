"""From views to a micro-batch: teacher, momentum encoder, mixed attention map, masks, targets."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cmtmae_scale.backends.base import Backend
from cmtmae_scale.config.derive import needs
from cmtmae_scale.config.schema import Attention, Config
from cmtmae_scale.method.attention import (
    collaborative_attention,
    map_agreement,
    sharpen,
    visible_mass,
)
from cmtmae_scale.method.images import IMAGENET_MEAN, IMAGENET_STD, normalise_images
from cmtmae_scale.method.masking import PatchChoice, choose_masks
from cmtmae_scale.method.targets import Predictions, TokenLayout, normalise, patchify, pixel_targets
from cmtmae_scale.pretraining.scalars import PretrainingScalars
from cmtmae_scale.teachers.base import TeacherSource, TeacherView
from dataloading.stream import Batch


@dataclass
class Models:
    """The frozen teacher, and student and momentum encoder behind a backend."""

    teacher: TeacherSource | None
    backend: Backend
    layout: TokenLayout
    """Order of the predicted tokens."""
    length: int
    """Number of patches, N."""
    patch: int
    """Side of the student's patches, pixels."""


class MicroBatch(NamedTuple):
    """Inputs and targets of one forward and backward, all on the device."""

    images: Tensor
    """Normalised views, ``[B, 3, S, S]`` float32."""
    choice: PatchChoice
    """Masks, ``R = B * masks_per_view`` rows."""
    targets: Predictions
    """Targets, in the order of the predictions."""
    valid: Tensor
    """Rows whose view could be decoded, bool ``[R]``."""
    alpha_target: Tensor
    """Weight of the teacher in the loss, 0-dim float32."""
    only_term: str | None = None
    """Loss term that alone is differentiated, for diagnostics; ``None``: the weighted sum."""
    unsound: Tensor | None = None
    """Views that could be decoded and whose teacher output is not finite, bool ``[B]``."""

    @property
    def inputs(self) -> tuple[Tensor, PatchChoice]:
        return self.images, self.choice


class Observed(NamedTuple):
    """Observations of a micro-batch, 0-dim float32."""

    visible_mass: Tensor
    """Fraction of the mixed attention that stays visible."""
    agreement: Tensor
    """Agreement of the teacher's and the momentum encoder's attention maps."""
    cache_hit: Tensor
    """1 if the teacher's view was read from a cache, else 0."""
    unsound: Tensor
    """Infinity, which refuses the step, if a valid view's teacher output is not finite; else 0."""


def prepare(
    config: Config, models: Models, batch: Batch, view: TeacherView, scalars: PretrainingScalars
) -> tuple[MicroBatch, Observed]:
    """Prepare the inputs and targets of a micro-batch; no host synchronisation.

    Args:
        config: checked settings.
        models: student and momentum encoder.
        batch: the views.
        view: the teacher's output for them.
        scalars: the step's.
    """
    images = normalise_images(batch.images[0], IMAGENET_MEAN, IMAGENET_STD)
    with torch.no_grad():
        features, attention = models.backend.momentum_forward(images)
        alpha, weight = (
            torch.full((), value, device=images.device)
            for value in (scalars.alpha_attention, scalars.alpha_target)
        )
        mixed = mix_attention(config.attention, view.attention, attention, alpha)
        choice = choose_masks(
            config.mask,
            mixed,
            batch.position,
            config.run.seed,
            scalars.salient_fraction,
            length=models.length,
            num_predicted=models.layout.num_hidden,
        )
        targets = Predictions(
            gather_targets(models.layout, view.features, config.target.teacher.norm, choice),
            gather_targets(models.layout, features, config.target.student.norm, choice),
            pixel_target(config, models, images, choice),
        )
        valid = batch.valid.to(images.device).repeat_interleave(config.mask.masks_per_view)
        zero = torch.zeros((), device=images.device)
        mass = zero if mixed is None else visible_mass(mixed, choice.ids_keep)
        agreement = zero
        if view.attention is not None and attention is not None:
            agreement = map_agreement(view.attention, attention)
        hit = torch.full((), float(view.cached), device=images.device)
        unsound = find_unsound(view, batch.valid.to(images.device))
        refusal = torch.where(unsound.any(), torch.inf, zero)
    return (
        MicroBatch(images, choice, targets, valid, weight, unsound=unsound),
        Observed(mass, agreement, hit, refusal),
    )


def find_unsound(view: TeacherView, valid: Tensor) -> Tensor:
    """Return the valid views whose teacher output is not finite, bool ``[B]``.

    An attention map of NaN would count as 0 in the masks, and the loss could stay finite.
    """
    unsound = torch.zeros_like(valid)
    for output in (view.attention, view.features):
        if output is not None:
            unsound = unsound | ~output.isfinite().flatten(1).all(1)
    return unsound & valid


def mix_attention(
    settings: Attention, teacher: Tensor | None, student: Tensor | None, alpha: Tensor
) -> Tensor | None:
    """Return the collaborative attention ``[B, N]``; ``None`` where no mask needs it."""
    if teacher is None and student is None:
        return None
    teacher, student = (
        None if one is None else sharpen(one, settings.temperature, settings.clip_quantile)
        for one in (teacher, student)
    )
    return collaborative_attention(teacher, student, alpha, settings.norm)


def gather_targets(
    layout: TokenLayout, features: Tensor | None, norm: str, choice: PatchChoice
) -> Tensor | None:
    """Return the normalised target features of the predicted tokens, ``[R, Q, F]`` float32."""
    if features is None:
        return None
    return layout.gather(normalise(features, norm), choice)


def pixel_target(
    config: Config, models: Models, images: Tensor, choice: PatchChoice
) -> Tensor | None:
    """Return the pixels of the predicted patches, ``[R, Q, 3 P P]`` float32."""
    if not needs(config).pixels:
        return None
    pixels = pixel_targets(patchify(images, models.patch), config.target.pixel.norm)
    return models.layout.without_cls().gather(pixels, choice)
