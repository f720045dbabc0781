"""Thirty steps of ViT-L/16 on a GPU: no host synchronisation inside, and figures to write down.

python -m pytest -m gpu -s tests/training/test_gpu.py
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from cmtmae_scale.backends.base import MicroBatch
from cmtmae_scale.config.schema import Config
from cmtmae_scale.dry_run import count_operations
from cmtmae_scale.method.attention import collaborative_attention
from cmtmae_scale.method.images import IMAGENET_MEAN, IMAGENET_STD, normalise_images
from cmtmae_scale.method.masking import choose_masks, token_counts
from cmtmae_scale.method.model import CollaborativeMAE
from cmtmae_scale.method.student import MomentumStudent, build_student
from cmtmae_scale.method.targets import Predictions, TokenLayout, normalise
from cmtmae_scale.runtime.launch import World, process_group
from cmtmae_scale.teachers.build import build_teacher, build_teacher_skeleton
from cmtmae_scale.training.build import build_model, make_fsdp

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
BATCH, WARM_UP, STEPS, LENGTH = 128, 5, 30, 196
DENSE_BF16_FLOPS = 989e12  # H100 and H200 SXM


def vit_large() -> Config:
    config = Config()
    config.student.arch = "vit_large_patch16_224"
    config.teacher.model, config.teacher.weights = "ViT-B-16-quickgelu", "random"
    config.teacher.quick_gelu = True
    config.collaboration.alpha_attention, config.collaboration.alpha_target = 0.5, 0.7
    config.mask.salient_frac = 0.0
    config.train.global_batch = config.train.micro_batch = BATCH
    config.backend.compile = True
    return config


def test_thirty_steps_of_vit_large() -> None:
    config, world = vit_large(), World(0, 1, 0, 1, "alone")
    device = torch.device("cuda", 0)
    with process_group(world, device):
        teacher = build_teacher(config, device, torch.bfloat16)
        assert teacher is not None
        model, momentum = build_model(config, teacher)
        layout = TokenLayout.from_config(config, *token_counts(LENGTH, config.mask.ratio))
        model.to(device)
        assert momentum is not None
        momentum.to(device)
        backend = make_fsdp(config, world, device, model, momentum, layout)
        generator = torch.Generator(device).manual_seed(0)
        pictures = torch.randint(
            0, 256, (BATCH, 224, 224, 3), dtype=torch.uint8, device=device, generator=generator
        )
        positions = torch.arange(BATCH, device=device)
        valid = torch.ones(BATCH, dtype=torch.bool, device=device)
        alpha = torch.full((), 0.7, device=device)
        spent: dict[str, list[Any]] = {}

        def timed(name: str, call: Callable[[], Any]) -> Any:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            result = call()
            end.record()
            spent.setdefault(name, []).append((start, end))
            return result

        def micro_step() -> Any:
            images = normalise_images(pictures, IMAGENET_MEAN, IMAGENET_STD)
            view = timed("teacher", lambda: teacher(pictures))
            features, attention = timed("momentum", lambda: backend.momentum_forward(images))
            mixed = collaborative_attention(view.attention, attention, alpha)
            choice = choose_masks(config.mask, mixed, positions, 0, 0.0)
            targets = Predictions(
                layout.gather(normalise(view.features, "l2"), choice),
                layout.gather(normalise(features, "ln"), choice),
                None,
            )
            batch = MicroBatch(images, choice, targets, valid, alpha)
            return timed("student", lambda: backend.micro(batch, last=True))

        walls = []
        for step in range(WARM_UP + STEPS):
            if step == WARM_UP:
                spent.clear()
                torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
            began = time.perf_counter()
            torch.cuda.set_sync_debug_mode("error" if step >= WARM_UP else "default")
            losses = micro_step()
            torch.cuda.set_sync_debug_mode("default")
            outcome = timed("optimizer", lambda loss=losses: backend.step(1e-4, loss.total[None]))
            timed("average", lambda: backend.momentum_update(0.996))
            torch.cuda.synchronize()
            assert outcome.applied
            if step >= WARM_UP:
                walls.append(time.perf_counter() - began)
    report(config, walls, spent)


def report(config: Config, walls: list[float], spent: dict[str, list[Any]]) -> None:
    with torch.device("meta"):
        skeleton = build_teacher_skeleton(config)
        model = CollaborativeMAE(config, skeleton.width)
        momentum = build_student(config, MomentumStudent)
    work = count_operations(config, model, momentum, skeleton)
    step_s = statistics.median(walls)
    rate = BATCH / step_s
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}, {BATCH} views a step")
    print(f"step {step_s * 1e3:.1f} ms (min {min(walls) * 1e3:.1f}, max {max(walls) * 1e3:.1f})")
    print(f"{rate:.0f} images/s, peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    for name, pairs in spent.items():
        print(f"  {name:<10}{statistics.median(a.elapsed_time(b) for a, b in pairs):8.2f} ms")
    for label, operations in (("all models", sum(work)), ("student only", work.student)):
        share = operations * rate / DENSE_BF16_FLOPS
        print(f"MFU {share:.1%} ({label}; of {DENSE_BF16_FLOPS / 1e12:.0f} TFLOP/s dense bf16)")
