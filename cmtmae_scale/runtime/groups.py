"""Groups of ranks that share or replicate weights."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh


def make_grid(device_type: str, rows: int, columns: int) -> DeviceMesh:
    """Arrange all ranks in ``replicate`` x ``shard``; each rank creates only its own groups.

    ``init_device_mesh`` creates the groups of all ranks one after the other, each with a barrier of
    all ranks: 2,048 groups of one rank at 2,048 replicas. Here only the members of a group
    synchronise, and all groups of one dimension are created at the same time. A collective.

    Args:
        device_type: device of the tensors that are communicated.
        rows: size of ``replicate``.
        columns: size of ``shard``; rank r is in row ``r // columns``.
    """
    grid = torch.arange(rows * columns).view(rows, columns)
    row, column = divmod(dist.get_rank(), columns)
    groups = [make_group(grid[:, column].tolist()), make_group(grid[row].tolist())]
    names = ("replicate", "shard")
    return DeviceMesh.from_group(groups, device_type, mesh=grid, mesh_dim_names=names)


def make_group(ranks: list[int]) -> dist.ProcessGroup:
    """Return a group that includes this rank; a collective of its members alone."""
    if len(ranks) == dist.get_world_size():
        return world_group()
    return dist.new_group(ranks, use_local_synchronization=True)  # pyright: ignore


def world_group() -> dist.ProcessGroup:
    """Return the default group, of all ranks."""
    return dist.group.WORLD  # pyright: ignore
