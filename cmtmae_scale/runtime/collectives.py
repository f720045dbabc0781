"""Small collectives on the host."""

import torch
import torch.distributed as dist


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
