"""Agreement of attention maps with a foreground mask.

Legend: B images, S side of the student's images, N patches in a grid of h x w.
"""

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from cmtmae_scale.config.needs import needs
from cmtmae_scale.config.schema import Config
from cmtmae_scale.config.teachers import attention_map_weights, entry_errors, teacher_configs
from cmtmae_scale.errors import ConfigError
from cmtmae_scale.evaluation.across import gather_from_ranks, sum_over_ranks
from cmtmae_scale.evaluation.encoders import inference_autocast
from cmtmae_scale.evaluation.features import ReadOptions
from cmtmae_scale.evaluation.masks import VOID, MaskedSet, cut_patches, masked_batches
from cmtmae_scale.evaluation.measured import Measured, mean_with_interval
from cmtmae_scale.evaluation.subject import Subject
from cmtmae_scale.method.attention import Grid, mix_attention
from cmtmae_scale.method.images import IMAGENET_MEAN, IMAGENET_STD
from cmtmae_scale.method.schedules import evaluate
from cmtmae_scale.method.student import Student
from cmtmae_scale.runtime.launch import World
from cmtmae_scale.teachers.base import TeacherOutputs, Tower, Transformer
from cmtmae_scale.teachers.build import assemble_teacher
from cmtmae_scale.teachers.online import OnlineTeacher
from cmtmae_scale.teachers.timm_towers import EvaTower, TimmTower
from dataloading.errors import DataError

MEASURES = ("AUC", "IoU at equal area", "mass inside")
BASELINES = ("uniform", "centre prior")
CENTRE_WIDTH = 0.25
"""Standard deviation of the centre prior, as a fraction of the image."""
TEACHER = "teacher"
SHOWN = 6


