"""Columns of a figure sheet: attention, masks and predictions, computed as in a training step.

Legend: n images, S their side in pixels, N = h * w patches, P patch side, R = n masks.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmtmae_scale.config.schema import Config
from cmtmae_scale.config.teachers import attention_map_weights, teacher_configs
from cmtmae_scale.evaluation.encoders import inference_autocast
from cmtmae_scale.method.attention import mix_attention, normalise_map
from cmtmae_scale.method.channels import ChannelScaling
from cmtmae_scale.method.images import IMAGENET_MEAN, IMAGENET_STD, normalise_images
from cmtmae_scale.method.masking import PatchChoice, choose_masks
from cmtmae_scale.method.model import CollaborativeMAE
from cmtmae_scale.method.student import MomentumEncoder
from cmtmae_scale.method.targets import EPS, TokenLayout, patchify
from cmtmae_scale.pretraining.prepare import gather_features, name_features
from cmtmae_scale.pretraining.scalars import PretrainingScalars
from cmtmae_scale.teachers.base import Teacher, TeacherView, images_for

T = TypeVar("T", bound=nn.Module)

ATTENTION = "Attention: dark to bright, each map over its own range."
COSINE = "Cosine: 0 or below dark, 1 bright, grey not predicted."
COMPONENTS = "PCA: turned towards the patches' own colours."
SPREAD = 2.0
"""Standard deviations of a component from its mean to black or to full colour."""


@dataclass
class Networks:
    """Networks whose outputs are drawn."""

    teachers: Mapping[str, Teacher]
    """By name, which is empty for a single teacher."""
    model: CollaborativeMAE
    momentum: MomentumEncoder | None

    def trained(self, prefix: str) -> nn.Module:
        """Return the network whose states have a prefix, ``model.`` or ``momentum.``."""
        return self.model if prefix == "model." or self.momentum is None else self.momentum


@dataclass
class Column:
    """One kind of tile, one per image."""

    title: str
    values: Tensor
    """Values ``[n, h, w]`` in [0, 1], NaN: no value; or colours in [0, 1], ``[n, h, w, 3]``."""
    note: str = ""
    """Second line of the title."""
    legend: str = ""
    """How to read the colours."""
    hidden: Tensor | None = None
    """Greyed-out patches, bool ``[n, h, w]``."""
    smooth: bool = False
    """Whether to resample smoothly, as an image; else with sharp patch edges."""


@contextmanager
def placed(network: T, device: torch.device) -> Iterator[T]:
    """Move a network to a device for the block, and back to the CPU, also after an error."""
    try:
        yield network.to(device)
    finally:
        network.cpu()


@torch.no_grad()
def compute_columns(
    config: Config,
    networks: Networks,
    layout: TokenLayout,
    images: tuple[Tensor, ...],
    scalars: PretrainingScalars,
    scalings: Mapping[str, ChannelScaling],
) -> list[Column]:
    """Compute all columns with the present weights; mask 0 of positions 0, 1, 2 and so on.

    Images are uint8 ``[n, S, S, 3]``: the student's, then the teachers' if they differ. Networks
    move to the images' device and back to the CPU. ``scalings`` are the targets' running
    statistics.

    Returns:
        Columns of the signals that the run uses, on the CPU.
    """
    device = images[0].device
    height, width = networks.model.encoder.grid
    pixels = normalise_images(images[0], IMAGENET_MEAN, IMAGENET_STD)
    views = images[0].float() / 255
    with placed(networks.model, device) as model, inference_autocast(device):
        seen = {name: one(images_for(one, images)[-1]) for name, one in networks.teachers.items()}
        features = attention = None
        if networks.momentum is not None:
            with placed(networks.momentum, device) as momentum:
                features, attention = momentum(pixels)
        alpha = torch.full((), scalars.alpha_attention, device=device)
        theirs = {name: one.attention for name, one in seen.items() if one.attention is not None}
        mixed = mix_attention(
            config.attention, theirs, attention_map_weights(config), attention, alpha
        )
        positions = torch.arange(len(views), device=device)
        choice = choose_masks(
            replace(config.mask, masks_per_view=1),
            mixed,
            positions,
            config.run.seed,
            scalars.salient_fraction,
            length=height * width,
            num_predicted=layout.num_hidden,
        )
        predictions = model(pixels, choice)
        tokens = model.encoder(pixels)[:, model.encoder.num_prefix :]
    columns = [Column("view", views, smooth=True)]
    for name, attention_map in name_maps(config, theirs, attention, mixed).items():
        values = normalise_map(attention_map, "minmax").view(-1, height, width)
        columns.append(Column(name, values, "attention", ATTENTION))
    all_patches = torch.ones(len(views), height * width, dtype=torch.bool, device=device)
    hidden = all_patches.scatter(1, choice.ids_keep, False).view(-1, height, width)
    columns.append(Column("visible", views, "patches", hidden=hidden, smooth=True))
    wanted = name_features(seen, TeacherView(attention, features))
    for name, target in gather_features(config, layout, scalings, wanted, choice).items():
        if name in predictions:
            cosine = F.cosine_similarity(predictions[name].float(), target, dim=-1)
            patches = place_on_grid(cosine[:, int(layout.cls) :], layout, choice)
            whose = "EMA weights" if name == "student" else name.replace("_", " ", 1)
            note = f"cosine, mean {cosine.mean():.2f}"
            patches = patches.view(-1, height, width).clamp(0, 1)
            columns.append(Column(whose, patches, note, COSINE))
    if "pixel" in predictions:
        columns.append(reconstruct(config, predictions["pixel"].float(), pixels, layout, choice))
    colours = principal_colours(tokens.float(), average_patch_colours(views, height))
    colours = colours.view(-1, height, width, 3)
    columns.append(Column("student's", colours, "features, PCA", COMPONENTS))
    return [column_to_cpu(column) for column in columns]


def name_maps(
    config: Config, teachers: Mapping[str, Tensor], momentum: Tensor | None, mixed: Tensor | None
) -> dict[str, Tensor]:
    """Return the attention maps ``[n, N]`` of a sheet by title, each teacher's first."""
    configs, maps = teacher_configs(config), dict[str, Tensor]()
    for name, one in teachers.items():
        is_norm = configs[name].attention.source == "activation_norm"
        maps[f"teacher {name}".strip() + (", activation norm" if is_norm else "")] = one
    if momentum is not None:
        maps["EMA weights"] = momentum
    if mixed is not None and len(maps) > 1:
        maps["collaborative"] = mixed
    return maps


