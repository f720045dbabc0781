"""From views to a micro-batch: teacher, momentum encoder, mixed attention map, masks, targets."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, cast

import torch
from torch import Tensor

from cmtmae_scale.backends.base import Backend
from cmtmae_scale.config.derive import has_rows, needs, term_name, used_teachers
from cmtmae_scale.config.schema import Config
from cmtmae_scale.method.attention import map_agreement, mean_agreement, mix_all, visible_mass
from cmtmae_scale.method.channels import ChannelScaling, sum_channels
from cmtmae_scale.method.images import IMAGENET_MEAN, IMAGENET_STD, normalise_images
from cmtmae_scale.method.masking import PatchChoice, choose_masks
from cmtmae_scale.method.targets import (
    Predictions,
    SeveralPredictions,
    TokenLayout,
    normalise,
    patchify,
    pixel_targets,
)
from cmtmae_scale.pretraining.channels import TargetChannels
from cmtmae_scale.pretraining.scalars import PretrainingScalars
from cmtmae_scale.runtime.compilation import compiled
from cmtmae_scale.teachers.base import AnyTeacher, TeacherView, views_of
from dataloading.stream import Batch


@dataclass
class Models:
    """The frozen teachers, and student and momentum encoder behind a backend."""

    teacher: AnyTeacher | None
    backend: Backend
    layout: TokenLayout
    """Order of the predicted tokens."""
    length: int
    """Number of patches, N."""
    patch: int
    """Side of the student's patches, pixels."""
    channels: TargetChannels = field(default_factory=TargetChannels)
    """Running statistics of the targets that use them."""
    prior_steps: int = 0
    """See ``Task.prior_steps``."""


class MicroBatch(NamedTuple):
    """Inputs and targets of one forward and backward, all on the device."""

    images: Tensor
    """Normalised views, ``[B, 3, S, S]`` float32."""
    choice: PatchChoice
    """Masks, ``R = B * masks_per_view`` rows."""
    targets: Predictions | SeveralPredictions
    """Targets, in the order of the predictions."""
    valid: Tensor
    """Rows whose view could be decoded, bool ``[R]``."""
    alpha_target: Tensor
    """Weight of the teacher in the loss, 0-dim float32."""
    only_term: str | None = None
    """Loss term that alone is differentiated, for diagnostics; ``None``: the weighted sum."""
    unsound: Tensor | None = None
    """Views that could be decoded and on which a teacher's output is not finite, bool ``[T, B]`` of
    T teachers."""
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
    teacher_agreement: Tensor | None = None
    """Mean agreement of the attention maps of several teachers; ``None``: fewer than two."""


def prepare(
    config: Config,
    models: Models,
    batch: Batch,
    view: TeacherView | tuple[TeacherView, ...],
    scalars: PretrainingScalars,
) -> tuple[MicroBatch, Observed]:
    """Prepare the inputs and targets of a micro-batch; no host synchronisation.

    With ``backend.compile`` it runs as a few graphs without a break: pixels, momentum encoder, and
    what follows from its output.

    Args:
        config: checked settings.
        models: student and momentum encoder.
        batch: the views.
        view: the teacher's output for them; of several teachers one each, in order.
        scalars: the step's.
    """
    fast, views = config.backend.compile, views_of(view)
    with torch.no_grad():
        images = compiled(normalise_images, fast)(batch.images[0], IMAGENET_MEAN, IMAGENET_STD)
        features, attention = models.backend.momentum_forward(images)
        momentum = TeacherView(attention, features)
        valid, numbers = batch.valid.to(images.device), fill_numbers(scalars, images.device)
        hit = torch.full((), hit_fraction(config, views), device=images.device)
        rest = compiled(choose_and_gather, fast)
        (choice, targets, rows, unsound, sums), (mass, agreement, refusal, pairs) = rest(
            config, models, images, views, momentum, batch.position, valid, numbers
        )
    alpha = numbers.alpha_target
    return (
        MicroBatch(images, choice, targets, rows, alpha, unsound=unsound, channel_sums=sums),
        Observed(mass, agreement, hit, refusal, pairs),
    )