class Maps(NamedTuple):
    """Attention maps that are compared with a mask."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    """Sizes of the images that ``compute`` takes; masks have the first."""
    grid: Grid
    """h and w of every map."""
    compute: Callable[[tuple[Tensor, ...]], dict[str, Tensor]]
    """From uint8 images ``[B, S, S, 3]`` of each size to float32 maps ``[B, N]`` by name."""


class ShownMaps(NamedTuple):
    """Some images for a figure, of rank 0."""

    images: Tensor
    """uint8 ``[I, S, S, 3]``."""
    masks: Tensor
    """uint8 ``[I, S, S]``."""
    maps: dict[str, Tensor]
    """``[I, h, w]`` by name."""


def measure_attention(
    maps: Maps, images: MaskedSet, reading: ReadOptions, world: World, device: torch.device
) -> tuple[list[Measured], int, ShownMaps | None]:
    """Compare attention maps with masks, whose classes other than 0 are the foreground.

    A collective.

    Returns:
        Rows of every map and of two baselines, a uniform map and a centre prior, the same on every
        rank; the number of images without patches of both kinds, which have no value; and some
        maps.

    Raises:
        DataError: on every rank, if no image has both kinds, or a map is not finite.
    """
    empty = torch.zeros(0, len(MEASURES), dtype=torch.float64, device=device)
    found = {name: [empty] for name in (*maps.names, *BASELINES)}
    bad = torch.zeros(len(maps.names), dtype=torch.int64, device=device)
    numbers = [empty[:, 0].long()]
    shown: ShownMaps | None = None
    height, width = maps.grid
    for batch in masked_batches(images, maps.sizes, reading, world, device):
        if not len(batch.numbers):
            continue
        with inference_autocast(device), torch.no_grad():
            computed = maps.compute(batch.images)
        bad += torch.stack([(~computed[name].isfinite().all(1)).sum() for name in maps.names])
        computed |= baseline_maps(len(batch.numbers), maps.grid, device)
        inside, known = foreground_fraction(batch.masks, maps.grid)
        numbers.append(batch.numbers)
        for name, attention in computed.items():
            found[name].append(agreement(attention, inside, known))
        if shown is None:
            part = slice(0, SHOWN)
            kept = {name: computed[name][part].view(-1, height, width).cpu() for name in maps.names}
            shown = ShownMaps(batch.images[0][part].cpu(), batch.masks[part].cpu(), kept)
    order = gather_from_ranks(torch.cat(numbers)).argsort()
    for name, count in zip(maps.names, sum_over_ranks(bad).tolist(), strict=True):
        if count:
            raise DataError(
                f"the attention map of {name} is not finite for {count} of {len(order)} images: "
                "nothing is computed from it; evaluate other weights, or remove these images if "
                "the same images fail each time"
            )
    rows: list[Measured] = []
    unclear = 0
    for name, parts in found.items():
        values = gather_from_ranks(torch.cat(parts))[order].cpu()
        usable = values.isfinite().all(1)
        unclear = int((~usable).sum())
        if not bool(usable.any()):
            raise DataError(
                f"{images.root}: no image has patches of foreground and of background (classes "
                f"other than 0, and 0; {VOID} is void); save a foreground as 1 on 0"
            )
        for measure, column in zip(MEASURES, values[usable].numpy().T, strict=True):
            mean, interval = mean_with_interval(column)
            count = int(usable.sum())
            rows.append(Measured(name, "attention", "foreground", measure, mean, interval, count))
    return rows, unclear, shown


def baseline_maps(count: int, grid: Grid, device: torch.device) -> dict[str, Tensor]:
    """Return a uniform map and a Gaussian in the middle of the image, ``[B, N]`` each."""
    height, width = grid
    down = (torch.arange(height, device=device) + 0.5) / height - 0.5
    right = (torch.arange(width, device=device) + 0.5) / width - 0.5
    squares = down.square()[:, None] + right.square()
    centre = torch.exp(-squares / (2 * CENTRE_WIDTH**2)).flatten()
    maps = (torch.ones_like(centre), centre)
    return {name: one.expand(count, -1) for name, one in zip(BASELINES, maps, strict=True)}


def foreground_fraction(masks: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Return the foreground's fraction of each patch, and which patches have a known class.

    Args:
        masks: uint8 ``[B, S, S]``; 0 is the background, 255 void, all else foreground.
        grid: h and w.

    Returns:
        Fraction of the pixels with a class, float64 ``[B, N]``; and bool ``[B, N]``, whether at
        least half of the patch's pixels have a class.
    """
    pixels = cut_patches(masks, *grid)
    known = (pixels != VOID).sum(-1)
    inside = ((pixels != VOID) & (pixels != 0)).sum(-1)
    return inside.double() / known.clamp_min(1), 2 * known >= pixels.shape[-1]


def agreement(attention: Tensor, inside: Tensor, known: Tensor) -> Tensor:
    """Compare attention maps with the foreground's fraction of each patch.

    Args:
        attention: ``[B, N]``, finite.
        inside: foreground's fraction, float64 ``[B, N]``.
        known: patches that count, bool ``[B, N]``.

    Returns:
        float64 ``[B, 3]``, of the patches that count, those with a fraction of at least a half
        being the foreground; NaN without patches of both kinds:

        * AUC: probability that a patch of the foreground has more attention than one of the
          background, equal values counting a half;
        * IoU of the foreground with as many patches of the most attention, of equal values the
          first;
        * mass inside: the attention on the foreground, by its fraction of each patch, as a
          fraction of all, negative values counting as 0, as those of maps that are mixed with
          ``attention.norm=zscore``; the fraction of the area for a uniform map.
    """
    rows: list[list[float]] = []
    for values, share, counts in zip(attention.double(), inside, known, strict=True):
        a, f = values[counts], share[counts]
        front = f >= 0.5
        count = int(front.sum())
        if not 0 < count < len(front):
            rows.append([torch.nan] * len(MEASURES))
            continue
        ahead = a[front][:, None] - a[~front]
        auc = ((ahead > 0).double() + 0.5 * (ahead == 0)).mean()
        chosen = torch.zeros_like(front)
        chosen[a.argsort(descending=True, stable=True)[:count]] = True
        overlap = (chosen & front).sum() / (chosen | front).sum()
        weight = a.clamp_min(0.0)
        mass = (weight * f).sum() / weight.sum() if float(weight.sum()) else f.mean()
        rows.append([float(auc), float(overlap), float(mass)])
    return torch.tensor(rows, dtype=torch.float64, device=attention.device)


