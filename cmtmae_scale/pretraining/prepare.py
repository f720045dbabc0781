"""From views to a micro-batch: both models look, their maps are mixed, masks and targets follow."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cmtmae_scale.backends.base import Backend, MicroBatch
from cmtmae_scale.config.derive import needs
from cmtmae_scale.config.schema import Attention, Config
from cmtmae_scale.engine.progress import Scalars
from cmtmae_scale.method.attention import (
    collaborative_attention,
    map_agreement,
    sharpen,
    visible_mass,
)
from cmtmae_scale.method.images import IMAGENET_MEAN, IMAGENET_STD, normalise_images
from cmtmae_scale.method.masking import PatchChoice, choose_masks
from cmtmae_scale.method.targets import Predictions, TokenLayout, normalise, patchify, pixel_targets
from cmtmae_scale.teachers.base import TeacherSource, TeacherView
from dataloading.stream import Batch


@dataclass
class Models:
    """What computes: the frozen teacher, and student and momentum student behind a backend."""

    teacher: TeacherSource | None
    backend: Backend
    layout: TokenLayout
    """Order of the predicted tokens."""
    length: int
    """Number of patches, N."""
    patch: int
    """Side of the student's patches, pixels."""


class Observed(NamedTuple):
    """What a micro-batch tells of its masks; 0-dim float32."""

    visible_mass: Tensor
    """Share of the map's mass that stays visible."""
    agreement: Tensor
    """Agreement of the teacher's and the momentum student's maps."""
    cache_hit: Tensor
    """1 if the teacher's view was read from a cache, else 0."""


def prepare(
    config: Config, models: Models, batch: Batch, scalars: Scalars
) -> tuple[MicroBatch, Observed]:
    """From views to masks and targets: teacher, momentum student, mixed map, choice.

    No host synchronisation, but for spot checks of a cache.
    """
    images = normalise_images(batch.images[0], IMAGENET_MEAN, IMAGENET_STD)
    with torch.no_grad():
        view = models.teacher.forward_batch(batch) if models.teacher else TeacherView(None, None)
        features, attention = models.backend.momentum_forward(images)
        alpha, weight = (
            torch.full((), value, device=images.device)
            for value in (scalars.alpha_attention, scalars.alpha_target)
        )
        mixed = mix(config.attention, view.attention, attention, alpha)
        choice = choose_masks(
            config.mask,
            mixed,
            batch.position,
            config.run.seed,
            scalars.salient_frac,
            length=models.length,
        )
        targets = Predictions(
            gather(models.layout, view.features, config.target.teacher.norm, choice),
            gather(models.layout, features, config.target.student.norm, choice),
            pixel_target(config, models, images, choice),
        )
        valid = batch.valid.to(images.device).repeat_interleave(config.mask.masks_per_view)
        zero = torch.zeros((), device=images.device)
        mass = zero if mixed is None else visible_mass(mixed, choice.ids_keep)
        agreement = zero
        if view.attention is not None and attention is not None:
            agreement = map_agreement(view.attention, attention)
        hit = torch.full((), float(view.cached), device=images.device)
    return MicroBatch(images, choice, targets, valid, weight), Observed(mass, agreement, hit)


def mix(
    settings: Attention, teacher: Tensor | None, student: Tensor | None, alpha: Tensor
) -> Tensor | None:
    """The collaborative map ``[B, N]``, or ``None`` where no mask needs one; ``alpha`` is 0-dim."""
    if teacher is None and student is None:
        return None
    teacher, student = (
        None if one is None else sharpen(one, settings.temperature, settings.clip_quantile)
        for one in (teacher, student)
    )
    return collaborative_attention(teacher, student, alpha, settings.norm)


def gather(
    layout: TokenLayout, features: Tensor | None, norm: str, choice: PatchChoice
) -> Tensor | None:
    """Normalised target features of the predicted tokens, ``[R, Q, F]`` float32."""
    if features is None:
        return None
    return layout.gather(normalise(features, norm), choice)


def pixel_target(
    config: Config, models: Models, images: Tensor, choice: PatchChoice
) -> Tensor | None:
    """Pixels of the predicted patches, ``[R, Q, 3 P P]`` float32."""
    if not needs(config).pixels:
        return None
    pixels = pixel_targets(patchify(images, models.patch), config.target.pixel.norm)
    return models.layout.without_cls().gather(pixels, choice)