def predicted_ids(layout: TokenLayout, choice: PatchChoice) -> Tensor:
    """Return the patch ids in the order of the predictions, int64 ``[R, Q']``."""
    ids = [choice.ids_keep[:, : layout.num_visible], choice.ids_hidden[:, : layout.num_hidden]]
    return torch.cat(ids, dim=1)


def place_on_grid(values: Tensor, layout: TokenLayout, choice: PatchChoice) -> Tensor:
    """Place values of predicted patches ``[R, Q']`` on the grid ``[R, N]``, NaN elsewhere."""
    length = sum(ids.shape[1] for ids in choice)
    blank = values.new_full((len(values), length), torch.nan)
    return blank.scatter(1, predicted_ids(layout, choice), values)


def reconstruct(
    config: Config, predicted: Tensor, pixels: Tensor, layout: TokenLayout, choice: PatchChoice
) -> Column:
    """Replace the masked patches by predicted pixels, denormalised to each patch's own range.

    Predictions are ``[R, Q', 3 P P]``, normalised images ``[R, 3, S, S]``.
    """
    side = round((predicted.shape[-1] / 3) ** 0.5)
    patches = patchify(pixels, side)
    ids = predicted_ids(layout, choice)[..., None].expand_as(predicted)
    if config.target.pixel.norm == "patch":
        var, mean = torch.var_mean(patches.gather(1, ids), dim=-1, keepdim=True, correction=1)
        predicted = predicted * (var + EPS).sqrt() + mean
    kept = choice.ids_keep[..., None].expand(-1, -1, patches.shape[-1])
    filled = patches.scatter(1, ids, predicted).scatter(1, kept, patches.gather(1, kept))
    rows = pixels.shape[-2] // side
    grid = filled.view(len(filled), rows, -1, side, side, 3)
    whole = grid.permute(0, 1, 3, 2, 4, 5).reshape(len(filled), *pixels.shape[-2:], 3)
    std, mean = whole.new_tensor(IMAGENET_STD), whole.new_tensor(IMAGENET_MEAN)
    thrown = torch.ones(patches.shape[:2], dtype=torch.bool, device=pixels.device)
    thrown = thrown.scatter(1, torch.cat([choice.ids_keep, ids[..., 0]], dim=1), False)
    return Column(
        "reconstruction",
        (whole * std + mean).clamp(0, 1),
        "of masked patches",
        hidden=thrown.view(len(filled), rows, -1),
        smooth=True,
    )


def principal_colours(features: Tensor, reference: Tensor) -> Tensor:
    """Return three principal components as red, green and blue.

    Order and sign of the components are arbitrary and change during training. The components are
    whitened and rotated together as close as possible to a constant reference, so the
    colours do not depend on the basis of the decomposition.

    Args:
        features: ``[n, N, D]``, D >= 3.
        reference: ``[n, N, 3]``, such as the patches' mean colours.

    Returns:
        ``[n, N, 3]`` in [0, 1]; grey where the features do not vary.

    Source: orthogonal Procrustes, P. H. Schonemann, Psychometrika 31 (1966).
    """
    rows = features.double().flatten(0, 1).cpu()
    rows = rows - rows.mean(0)
    axes = torch.linalg.svd(rows, full_matrices=False)
    left = axes.U[:, :3] * (axes.S[:3] > 1e-9 * axes.S[0].clamp_min(1e-300))
    target = reference.double().flatten(0, 1).cpu()
    turn = torch.linalg.svd(left.T @ (target - target.mean(0)))
    whitened = left @ (turn.U @ turn.Vh) * len(rows) ** 0.5
    colours = (0.5 + whitened / (2 * SPREAD)).clamp(0, 1)
    return colours.float().view(*features.shape[:2], 3)


def average_patch_colours(views: Tensor, rows: int) -> Tensor:
    """Return the mean colour per patch, ``[n, N, 3]``; views ``[n, S, S, 3]``."""
    side = views.shape[1] // rows
    return F.avg_pool2d(views.permute(0, 3, 1, 2), side).flatten(2).transpose(1, 2)


def column_to_cpu(column: Column) -> Column:
    """Move a column to the CPU."""
    hidden = None if column.hidden is None else column.hidden.cpu()
    return replace(column, values=column.values.float().cpu(), hidden=hidden)