def hit_fraction(config: Config, views: tuple[TeacherView, ...]) -> float:
    """Return the fraction of the teachers with a cache whose views were read from it."""
    used = used_teachers(config) or [config.teacher]
    hits = [view.cached for one, view in zip(used, views, strict=True) if has_rows(one)]
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
    teachers: tuple[TeacherView, ...],
    momentum: TeacherView,
    positions: Tensor,
    valid: Tensor,
    numbers: Numbers,
) -> tuple[
    tuple[PatchChoice, Predictions | SeveralPredictions, Tensor, Tensor, Tensor],
    tuple[Tensor, Tensor, Tensor, Tensor | None],
]:
    """Compute masks and targets from the outputs of the frozen networks.

    Args:
        config: checked settings.
        models: its layout, N, patch side and running statistics are used.
        images: normalised, ``[B, 3, S, S]``.
        teachers: output of each teacher.
        momentum: output of the momentum encoder.
        positions: global sample indices, int64 ``[B]``.
        valid: views that could be decoded, bool ``[B]``.
        numbers: scheduled numbers.

    Returns:
        ``choice``, ``targets``, ``valid``, ``unsound`` and ``channel_sums`` of the ``MicroBatch``;
        the fraction of visible attention, the agreement of the teachers' and the momentum encoder's
        attention maps, ``Observed.unsound`` and ``Observed.teacher_agreement``.
    """
    maps = [one.attention for one in teachers if one.attention is not None]
    mixed = mix_all(config, maps, momentum.attention, numbers.alpha_attention)
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
    pixels = pixel_target(config, models, images, choice)
    targets, features = gather_features(
        config, models.layout, scalings, teachers, momentum, choice, pixels
    )
    sums = sum_targets(features, valid, scalings, images.device)
    rows = valid.repeat_interleave(config.mask.masks_per_view)
    zero = torch.zeros((), device=images.device)
    mass = zero if mixed is None else visible_mass(mixed, choice.ids_keep)
    agreement = zero
    if maps and momentum.attention is not None:
        mean = mix_all(config, maps, None, 1.0) if len(maps) > 1 else maps[0]
        agreement = map_agreement(cast(Tensor, mean), momentum.attention)
    pairs = mean_agreement(maps) if len(maps) > 1 else None
    bad = [find_unsound(one, valid) for one in teachers]
    unsound = torch.stack(bad) if len(bad) > 1 else bad[0][None]
    refusal = torch.where(unsound.any(), torch.inf, zero)
    return (choice, targets, rows, unsound, sums), (mass, agreement, refusal, pairs)


def gather_features(
    config: Config,
    layout: TokenLayout,
    scalings: Mapping[str, ChannelScaling],
    teachers: tuple[TeacherView, ...],
    momentum: TeacherView,
    choice: PatchChoice,
    pixels: Tensor | None,
) -> tuple[Predictions | SeveralPredictions, dict[str, Tensor | None]]:
    """Return the targets of all networks, and the features that they are gathered from by name.

    ``pixels`` is the target of the pixels, ``[R, Q', 3 P P]``.
    """
    target = config.target
    student = gather_targets(
        layout, momentum.features, target.student.norm, choice, scalings.get("student")
    )
    features: dict[str, Tensor | None] = {"student": momentum.features}
    used = used_teachers(config)
    if not used:
        (only,) = teachers
        features["teacher"] = only.features
        norm, scaling = target.teacher.norm, scalings.get("teacher")
        teacher = gather_targets(layout, only.features, norm, choice, scaling)
        return Predictions(teacher, student, pixels), features
    found: list[Tensor] = []
    for entry, view in zip(used, teachers, strict=True):
        name, norm = term_name(entry.name), entry.norm or target.teacher.norm
        features[name] = view.features
        own = gather_targets(layout, view.features, norm, choice, scalings.get(name))
        found += [] if own is None else [own]
    others = Predictions(None, student, pixels)
    return (SeveralPredictions(others, tuple(found)) if found else others), features


def sum_targets(
    features: Mapping[str, Tensor | None],
    valid: Tensor,
    scalings: Mapping[str, ChannelScaling],
    device: torch.device,
) -> Tensor:
    """Return the sums per channel of the targets with running statistics, 1-D float32."""
    sums = [torch.zeros(0, device=device)]
    for name, scaling in scalings.items():
        found = features[name]
        if found is not None:
            sums.append(sum_channels(found, valid, scaling.mean).flatten())
    return torch.cat(sums)


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
    features: Tensor | None,
    norm: str,
    choice: PatchChoice,
    scaling: ChannelScaling | None = None,
) -> Tensor | None:
    """Return the normalised target features of the predicted tokens, ``[R, Q, F]`` float32."""
    if features is None:
        return None
    num_prefix = features.shape[1] - sum(ids.shape[1] for ids in choice)
    return layout.gather(normalise(features, norm, num_prefix, scaling), choice)


def pixel_target(
    config: Config, models: Models, images: Tensor, choice: PatchChoice
) -> Tensor | None:
    """Return the pixels of the predicted patches, ``[R, Q, 3 P P]`` float32."""
    if not needs(config).pixels:
        return None
    pixels = pixel_targets(patchify(images, models.patch), config.target.pixel.norm)
    return models.layout.without_cls().gather(pixels, choice)
