"""The learning signal: each weighted term falls, each unweighted one stays."""

import pytest
import torch
from torch import Tensor

from cmtmae_scale.backends.initial import initialise_backend
from cmtmae_scale.backends.plain import Plain
from cmtmae_scale.config.schema import Config
from cmtmae_scale.method.attention import collaborative_attention
from cmtmae_scale.method.images import IMAGENET_MEAN, IMAGENET_STD, normalise_images
from cmtmae_scale.method.initialisation import initial_values
from cmtmae_scale.method.masking import choose_masks, token_counts
from cmtmae_scale.method.targets import TokenLayout, normalise
from cmtmae_scale.pretraining.build import build_model, make_objective
from cmtmae_scale.pretraining.prepare import MicroBatch
from cmtmae_scale.teachers.build import build_teacher
from dataloading.index import build_index
from dataloading.stream import Stream
from tests.engine.run_case import make_photographs

STEPS, VIEWS, LENGTH = 120, 16, 64


def learn(tmp_path, sampler: str, alpha_target: float) -> tuple[list[float], list[float]]:
    """First and last-ten-mean losses (teacher, student) on 16 fixed views."""
    config = Config()
    config.student.arch, config.student.patch_size, config.views.image_size = "test_vit", 8, 64
    config.teacher.library, config.teacher.model = "timm", "test_vit"
    config.teacher.weights, config.teacher.feature = "random", "block"
    config.decoder.depth, config.decoder.width, config.decoder.heads = 2, 48, 4
    config.mask.sampler = sampler  # pyright: ignore
    config.mask.salient_fraction = 0.5
    config.collaboration.alpha_attention = 0.5
    config.collaboration.alpha_target = 0.5  # so that both heads are built
    config.target.teacher.norm = "ln"
    config.backend.precision = "fp32"
    teacher = build_teacher(config, "cpu", torch.float32)
    assert teacher is not None
    photographs = make_photographs(tmp_path, VIEWS)
    sizes = (64, teacher.image_size)
    with Stream(build_index(photographs), seed=0, micro_batch=VIEWS, sizes=sizes) as stream:
        batch = next(stream)
    view = teacher(batch.images[1])
    images = normalise_images(batch.images[0], IMAGENET_MEAN, IMAGENET_STD)
    model, momentum = build_model(config, {"": teacher})
    values = initial_values(model, config.run.seed)
    layout = TokenLayout.from_config(config, *token_counts(LENGTH, config.mask.ratio))
    compute, cpu = make_objective(config, layout), torch.device("cpu")
    backend = Plain(model, momentum, compute, config.optimizer, config.backend, 1 / VIEWS, cpu)
    initialise_backend(backend, values)
    curve: list[dict[str, Tensor]] = []
    for step in range(STEPS):
        features, attention = backend.momentum_forward(images)
        mixed = None
        if view.attention is not None and attention is not None:
            mixed = collaborative_attention(view.attention, attention, 0.5)
        positions = torch.arange(VIEWS) + step * VIEWS
        choice = choose_masks(config.mask, mixed, positions, 0, 0.5, length=LENGTH)
        targets = {
            name: layout.gather(normalise(one, "ln"), choice)
            for name, one in (("teacher", view.features), ("student", features))
            if one is not None
        }
        valid = torch.ones(VIEWS, dtype=torch.bool)
        micro = MicroBatch(images, choice, targets, valid, torch.tensor(alpha_target))
        curve.append(backend.micro(micro, last=True))
        assert backend.step(2e-3, torch.zeros(1)).applied
        backend.momentum_update(0.99)
    values = torch.tensor([[one.get(k, 0.0) for k in ("teacher", "student")] for one in curve])
    values /= VIEWS
    return values[0].tolist(), values[-10:].mean(0).tolist()


SLOW_CASES = [
    ("random", 1.0),
    ("hide_salient_mix", 1.0),
    ("hide_salient_mix", 0.7),
    ("hide_salient", 0.7),
    ("hide_salient_mix", 0.0),
]


@pytest.mark.parametrize(
    ("sampler", "alpha"),
    [("reveal_salient", 0.7)] + [pytest.param(*one, marks=pytest.mark.slow) for one in SLOW_CASES],
)
def test_every_weighted_term_is_learnt_and_no_other(tmp_path, sampler, alpha) -> None:
    first, last = learn(tmp_path, sampler, alpha)
    for weight, start, end in zip((alpha, 1 - alpha), first, last, strict=True):
        # Untrained predictions share a direction, as do the targets: in 64 channels the cosine of
        # two random directions has a standard deviation of 1 / 8, twice that in the loss.
        assert abs(start - 2.0) < 0.5
        if weight:
            assert end < 1.0
        else:
            assert abs(end - 2.0) < 0.5  # its head is untrained