def maps_of_subject(subject: Subject, device: torch.device) -> Maps:
    """Return the attention maps that the subject's run mixes, or those of a model of its own.

    Of a run with ``attention.source`` and ``attention.layers`` as trained: the teacher's, the
    momentum encoder's (or the chosen weights'), both mixed with the alpha of the checkpoint's step,
    and the student's with random weights. Of other weights the class token's attention in the last
    block, or that of all patches where there is no class token.

    Raises:
        ConfigError: for weights without attention.
    """
    config, network = subject.config, subject.encoder.network
    size, grid = subject.encoder.size, subject.encoder.grid
    if network is None or (config is None and not isinstance(network, Student | Transformer)):
        raise ConfigError(f"{subject.encoder.name} has no attention")
    sources = {subject.encoder.name: attention_of(network, size, config)}
    if subject.random is not None and subject.random.network is not None:
        sources[subject.random.name] = attention_of(subject.random.network, size, config)
    for source in sources.values():
        source.to(device)
    teachers: dict[str, OnlineTeacher] = {}
    labels: list[str] = []
    if config is not None and isinstance(network, Student) and needs(config).teacher_attention:
        for name, alone in teacher_configs(config).items():
            if uses_teacher_map(alone):
                with entry_errors(name):
                    teacher = assemble_teacher(alone, needs(alone), load=True).to(device)
                is_norm = alone.attention.source == "activation_norm"
                labels.append(f"{TEACHER} {name}".strip() + " (activation norm)" * is_norm)
                teachers[name] = teacher
    own, fraction = subject.encoder.name, subject.fraction
    names = tuple(sources)
    sizes: tuple[int, ...] = (size,)
    alpha = 1.0
    if teachers and config is not None:
        alpha = evaluate(config.collaboration.alpha_attention, fraction)
        names += (*labels, f"mixed, alpha {alpha:g}")
        sizes += tuple(teacher.image_size for teacher in teachers.values())

    def compute(images: tuple[Tensor, ...]) -> dict[str, Tensor]:
        found = {name: required(source(images[0]).attention) for name, source in sources.items()}
        if config is None or not teachers:
            return found
        own_images = zip(teachers.items(), images[1:], strict=True)
        theirs = {name: required(one(image).attention) for (name, one), image in own_images}
        weights = attention_map_weights(config)
        mixed = required(mix_attention(config.attention, theirs, weights, found[own], alpha))
        found |= dict(zip(labels, theirs.values(), strict=True))
        return found | {names[-1]: mixed}

    return Maps(names, sizes, grid, compute)


def uses_teacher_map(config: Config) -> bool:
    """Return whether a run's masks follow the teacher's attention, and its teacher can be built."""
    return needs(config).teacher_attention and config.teacher.mode != "none"


def attention_of(network: Student | Tower, size: int, config: Config | None) -> OnlineTeacher:
    """Wrap a network so that it returns an attention map, on its own grid."""
    tower = network
    if isinstance(network, Student):
        kind = EvaTower if isinstance(network, Eva) else TimmTower
        tower = kind(cast(VisionTransformer | Eva, network), "student", {})
        tower.mean, tower.std = IMAGENET_MEAN, IMAGENET_STD
    tower = cast(Tower, tower)
    depth = len(tower.blocks)
    layers = [-1] if config is None else config.attention.layers
    source = "cls" if tower.has_cls else "mean_query"
    if config is not None and not isinstance(network, Student):
        source = config.attention.source
    chosen = tuple(layer % depth for layer in layers)
    outputs = TeacherOutputs(source, chosen, "block", ())
    return OnlineTeacher(tower, outputs, size, tower.grid)


def required(attention: Tensor | None) -> Tensor:
    """Return an attention map that must be there."""
    if attention is None:
        raise ValueError("no attention map was computed")
    return attention
