"""Turns views into a micro-batch: teacher, momentum encoder, mixed attention, masks, targets."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import NamedTuple, cast

import torch
from torch import Tensor

from cmtmae_scale.backends.base import Backend
from cmtmae_scale.config.derive import target_norms
from cmtmae_scale.config.needs import needs
from cmtmae_scale.config.schema import Config
from cmtmae_scale.config.teachers import attention_map_weights, has_rows, term_name, used_teachers
from cmtmae_scale.method.attention import map_agreement, mean_agreement, mix_attention, visible_mass
from cmtmae_scale.method.channels import ChannelScaling, sum_channels
from cmtmae_scale.method.images import IMAGENET_MEAN, IMAGENET_STD, normalise_images
from cmtmae_scale.method.masking import PatchChoice, choose_masks
from cmtmae_scale.method.targets import Predictions, TokenLayout, normalise, patchify, pixel_targets
from cmtmae_scale.pretraining.channels import TargetChannels
from cmtmae_scale.pretraining.scalars import PretrainingScalars
from cmtmae_scale.runtime.compilation import compiled
from cmtmae_scale.teachers.base import TeacherSource, TeacherView
from dataloading.stream import Batch


@dataclass
class Models:
    """The frozen teachers, and student and momentum encoder behind a backend."""

    teachers: dict[str, TeacherSource]
    """Sources of the teachers' views by name, which is empty for a single teacher."""
    backend: Backend
    layout: TokenLayout
    """Order of the predicted tokens."""
    length: int
    """Number of patches, N."""
    patch: int
    """Side of the student's patches, pixels."""
    channels: TargetChannels
    """Running statistics of the targets that use them."""
    prior_steps: int = 0
    """See ``Task.prior_steps``."""


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
    unsound: Mapping[str, Tensor] = MappingProxyType({})
    """Views that could be decoded, but for which a teacher's output is not finite, bool ``[B]`` by
    the teacher's name."""
    channel_sums: Tensor | None = None
    """Sums per channel for the running statistics of the targets, 1-D float32; may be empty."""

    @property
    def inputs(self) -> tuple[Tensor, PatchChoice]:
        return self.images, self.choice


class Numbers(NamedTuple):
    """Scheduled numbers as 0-dim tensors, so that no compiled graph depends on their values."""

    alpha_attention: Tensor
    """Float32."""
    alpha_target: Tensor
    """Float32."""
    salient_fraction: Tensor
    """Float64, in which its count of patches is rounded."""


class Observed(NamedTuple):
    """Observations of a micro-batch, 0-dim float32."""

    visible_mass: Tensor
    """Fraction of the mixed attention that stays visible."""
    agreement: Tensor
    """Agreement of the teacher's and the momentum encoder's attention maps."""
    cache_hit: Tensor
    """1 if the teacher's view was read from a cache, else 0; of several teachers that have one, the
    mean."""
    unsound: Tensor
    """Infinity, which refuses the step, if a valid view's teacher output is not finite; else 0."""
    teacher_agreement: Tensor | None
    """Mean agreement of the attention maps of several teachers; ``None``: fewer than two."""


def prepare(
    config: Config,
    models: Models,
    batch: Batch,
    views: dict[str, TeacherView],
    scalars: PretrainingScalars,
) -> tuple[MicroBatch, Observed]:
    """Prepare the inputs and targets of a micro-batch; no host synchronisation.

    With ``backend.compile`` it runs as a few graphs without a break: pixels, momentum encoder, and
    what follows from its output.

    Args:
        config: checked settings.
        models: student and momentum encoder.
        batch: the views.
        views: the teachers' outputs for them, by name.
        scalars: the step's.
    """
    fast = config.backend.compile
    with torch.no_grad():
        images = compiled(normalise_images, fast)(batch.images[0], IMAGENET_MEAN, IMAGENET_STD)
        features, attention = models.backend.momentum_forward(images)
        momentum = TeacherView(attention, features)
        valid, numbers = batch.valid.to(images.device), fill_numbers(scalars, images.device)
        hit = torch.full((), hit_fraction(config, views), device=images.device)
        rest = compiled(choose_and_gather, fast)
        return rest(config, models, images, views, momentum, batch.position, valid, numbers, hit)


def hit_fraction(config: Config, views: Mapping[str, TeacherView]) -> float:
    """Return the fraction of the teachers with a cache whose views were read from it."""
    entries = {one.name: one for one in used_teachers(config)}
    hits = [
        view.cached for name, view in views.items() if has_rows(entries.get(name, config.teacher))
    ]
    return sum(hits) / max(len(hits), 1)


def fill_numbers(scalars: PretrainingScalars, device: torch.device) -> Numbers:
    """Write the scheduled numbers to 0-dim tensors on the device, without a copy from the host."""
    return Numbers(
        torch.full((), scalars.alpha_attention, device=device),
        torch.full((), scalars.alpha_target, device=device),
        torch.full((), scalars.salient_fraction, dtype=torch.float64, device=device),
    )


