"""Who am I: rank and device of this process, from torchrun, deepspeed's launcher, or alone."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

from cmtmae_scale.errors import ConfigError


class World(NamedTuple):
    """Place of this process among all."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    launcher: str


def find_world(environment: Mapping[str, str] = os.environ) -> World:
    """Read the place from the environment.

    Raises:
        ConfigError: if the variables are incomplete or contradict each other.
    """
    if "RANK" not in environment:
        return World(0, 1, 0, 1, "alone")
    launcher = "torchrun" if "TORCHELASTIC_RUN_ID" in environment else "environment"
    local_size = environment.get("LOCAL_WORLD_SIZE", environment.get("LOCAL_SIZE"))
    if "LOCAL_SIZE" in environment and "LOCAL_WORLD_SIZE" not in environment:
        launcher = "deepspeed"
    try:
        world = World(
            int(environment["RANK"]),
            int(environment["WORLD_SIZE"]),
            int(environment["LOCAL_RANK"]),
            int(local_size or ""),
            launcher,
        )
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"RANK={environment['RANK']} is set, but WORLD_SIZE, LOCAL_RANK or LOCAL_WORLD_SIZE is "
            "absent or no number; start with torchrun or unset RANK"
        ) from error
    if not 0 <= world.local_rank < world.local_world_size <= world.world_size:
        raise ConfigError(f"the launcher's variables contradict each other: {world}")
    return world


def pick_device(world: World) -> torch.device:
    """Take this rank's GPU, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if world.local_world_size > count:
        raise ConfigError(
            f"{world.local_world_size} processes on this node, but {count} GPUs; "
            f"use --nproc-per-node={count}"
        )
    return torch.device("cuda", world.local_rank)


@contextmanager
def process_group(world: World, device: torch.device, timeout_s: float = 1800) -> Iterator[None]:
    """Hold the default process group open: gloo for the host, and NCCL for GPUs."""
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    timeout = timedelta(seconds=timeout_s)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world.launcher == "alone":
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout)
    try:
        yield
    finally:
        dist.destroy_process_group()
