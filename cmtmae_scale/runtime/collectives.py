"""Small agreements between ranks, on the host."""

import torch
import torch.distributed as dist


def ranks() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait until every rank is here."""
    if ranks() > 1:
        dist.all_reduce(torch.zeros(1))


def agree_all(mine: bool) -> bool:
    """Tell whether a statement holds on every rank."""
    if ranks() == 1:
        return mine
    flag = torch.tensor([int(mine)])
    dist.all_reduce(flag, dist.ReduceOp.MIN)
    return bool(flag.item())


def from_first(value: int) -> int:
    """Return rank 0's integer on every rank."""
    if ranks() == 1:
        return value
    box = torch.tensor([value], dtype=torch.int64)
    dist.broadcast(box, 0)
    return int(box.item())


def texts_of_all(mine: str) -> list[str]:
    """Return every rank's text, in the order of ranks."""
    found = [mine] * ranks()
    if ranks() > 1:
        dist.all_gather_object(found, mine)
    return found


def text_from_first(text: str) -> str:
    """Return rank 0's text on every rank."""
    if ranks() == 1:
        return text
    data = text.encode()
    size = from_first(len(data))
    if not size:
        return ""
    mine = data if dist.get_rank() == 0 else bytes(size)
    box = torch.tensor(list(mine), dtype=torch.uint8)
    dist.broadcast(box, 0)
    return bytes(box.tolist()).decode()