def choose_and_gather(
    config: Config,
    models: Models,
    images: Tensor,
    teachers: dict[str, TeacherView],
    momentum: TeacherView,
    positions: Tensor,
    valid: Tensor,
    numbers: Numbers,
    cache_hit: Tensor,
) -> tuple[MicroBatch, Observed]:
    """Compute masks and targets from the outputs of the frozen networks.

    Args:
        config: checked settings.
        models: its layout, N, patch side and running statistics are used.
        images: normalised, ``[B, 3, S, S]``.
        teachers: output of each teacher, by name.
        momentum: output of the momentum encoder.
        positions: global sample indices, int64 ``[B]``.
        valid: views that could be decoded, bool ``[B]``.
        numbers: scheduled numbers.
        cache_hit: see ``Observed``.
    """
    own = momentum.attention
    maps = {name: one.attention for name, one in teachers.items() if one.attention is not None}
    mix = partial(mix_attention, config.attention, maps, attention_map_weights(config))
    mixed = mix(own, numbers.alpha_attention)
    choice = choose_masks(
        config.mask,
        mixed,
        positions,
        config.run.seed,
        numbers.salient_fraction,
        length=models.length,
        num_predicted=models.layout.num_hidden,
    )
    scalings = models.channels.scalings
    features = name_features(teachers, momentum)
    targets = gather_features(config, models.layout, scalings, features, choice)
    if needs(config).pixels:
        targets["pixel"] = pixel_target(config, models, images, choice)
    sums = sum_targets(features, valid, scalings, images.device)
    rows = valid.repeat_interleave(config.mask.masks_per_view)
    zero = torch.zeros((), device=images.device)
    mass = zero if mixed is None else visible_mass(mixed, choice.ids_keep)
    agreement = zero
    if maps and own is not None:
        mean = mix(None, 1.0) if len(maps) > 1 else next(iter(maps.values()))
        agreement = map_agreement(cast(Tensor, mean), own)
    pairs = mean_agreement(maps.values()) if len(maps) > 1 else None
    unsound = {name: find_unsound(one, valid) for name, one in teachers.items()}
    refusal = zero
    for bad in unsound.values():
        refusal = torch.where(bad.any(), torch.inf, refusal)
    alpha = numbers.alpha_target
    return (
        MicroBatch(images, choice, targets, rows, alpha, unsound=unsound, channel_sums=sums),
        Observed(mass, agreement, cache_hit, refusal, pairs),
    )


def name_features(teachers: Mapping[str, TeacherView], momentum: TeacherView) -> dict[str, Tensor]:
    """Return the features that are targets by the term of the loss."""
    views = {term_name(name): one for name, one in teachers.items()} | {"student": momentum}
    return {name: one.features for name, one in views.items() if one.features is not None}


def gather_features(
    config: Config,
    layout: TokenLayout,
    scalings: Mapping[str, ChannelScaling],
    features: Mapping[str, Tensor],
    choice: PatchChoice,
) -> Predictions:
    """Return the normalised features of the predicted tokens by term, ``[R, Q, F]`` float32."""
    norms = target_norms(config)
    return {
        name: gather_targets(layout, one, norms[name], choice, scalings.get(name))
        for name, one in features.items()
    }


def sum_targets(
    features: Mapping[str, Tensor],
    valid: Tensor,
    scalings: Mapping[str, ChannelScaling],
    device: torch.device,
) -> Tensor:
    """Return the sums per channel of the targets with running statistics, 1-D float32."""
    sums = (sum_channels(features[name], valid, one.mean) for name, one in scalings.items())
    return torch.cat([torch.zeros(0, device=device), *(one.flatten() for one in sums)])


def find_unsound(view: TeacherView, valid: Tensor) -> Tensor:
    """Return the valid views whose teacher output is not finite, bool ``[B]``.

    An attention map of NaN would count as 0 in the masks, and the loss could stay finite.
    """
    unsound = torch.zeros_like(valid)
    for output in (view.attention, view.features):
        if output is not None:
            unsound = unsound | ~output.isfinite().flatten(1).all(1)
    return unsound & valid


def gather_targets(
    layout: TokenLayout,
    features: Tensor,
    norm: str,
    choice: PatchChoice,
    scaling: ChannelScaling | None,
) -> Tensor:
    """Return the normalised target features of the predicted tokens, ``[R, Q, F]`` float32."""
    num_prefix = features.shape[1] - sum(ids.shape[1] for ids in choice)
    return layout.gather(normalise(features, norm, num_prefix, scaling), choice)


def pixel_target(config: Config, models: Models, images: Tensor, choice: PatchChoice) -> Tensor:
    """Return the pixels of the predicted patches, ``[R, Q, 3 P P]`` float32."""
    pixels = pixel_targets(patchify(images, models.patch), config.target.pixel.norm)
    return models.layout.without_cls().gather(pixels, choice)
