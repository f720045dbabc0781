"""Effect of a codec's rounding on the loss and its gradient, on the run's own views."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cmtmae_scale.cache.codecs import Calibration, round_features
from cmtmae_scale.config.schema import Config
from cmtmae_scale.method.channels import ChannelScaling, sum_channels
from cmtmae_scale.method.images import IMAGENET_MEAN, IMAGENET_STD, normalise_images
from cmtmae_scale.method.initialisation import initialise
from cmtmae_scale.method.masking import PatchChoice, choose_masks, grid_counts
from cmtmae_scale.method.model import CollaborativeMAE
from cmtmae_scale.method.targets import RUNNING_NORMS, TokenLayout, objective
from cmtmae_scale.pretraining.channels import RunningChannels
from cmtmae_scale.pretraining.prepare import gather_targets
from cmtmae_scale.teachers.online import OnlineTeacher
from cmtmae_scale.tools.benchmark.table import markdown_table
from dataloading.stream import Batch

COSINE = 0.8
"""Cosine of a well-trained prediction with its target."""


@dataclass
class Rounding:
    """Errors relative to the unrounded features, over all views."""

    codec: str
    loss: float
    """Relative change of the loss at initialisation."""
    at_start: float
    """Error of the gradient with respect to the predictions, at initialisation."""
    near: float
    """The same for predictions at a cosine of 0.8 with their targets."""
    weights: float
    """Error of the gradient with respect to the weights, at initialisation."""


class Case(NamedTuple):
    """A micro-batch, its masks and the teacher's features ``[B, T, F]``."""

    images: Tensor
    choice: PatchChoice
    features: Tensor


class TeacherGradients(NamedTuple):
    """The teacher's loss term and its gradients."""

    loss: float
    at_start: Tensor
    near: Tensor
    weights: Tensor


def measure_codecs(
    config: Config,
    batches: Iterable[Batch],
    teacher: OnlineTeacher,
    calibration: Calibration,
    device: torch.device,
) -> list[Rounding]:
    """Compare int8, bf16 and, for contrast, int8 without standardised channels.

    The run's loss uses the teacher's features; batches have the student's and the teacher's size;
    the calibration is of the int8 codec.
    """
    model = CollaborativeMAE(config, {"teacher": teacher.width})
    initialise(model, config.run.seed)
    model.to(device)
    length = model.encoder.grid[0] * model.encoder.grid[1]
    layout = TokenLayout.from_config(config, *grid_counts(config.mask, length))
    calibration = Calibration(*(one.to(device) for one in calibration))
    bare = Calibration(torch.zeros_like(calibration.mean), torch.ones_like(calibration.std))
    stores: dict[str, Callable[[Tensor], Tensor]] = {
        "int8": lambda features: round_features(features, "int8", calibration),
        "bf16": lambda features: round_features(features, "bf16", None),
        "int8, channels not standardised": lambda features: round_features(features, "int8", bare),
    }
    gradients: dict[str, list[TeacherGradients]] = {name: [] for name in ("exact", *stores)}
    for batch in batches:
        case = make_case(config, batch, teacher, length)
        targets = {"exact": case.features}
        targets |= {name: store(case.features) for name, store in stores.items()}
        for name, features in targets.items():
            gradients[name].append(teacher_gradients(config, model, layout, case, features))
    return [relative_errors(name, gradients[name], gradients["exact"]) for name in stores]


def make_case(config: Config, batch: Batch, teacher: OnlineTeacher, length: int) -> Case:
    """Return masks from the teacher's attention map alone, and its features."""
    view = teacher(batch.images[-1])
    if view.features is None:
        raise ValueError("the loss does not use the teacher's features")
    choice = choose_masks(
        config.mask, view.attention, batch.position, config.run.seed, 0.0, length=length
    )
    images = normalise_images(batch.images[0], IMAGENET_MEAN, IMAGENET_STD)
    return Case(images, choice, view.features)


