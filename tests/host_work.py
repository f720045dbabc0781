"""Thread-CPU time of the host in a step: the real loop over 24 blocks of tiny width, on a CPU.

    python tests/host_work.py [--ranks 64] [--sharding hybrid] [--steps 8]

More than one rank uses torch's fake process group, whose collectives return at once and move
nothing, so that the values of the weights mean nothing. Prints milliseconds of the main thread per
step, medians: by part, and from the host read to the next forward that is enqueued. In that time a
GPU has only what was enqueued before the read: the teacher's forward of the next step. The tiny
tensors' arithmetic is included, so that ratios mean more than the values.
"""

import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import timm
import torch
import torch.distributed as dist
from timm.models import vision_transformer

from cmtmae_scale.backends import adamw, gathered_momentum
from cmtmae_scale.config.schema import Config
from cmtmae_scale.pretraining import build
from cmtmae_scale.runtime.launch import World
from cmtmae_scale.tools.benchmark.rig import Rig

ARCH = "vit_deep_tiny"
WARM_UP = 3


def vit_deep_tiny(pretrained: bool = False, **options: Any) -> Any:
    """ViT-L's depth at a width at which arithmetic costs little."""
    sizes: dict[str, Any] = {"patch_size": 16, "embed_dim": 16, "depth": 24, "num_heads": 2}
    return vision_transformer._create_vision_transformer(ARCH, pretrained=False, **sizes | options)


def make_config(ranks: int, sharding: Any) -> Config:
    config = Config()
    config.student.arch, config.views.image_size = ARCH, 64
    config.teacher.library, config.teacher.model = "timm", ARCH
    config.teacher.weights, config.teacher.feature = "random", "block"
    config.decoder.width, config.decoder.heads = 32, 2
    config.collaboration.alpha_attention, config.collaboration.alpha_target = 0.5, 0.7
    config.mask.salient_fraction = 0.0
    config.backend.compile, config.backend.sharding = False, sharding
    config.optimizer.grad_clip = 1.0
    config.train.global_batch_size, config.train.micro_batch_size = ranks, 1
    return config


def repeat(mine: Any, group: Any = None) -> list[Any]:
    """Gather as if every rank had sent what this one sends."""
    return [mine] * dist.get_world_size(group)


def open_group(ranks: int, stack: ExitStack) -> World:
    """Open a process group of one rank, or rank 0 of a fake one."""
    if ranks == 1:
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    else:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
        for place, name, stand_in in (
            (build, "require_equal_weights", lambda *_: None),
            (gathered_momentum, "gather_bytes", repeat),
            (adamw, "acceptable", lambda *_: True),
        ):
            stack.enter_context(mock.patch.object(place, name, stand_in))
    stack.callback(dist.destroy_process_group)
    return World(0, ranks, 0, min(ranks, 8), "none")


class Clock:
    """Thread-CPU seconds by part; the first enqueued forward ends the time since the host read."""

    def __init__(self) -> None:
        self.parts: dict[str, list[float]] = defaultdict(list)
        self.read_at: float | None = None

    def timed(self, name: str, function: Callable[..., Any], enqueues: bool = True) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            began = time.thread_time()
            if enqueues and self.read_at is not None:
                self.parts["host read to next forward"].append(began - self.read_at)
                self.read_at = None
            value = function(*arguments, **options)
            self.parts[name].append(time.thread_time() - began)
            return value

        return call

    def start_read(self, values: torch.Tensor) -> Callable[[], list[float]]:
        def read() -> list[float]:
            found = values.tolist()
            self.read_at = time.thread_time()
            return found

        return read


def measure(ranks: int, sharding: str, steps: int) -> dict[str, Any]:
    """Take steps; returns median milliseconds by part."""
    clock = Clock()
    with ExitStack() as stack:
        world = open_group(ranks, stack)
        config = make_config(ranks, sharding)
        rig = Rig(config, "auto", False, world, torch.device("cpu"), stack)
        backend, teacher = rig.run.backend, rig.run.task.models.teachers[""]  # type: ignore[attr-defined]
        stack.enter_context(mock.patch.object(adamw, "start_read", clock.start_read))
        for place, method, name in (
            (teacher, "forward_batch", "teacher"),
            (backend, "momentum_forward", "momentum encoder"),
            (backend, "micro", "student"),
            (backend, "momentum_update", "EMA update"),
        ):
            call = clock.timed(name, getattr(place, method), name != "EMA update")
            stack.enter_context(mock.patch.object(place, method, call))
        take_step = clock.timed("whole step", rig.take_steps, enqueues=False)
        for step in range(WARM_UP + steps):
            if step == WARM_UP:
                clock.parts.clear()
            take_step(1)
    found = {name: 1000 * statistics.median(values) for name, values in clock.parts.items()}
    return {"ranks": ranks, "sharding": sharding} | {n: round(ms, 1) for n, ms in found.items()}


def main() -> None:
    """Print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--sharding", choices=("replicate", "hybrid", "full"), default="hybrid")
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    vit_deep_tiny.__module__ = vision_transformer.__name__
    vision_transformer.default_cfgs[ARCH] = vision_transformer.default_cfgs["vit_tiny_patch16_224"]
    timm.models.register_model(vit_deep_tiny)  # pyright: ignore[reportPrivateImportUsage]
    sys.stdout.write(json.dumps(measure(options.ranks, options.sharding, options.steps)) + "\n")


if __name__ == "__main__":
    main()
