"""Host memory and time of one of 8 ranks that builds a student of 2 billion parameters.

    MALLOC_MMAP_THRESHOLD_=65536 python tests/host_memory.py fsdp
    MALLOC_MMAP_THRESHOLD_=65536 python tests/host_memory.py zero3

No other rank runs: the collectives of torch's ``fake`` process group move nothing. The device is
the CPU, so that the shards live in host memory too. The variable makes glibc return freed tensors
to the system, so that the resident memory is that of live tensors. ``shards``: float32 student, EMA
weights and both moments of the rank. ``beside them``: what the backend allocates for its whole
life: with ZeRO-3 the student's shards in ``backend.precision``, and those of its float32 gradients.
Prints the growth of the resident memory, at its peak and after the build, without imports.
"""

import argparse
import logging
import resource
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from cmtmae_scale.backends import gathered_momentum
from cmtmae_scale.backends.base import Backend
from cmtmae_scale.backends.build import make_backend
from cmtmae_scale.backends.initial import initialise_backend
from cmtmae_scale.config.load import load_config
from cmtmae_scale.method.initialisation import initial_values
from cmtmae_scale.pretraining.build import build_model
from cmtmae_scale.runtime.launch import World
from cmtmae_scale.teachers.build import build_teacher_skeleton
from cmtmae_scale.tools.benchmark.collectives import fake_group

SIZES = ["student.width=2048", "student.depth=40", "student.heads=32"]
SETTINGS = {
    "fsdp": ["backend.name=fsdp", "backend.sharding=full"],
    "zero3": ["backend.name=deepspeed", "backend.zero_stage=3", "backend.compile=false"],
}


def resident_bytes() -> int:
    """Return the resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak_bytes() -> int:
    """Return the largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def build(overrides: list[str], ranks: int) -> tuple[Backend, int]:
    """Build and initialise the backend of rank 0; returns it and the number of parameters."""
    config = load_config("vit_large", overrides)
    with torch.device("meta"):
        teacher = build_teacher_skeleton(config)
    model, momentum = build_model(config, {"": teacher})
    count = sum(one.numel() for one in model.parameters())
    values = initial_values(model, config.run.seed)
    world, cpu = World(0, ranks, 0, ranks, "fake"), torch.device("cpu")
    backend = make_backend(config, world, cpu, model, momentum, unused_objective, rows=1)
    initialise_backend(backend, values)
    return backend, count


def unused_objective(predictions: object, work: object) -> None:
    """Replace the loss: nothing is trained."""


def gather_successive(mine: bytes, group: dist.ProcessGroup | None = None) -> list[bytes]:
    """Return the ranges that successive ranks hold, offset and length, from those of rank 0."""
    offsets, lengths = np.frombuffer(mine, np.int64).reshape(-1, 2).T
    ranks = range(dist.get_world_size(group))
    return [np.stack([offsets + n * lengths, lengths], axis=1).tobytes() for n in ranks]


def copied_bytes(backend: Backend) -> int:
    """Return the bytes of weights and gradients that a backend holds beside its fragments."""
    known = {own.local.untyped_storage().data_ptr() for own in backend.fragments().values()}
    held: dict[int, int] = {}
    for module in (backend.model, backend.momentum.module):  # pyright: ignore
        for one in module.parameters():
            one = getattr(one, "ds_tensor", one)
            storage = getattr(one, "_local_tensor", one).untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
    optimizer = getattr(backend, "optimizer", None)
    gradients = getattr(optimizer, "grad_partitions_flat_buffer", torch.empty(0))  # ZeRO-3's
    return gradients.nbytes + sum(size for place, size in held.items() if place not in known)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("backend", choices=SETTINGS)
    parser.add_argument("overrides", nargs="*", help="of the recipe vit_large")
    parser.add_argument("--ranks", type=int, default=8)
    options = parser.parse_args()
    small = ["student.width=64", "student.depth=1", "student.heads=1"]
    with fake_group(options.ranks):
        build([*SETTINGS[options.backend], *small], options.ranks)  # what a first build imports
        before, begun = resident_bytes(), time.process_time()
        overrides = [*SETTINGS[options.backend], *SIZES, *options.overrides]
        backend, count = build(overrides, options.ranks)
        seconds = time.process_time() - begun
        shards = sum(own.local.nbytes for own in backend.fragments().values())
        peak, after = peak_bytes() - before, resident_bytes() - before
        copies = copied_bytes(backend)
    print(
        f"{options.backend}, {count / 1e9:.2f} billion parameters, {options.ranks} ranks: shards "
        f"{shards / 1e9:.2f} GB, beside them {copies / 1e9:.2f} GB; peak {peak / 1e9:.2f} GB, "
        f"{peak / shards:.2f} times the shards; after the build {after / 1e9:.2f} GB; "
        f"{seconds:.0f} CPU-seconds"
    )


if __name__ == "__main__":
    logging.disable(logging.INFO)
    gathered_momentum.gather_bytes = gather_successive  # the fake group delivers no ranges
    main()