def teacher_gradients(
    config: Config, model: CollaborativeMAE, layout: TokenLayout, case: Case, features: Tensor
) -> TeacherGradients:
    """Compute the teacher's term and its gradients.

    The targets are ``features``, ``[B, T, F]``; the case has the unrounded ones, for predictions at
    a cosine of 0.8. The model is at initialisation.
    """
    norm = config.target.teacher.norm
    scaling = find_scaling(norm, case) if norm in RUNNING_NORMS else None
    targets, origin = (
        gather_targets(layout, one, norm, case.choice, scaling) for one in (features, case.features)
    )
    valid = torch.ones(len(targets), dtype=torch.bool, device=targets.device)

    def term(prediction: Tensor) -> Tensor:
        one, two = ({"teacher": each} for each in (prediction, targets))
        return objective(one, two, valid, layout, config.loss, {"teacher": 1.0})["teacher"]

    prediction = model(case.images, case.choice)["teacher"]
    loss = term(prediction)
    weights = [p for p in model.parameters() if p.requires_grad]
    first, *rest = torch.autograd.grad(loss, [prediction, *weights], allow_unused=True)
    close = predictions_near(origin, config.run.seed).requires_grad_()
    (near,) = torch.autograd.grad(term(close), [close])
    flat = torch.cat([one.flatten() for one in rest if one is not None])
    return TeacherGradients(loss.item(), first, near, flat)


def find_scaling(norm: str, case: Case) -> ChannelScaling:
    """Return the statistics per channel of a case's own unrounded features."""
    features = case.features
    num_groups = 1 + features.shape[1] - sum(ids.shape[1] for ids in case.choice)
    running = RunningChannels(norm == "channel", num_groups, features.shape[2], features.device)
    valid = torch.ones(len(features), dtype=torch.bool, device=features.device)
    running.update(sum_channels(features, valid, running.scaling.mean).flatten().tolist())
    return running.scaling


def predictions_near(targets: Tensor, seed: int) -> Tensor:
    """Return predictions at a cosine of 0.8 with their targets, of the same norm."""
    generator = torch.Generator(targets.device).manual_seed(seed)
    noise = torch.randn(targets.shape, device=targets.device, generator=generator)
    unit = torch.nn.functional.normalize(targets, dim=-1)
    aside = noise - (noise * unit).sum(-1, keepdim=True) * unit
    aside = torch.nn.functional.normalize(aside, dim=-1)
    mixed = COSINE * unit + (1 - COSINE**2) ** 0.5 * aside
    return mixed * targets.norm(dim=-1, keepdim=True)


def relative_errors(
    name: str, rounded: list[TeacherGradients], exact: list[TeacherGradients]
) -> Rounding:
    """Return relative errors over all micro-batches; gradients of weights are summed first."""
    change = sum(one.loss for one in rounded) / sum(one.loss for one in exact) - 1
    together = [torch.stack([one.weights for one in some]).sum(0) for some in (rounded, exact)]
    return Rounding(
        name,
        change,
        relative_error([one.at_start for one in rounded], [one.at_start for one in exact]),
        relative_error([one.near for one in rounded], [one.near for one in exact]),
        relative_error(together[:1], together[1:]),
    )


def relative_error(found: list[Tensor], exact: list[Tensor]) -> float:
    """Return the norm of the difference divided by the norm of the exact tensors."""
    apart = sum(float((a - b).double().square().sum()) for a, b in zip(found, exact, strict=True))
    return (apart / sum(float(b.double().square().sum()) for b in exact)) ** 0.5


def rounding_table(results: list[Rounding], views: int) -> str:
    """Return a Markdown table with a caption."""
    header = ["stored as", "loss", "gradient of predictions", f"at a cosine of {COSINE}"]
    header += ["gradient of weights"]
    rows = [
        [one.codec, *(f"{x:.1e}" for x in (one.loss, one.at_start, one.near, one.weights))]
        for one in results
    ]
    caption = f"Relative errors against the unrounded teacher features, {views} views"
    return f"{caption}\n\n{markdown_table(header, rows)}"
