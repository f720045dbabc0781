"""Saves of replicas: only rank 0 owns fragments; each rank notes the files that it touches."""

import errno
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from cmtmae_scale.checkpoint import layout
from cmtmae_scale.checkpoint.chunks import ChunkReader, load_fragments
from cmtmae_scale.checkpoint.find import find_checkpoint
from cmtmae_scale.checkpoint.writer import open_writer
from cmtmae_scale.config.schema import Checkpoint
from cmtmae_scale.errors import CheckpointError, CmtMaeError, exit_code_of
from cmtmae_scale.runtime.groups import make_group, world_group
from cmtmae_scale.runtime.launch import World
from tests.checkpoint.save_case import fragments, state_of, values


def save_and_verify(folder: Path) -> tuple[list[str], list[str], list[str | None], int]:
    """Save what all ranks hold alike, twice, and verify it whole and with a flipped byte.

    Returns:
        Names of the files that this rank opened while saving and while verifying, the checkpoints
        found before and after the damage, and how often this rank examined a whole folder.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    opened: list[str] = []
    examined: list[Path] = []
    find_damage = layout.find_damage

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("open", "os.mkdir") and str(folder) in str(arguments[0]):
            opened.append(Path(str(arguments[0])).name)

    def count(checked: Path, hashes: bool = True) -> str | None:
        examined.append(checked)
        return find_damage(checked, hashes)

    layout.find_damage = count
    sys.addaudithook(note)
    held = {key: one._replace(owner=rank == 0) for key, one in fragments().items()}
    with ExitStack() as stack:
        world = World(rank, size, rank, size, "test")
        writer = open_writer(folder, world, Checkpoint(), held, None, stack)
        for step in (1, 2):
            writer.save(step, held, state_of(step))
            writer.wait()
        writer.finish(2, held, state_of(2))
    dist.barrier()
    written, root = [*opened], folder / "checkpoints"
    opened.clear()
    before = find_checkpoint(root, rank, size)
    read = [*opened]
    dist.barrier()
    if rank == 0:
        damaged = layout.folder_of(root, 2) / layout.rank_file(0)
        data = bytearray(damaged.read_bytes())
        data[-1] ^= 1
        damaged.write_bytes(data)
    dist.barrier()
    after = find_checkpoint(root, rank, size)
    names = [None if found is None else found.name for found in (before, after)]
    return written, read, names, len(examined)


def load_counted(folder: Path, cases: list[int]) -> list[tuple[int, int, bool, str]]:
    """Load on ranks of which some hold the same shard, and all one tensor whole.

    Args:
        folder: a checkpoint.
        cases: numbers of different shards.

    Returns:
        By case: values that this rank read and holds, whether all are right, and the error of a
        second load, of which rank 1 cannot read its share.
    """
    rank, results = dist.get_rank(), []
    read: list[int] = []
    read_values = ChunkReader.read_values

    def count(self: ChunkReader, key: str, offset: int, length: int) -> torch.Tensor:
        read.append(length)
        return read_values(self, key, offset, length)

    def refuse(self: ChunkReader, key: str, offset: int, length: int) -> torch.Tensor:
        if rank == 1:
            raise CheckpointError(f"{key}: not there")
        return read_values(self, key, offset, length)

    for shards in cases:
        same = make_group(list(range(rank % shards, dist.get_world_size(), shards)))
        blank = {
            key: own._replace(copies=same)
            for key, own in fragments(shards, rank % shards, fill=False).items()
        }
        whole = fragments(fill=False)["model.decoder.b"]
        blank["model.decoder.b"] = whole._replace(copies=world_group())
        read.clear()
        ChunkReader.read_values = count
        load_fragments(folder, blank)
        is_right = all(
            torch.equal(own.local, values(key)[own.offset : own.offset + own.local.numel()])
            for key, own in blank.items()
        )
        ChunkReader.read_values = refuse
        error = ""
        try:
            load_fragments(folder, blank)
        except CmtMaeError as raised:
            error = str(raised)
        held = sum(own.local.numel() for own in blank.values())
        results.append((sum(read), held, is_right, error))
    ChunkReader.read_values = read_values
    return results


def find_where_one_rank_cannot_list(root: Path, victims: list[int]) -> list[str]:
    """Find the newest checkpoint while the store lists no folder for one rank; name or error."""
    found: list[str] = []
    for victim in victims:
        refuse = mock.Mock(side_effect=OSError(errno.EIO, "Input/output error", str(root)))
        with ExitStack() as stack:
            if dist.get_rank() == victim:
                for name in ("listdir", "scandir"):
                    stack.enter_context(mock.patch.object(os, name, refuse))
            try:
                folder = find_checkpoint(root, dist.get_rank(), dist.get_world_size())
                found.append("none" if folder is None else folder.name)
            except CmtMaeError as error:
                found.append(f"{exit_code_of(error)} {error}")
    return found
