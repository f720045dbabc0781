"""Attention maps of a run's networks, as its masks use them."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cmtmae_scale.api.features import ALONE
from cmtmae_scale.checkpoint import layout
from cmtmae_scale.checkpoint.shards import ENCODERS
from cmtmae_scale.config.needs import needs
from cmtmae_scale.config.teachers import attention_map_weights, entry_errors, teacher_configs
from cmtmae_scale.engine.progress import Progress
from cmtmae_scale.errors import ConfigError
from cmtmae_scale.evaluation.encoders import inference_autocast
from cmtmae_scale.evaluation.saved import (
    check_encoder,
    locate_checkpoint,
    read_tensors,
    saved_config,
)
from cmtmae_scale.method.attention import mix_attention, normalise_map
from cmtmae_scale.method.build import build_student, probe_student
from cmtmae_scale.method.images import IMAGENET_MEAN, IMAGENET_STD, normalise_images
from cmtmae_scale.method.student import MomentumEncoder
from cmtmae_scale.pretraining.scalars import scalars_at
from cmtmae_scale.runtime.collectives import pick_device
from cmtmae_scale.teachers.base import Teacher, images_for, view_sizes
from cmtmae_scale.teachers.build import build_teacher, compute_dtype
from dataloading.errors import DataError
from dataloading.index import build_index
from dataloading.one_pass import OnePass
from dataloading.torch_decode import crop_and_resize


class AttentionMaps(NamedTuple):
    """Attention maps of images, float32 on the CPU; the rows of each network's map sum to 1.

    A map is ``None`` where the run lacks the network, or its masks do not use the attention.
    """

    teacher: Tensor | None
    """Map of the frozen teacher, or weighted mean of several teachers, ``[B, N]``."""
    momentum: Tensor | None
    """Map of the momentum encoder, ``[B, N]``."""
    mixed: Tensor
    """The collaborative attention map of the checkpoint's step, ``[B, N]``, which masks follow."""
    grid: tuple[int, int]
    """Rows and columns of the patches; N is their product."""
    views: Tensor
    """The student's views, uint8 ``[B, S, S, 3]``."""
    teachers: Mapping[str, Tensor] = {}
    """Map of each of several teachers by name, ``[B, N]``."""


@torch.no_grad()
def attention_maps(
    run: str | Path,
    images: str | Path | Tensor | NDArray[np.uint8],
    *,
    batch_size: int = 64,
    device: torch.device | str | None = None,
) -> AttentionMaps:
    """Compute the attention maps of teacher and momentum encoder, and their mix.

    Args:
        run: a run (its newest intact checkpoint), or a checkpoint.
        images: a folder of images or tars, from which centre crops are taken, turned upright
            according to the run's ``data.exif_orientation``; or square views, uint8
            ``[B, S, S, 3]`` of any side, which are resized to the image size of each network.
        batch_size: images per forward.
        device: ``None``: the GPU where there is one.

    Returns:
        Attention maps of all images that can be decoded, in the order of the index.

    Raises:
        ConfigError: if the run's masks use no attention.
        CheckpointError: no checkpoint, or a damaged one.
        TeacherError: if the teacher's weights cannot be found.
        DataError: if no image is usable.
        ValueError: for views of another shape or dtype.
    """
    folder = locate_checkpoint(Path(run))
    state = layout.read_state(folder)
    config = saved_config(folder, state)
    need = needs(config)
    if not (need.teacher_attention or need.student_attention):
        raise ConfigError(f"{folder}: the run's masks use no attention (mask.sampler=random)")
    place = pick_device(ALONE) if device is None else torch.device(device)
    teachers: dict[str, Teacher] = {}
    for name, alone in teacher_configs(config).items():
        only_map = needs(alone)._replace(teacher_features=False)
        with entry_errors(name):
            teacher = build_teacher(alone, place, compute_dtype(config), only_map)
        if teacher is not None:
            teachers[name] = teacher
    momentum = None
    if need.student_attention:
        check_encoder(folder, config, ENCODERS["momentum"])
        momentum = build_student(config, MomentumEncoder)
        momentum.load_state_dict(read_tensors(folder, ENCODERS["momentum"]), strict=True)
        momentum = momentum.to(place).eval()
    sizes = view_sizes(config.views.image_size, teachers)
    views = read_views(images, sizes, batch_size, config.data.exif_orientation)
    momentum_map = None
    maps: dict[str, Tensor] = {}
    with inference_autocast(place):
        for name, teacher in teachers.items():
            batches = images_for(teacher, tuple(views))[-1].split(batch_size)
            maps[name] = gather_maps(teacher(one.to(place)).attention for one in batches)
        if momentum is not None:
            pixels = (
                normalise_images(one.to(place), IMAGENET_MEAN, IMAGENET_STD)
                for one in views[0].split(batch_size)
            )
            momentum_map = gather_maps(momentum(one)[1] for one in pixels)
    fraction = Progress.from_dict(state["progress"]).fraction
    alpha = torch.tensor(scalars_at(config, fraction).alpha_attention)
    mix = partial(mix_attention, config.attention, maps, attention_map_weights(config))
    mixed = cast(Tensor, mix(momentum_map, alpha))
    teacher_map = next(iter(maps.values()), None)
    if len(maps) > 1:
        teacher_map = normalise_map(cast(Tensor, mix(None, 1.0)))
    rows, columns = probe_student(config).patch_embed.grid_size
    named = maps if config.teachers else {}
    grid = (int(rows), int(columns))
    return AttentionMaps(teacher_map, momentum_map, mixed, grid, views[0], named)


def gather_maps(maps: Iterable[Tensor | None]) -> Tensor:
    """Concatenate the attention maps of batches, on the CPU."""
    return torch.cat([cast(Tensor, one).float().cpu() for one in maps])


def read_views(
    images: str | Path | Tensor | NDArray[np.uint8],
    sizes: Sequence[int],
    batch_size: int,
    exif_orientation: bool,
) -> list[Tensor]:
    """Return the views at each size, uint8 ``[B, S, S, 3]``; see ``attention_maps``.

    ``exif_orientation``: whether to turn images of a folder upright, as ``data.exif_orientation``.

    Raises:
        DataError: if no image is usable.
        ValueError: for views of another shape or dtype.
    """
    if not isinstance(images, str | Path):
        given = torch.as_tensor(images).cpu()
        is_square = given.ndim == 4 and given.shape[1] == given.shape[2] and given.shape[3] == 3
        if not is_square or given.dtype != torch.uint8 or not len(given):
            raise ValueError(
                f"views are {given.dtype} {tuple(given.shape)}; expected uint8 [B, S, S, 3]"
            )
        whole = [0, 0, given.shape[2], given.shape[1]]
        resized = [crop_and_resize(one.permute(2, 0, 1), whole, sizes, False) for one in given]
        return [torch.as_tensor(np.stack(views)) for views in zip(*resized, strict=True)]
    index = build_index(images, exif_orientation=exif_orientation)
    found: list[Tensor] = []
    for size in sizes:
        ids = np.arange(len(index), dtype=np.int64)
        with OnePass(index, ids, micro_batch=min(batch_size, len(ids)), size=size) as batches:
            found.append(torch.cat([batch.images[0][batch.valid].cpu() for batch in batches]))
    if not len(found[0]):
        raise DataError(f"{images}: none of {len(index)} images could be decoded")
    return found
