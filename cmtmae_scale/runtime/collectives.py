"""The process group of a run, and small agreements between its ranks on the host."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from cmtmae_scale.errors import ConfigError
from cmtmae_scale.runtime.launch import World


def pick_device(world: World) -> torch.device:
    """Return this rank's GPU, or the CPU if there is no GPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if world.launcher == "srun" and count == 1:
        return torch.device("cuda", 0)  # --gpus-per-task hides the other tasks' GPUs
    if world.local_world_size > count:
        raise ConfigError(
            f"{world.local_world_size} processes on this node, but {count} GPUs; "
            f"use --nproc-per-node={count}"
        )
    return torch.device("cuda", world.local_rank)


@contextmanager
def process_group(world: World, device: torch.device, timeout_s: float = 1800) -> Iterator[None]:
    """Open the default process group: gloo for the host, and NCCL for GPUs."""
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    timeout = timedelta(seconds=timeout_s)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world.launcher == "none":
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    else:
        dist.init_process_group(
            backend,
            init_method=world.init_method,
            rank=world.rank,
            world_size=world.world_size,
            timeout=timeout,
        )
    try:
        yield
    finally:
        dist.destroy_process_group()


def ranks() -> int:
    """Return the number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait for every rank."""
    if ranks() > 1:
        dist.all_reduce(torch.zeros(1))


def all_ranks_agree(mine: bool) -> bool:
    """Return whether a flag is true on every rank."""
    if ranks() == 1:
        return mine
    flag = torch.tensor([int(mine)])
    dist.all_reduce(flag, dist.ReduceOp.MIN)
    return bool(flag.item())


def broadcast_int(value: int) -> int:
    """Return rank 0's integer on every rank."""
    if ranks() == 1:
        return value
    box = torch.tensor([value], dtype=torch.int64)
    dist.broadcast(box, 0)
    return int(box.item())


def gather_texts(mine: str) -> list[str]:
    """Return every rank's text, in rank order."""
    found = [mine] * ranks()
    if ranks() > 1:
        dist.all_gather_object(found, mine)
    return found


def broadcast_text(text: str) -> str:
    """Return rank 0's text on every rank."""
    if ranks() == 1:
        return text
    data = text.encode()
    size = broadcast_int(len(data))
    if not size:
        return ""
    mine = data if dist.get_rank() == 0 else bytes(size)
    box = torch.tensor(list(mine), dtype=torch.uint8)
    dist.broadcast(box, 0)
    return bytes(box.tolist()).decode()
