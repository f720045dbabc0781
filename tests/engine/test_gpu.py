"""Micro-steps of ViT-L/16 on a GPU wait for nothing: torch raises at any host synchronisation.

python -m pytest -m gpu tests/engine/test_gpu.py
"""

import pytest
import torch

from cmtmae_scale.config.schema import Config
from cmtmae_scale.pretraining.build import build_models, fetch_teacher
from cmtmae_scale.pretraining.prepare import prepare
from cmtmae_scale.pretraining.scalars import scalars_at
from cmtmae_scale.runtime.collectives import process_group
from cmtmae_scale.runtime.determinism import deterministic_kernels
from cmtmae_scale.runtime.launch import World
from cmtmae_scale.teachers.base import forward_all
from dataloading.stream import Batch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
BATCH, WARM_UP, STEPS = 32, 3, 5


def vit_large(compiled: bool) -> Config:
    config = Config()
    config.student.arch = "vit_large_patch16_224"
    config.teacher.model, config.teacher.weights = "ViT-B-16-quickgelu", "random"
    config.teacher.quick_gelu = True
    config.collaboration.alpha_attention, config.collaboration.alpha_target = 0.5, 0.7
    config.mask.salient_fraction = 0.0
    config.train.global_batch_size = config.train.micro_batch_size = BATCH
    config.backend.compile = compiled
    return config


def train_vit_large(compiled: bool, debug: str) -> list[float]:
    """Take steps, with ``debug`` as torch's mode for host synchronisation; returns the losses."""
    config, world = vit_large(compiled), World(0, 1, 0, 1, "none")
    device = torch.device("cuda", 0)
    with process_group(world, device):
        teacher = fetch_teacher(config, world, device)
        assert teacher is not None
        models = build_models(config, world, device, {"": teacher})
        generator = torch.Generator(device).manual_seed(0)
        shape = (BATCH, 224, 224, 3)
        views = torch.randint(0, 256, shape, dtype=torch.uint8, device=device, generator=generator)
        positions = torch.arange(BATCH, device=device)
        valid = torch.ones(BATCH, dtype=torch.bool, device=device)
        batch = Batch((views,), positions, positions, positions, valid)
        scalars = scalars_at(config, 0.5)
        losses = []
        for step in range(WARM_UP + STEPS):
            torch.cuda.set_sync_debug_mode(debug if step >= WARM_UP else "default")
            views_of = forward_all(models.teachers, batch)
            micro_batch, _ = prepare(config, models, batch, views_of, scalars)
            loss = models.backend.micro(micro_batch, last=True)
            torch.cuda.set_sync_debug_mode("default")
            assert models.backend.step(1e-4, loss["total"][None]).applied
            models.backend.momentum_update(scalars.momentum)
            losses.append(float(loss["total"]))
        models.backend.close()
    return losses


@pytest.mark.parametrize("compiled", [False, True])
def test_a_micro_step_does_not_wait_for_the_device(compiled: bool) -> None:
    losses = train_vit_large(compiled, "error")
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("compiled", [False, True])
def test_deterministic_kernels_give_the_same_bits(compiled: bool) -> None:
    with deterministic_kernels(enabled=True):
        first = train_vit_large(compiled, "default")
        torch.compiler.reset()
        assert train_vit_large(compiled, "default") == first
