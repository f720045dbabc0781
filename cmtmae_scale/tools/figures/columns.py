"""What is shown of each image, computed as a training step computes it.

Legend: n images, S their side in pixels, N = h * w patches, P patch side, R = n masks.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmtmae_scale.config.schema import Config
from cmtmae_scale.engine.progress import Scalars
from cmtmae_scale.evaluation.encoders import computing
from cmtmae_scale.method.attention import normalise_map
from cmtmae_scale.method.images import IMAGENET_MEAN, IMAGENET_STD, normalise_images
from cmtmae_scale.method.masking import PatchChoice, choose_masks
from cmtmae_scale.method.model import CollaborativeMAE
from cmtmae_scale.method.student import MomentumEncoder
from cmtmae_scale.method.targets import EPS, Predictions, TokenLayout, patchify
from cmtmae_scale.pretraining.prepare import gather, mix
from cmtmae_scale.teachers.base import Teacher, TeacherView
from cmtmae_scale.tools.figures.components import principal_colours

ATTENTION = "Attention: dark to bright, each map over its own range."
COSINE = "Cosine: 0 or below dark, 1 bright, grey not predicted."
COMPONENTS = "PCA: turned towards the patches' own colours."


@dataclass
class Networks:
    """What looks at the images."""

    teacher: Teacher | None
    model: CollaborativeMAE
    momentum: MomentumEncoder | None

    def trained(self, prefix: str) -> nn.Module:
        """The network whose states have a prefix, ``model.`` or ``momentum.``."""
        return self.model if prefix == "model." or self.momentum is None else self.momentum


@dataclass
class Column:
    """One kind of picture, one of each image."""

    title: str
    values: Tensor
    """Values ``[n, h, w]`` in [0, 1], not a number where there is none; or colours in [0, 1],
    ``[n, h, w, 3]``."""
    note: str = ""
    """Second line of the title."""
    legend: str = ""
    """How to read it."""
    hidden: Tensor | None = None
    """Patches to be greyed out, bool ``[n, h, w]``."""
    smooth: bool = False
    """A photograph, resampled as such; else patches with edges."""


@torch.no_grad()
def columns_of(
    config: Config,
    networks: Networks,
    layout: TokenLayout,
    images: tuple[Tensor, ...],
    scalars: Scalars,
) -> list[Column]:
    """Look at images with the present weights; mask 0 of positions 0, 1, 2 and so on.

    Args:
        config: the run.
        networks: they compute where the images are, and end on the CPU.
        layout: of the feature targets.
        images: uint8 ``[n, S, S, 3]``, the student's, then the teacher's if they differ.
        scalars: of the present step.

    Returns:
        Columns of what the run uses, on the CPU.
    """
    device = images[0].device
    model, momentum = networks.model.to(device), networks.momentum
    height, width = model.encoder.grid
    pixels = normalise_images(images[0], IMAGENET_MEAN, IMAGENET_STD)
    views = images[0].float() / 255
    with computing(device):
        view = networks.teacher(images[-1]) if networks.teacher else TeacherView(None, None)
        features = attention = None
        if momentum is not None:
            features, attention = momentum.to(device)(pixels)
            momentum.cpu()
        alpha = torch.full((), scalars.alpha_attention, device=device)
        mixed = mix(config.attention, view.attention, attention, alpha)
        positions = torch.arange(len(views), device=device)
        choice = choose_masks(
            replace(config.mask, masks_per_view=1),
            mixed,
            positions,
            config.run.seed,
            scalars.salient_frac,
            length=height * width,
            num_predicted=layout.num_hidden,
        )
        predictions = model(pixels, choice)
        tokens = model.encoder(pixels)[:, model.encoder.num_prefix :]
    model.cpu()
    columns = [Column("view", views, smooth=True)]
    maps = {"teacher": view.attention, "momentum student": attention}
    maps["collaborative"] = mixed if all(one is not None for one in maps.values()) else None
    for name, one in maps.items():
        if one is not None:
            values = normalise_map(one, "minmax").view(-1, height, width)
            columns.append(Column(name, values, "attention", ATTENTION))
    seen = torch.ones(len(views), height * width, dtype=torch.bool, device=device)
    hidden = seen.scatter(1, choice.ids_keep, False).view(-1, height, width)
    columns.append(Column("visible", views, "patches", hidden=hidden, smooth=True))
    targets = Predictions(
        gather(layout, view.features, config.target.teacher.norm, choice),
        gather(layout, features, config.target.student.norm, choice),
        None,
    )
    for name in ("teacher", "student"):
        prediction, target = getattr(predictions, name), getattr(targets, name)
        if prediction is not None and target is not None:
            cosine = F.cosine_similarity(prediction.float(), target, dim=-1)
            patches = on_grid(cosine[:, int(layout.cls) :], layout, choice)
            whose = "momentum student" if name == "student" else name
            note = f"cosine, mean {cosine.mean():.2f}"
            patches = patches.view(-1, height, width).clamp(0, 1)
            columns.append(Column(whose, patches, note, COSINE))
    if predictions.pixel is not None:
        columns.append(reconstruction(config, predictions.pixel.float(), pixels, layout, choice))
    colours = principal_colours(tokens.float(), patch_means(views, height))
    colours = colours.view(-1, height, width, 3)
    columns.append(Column("student's", colours, "features, PCA", COMPONENTS))
    return [on_cpu(column) for column in columns]


def predicted_ids(layout: TokenLayout, choice: PatchChoice) -> Tensor:
    """Patches in the order of the predictions, int64 ``[R, Q']``."""
    ids = [choice.ids_keep[:, : layout.num_visible], choice.ids_hidden[:, : layout.num_hidden]]
    return torch.cat(ids, dim=1)


def on_grid(values: Tensor, layout: TokenLayout, choice: PatchChoice) -> Tensor:
    """Values of predicted patches ``[R, Q']`` at their places ``[R, N]``, else not a number."""
    length = sum(ids.shape[1] for ids in choice)
    blank = values.new_full((len(values), length), torch.nan)
    return blank.scatter(1, predicted_ids(layout, choice), values)


def reconstruction(
    config: Config, predicted: Tensor, pixels: Tensor, layout: TokenLayout, choice: PatchChoice
) -> Column:
    """Predicted pixels in place of the hidden ones, brought back to each patch's own range.

    Args:
        config: the run.
        predicted: ``[R, Q', 3 P P]``.
        pixels: normalised images ``[R, 3, S, S]``.
        layout: of the feature targets.
        choice: the masks.
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
        "of hidden patches",
        hidden=thrown.view(len(filled), rows, -1),
        smooth=True,
    )


def patch_means(views: Tensor, rows: int) -> Tensor:
    """Mean colour of each patch, ``[n, N, 3]``; views ``[n, S, S, 3]``."""
    side = views.shape[1] // rows
    return F.avg_pool2d(views.permute(0, 3, 1, 2), side).flatten(2).transpose(1, 2)


def on_cpu(column: Column) -> Column:
    """The same column on the CPU."""
    hidden = None if column.hidden is None else column.hidden.cpu()
    return replace(column, values=column.values.float().cpu(), hidden=hidden)
