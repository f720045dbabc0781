"""Tensors that several ranks hold: compared before a save, read by one of the ranks at a load."""

import math
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist

from cmtmae_scale.backends.base import Fragment
from cmtmae_scale.errors import ReplicaError
from cmtmae_scale.runtime.collectives import broadcast_tensor, gather_texts, own_rank, ranks


def verify_replicas(step: int, fragments: Mapping[str, Fragment]) -> None:
    """Compare the fragments of ranks that hold the same ranges; a collective.

    Each rank sums its bit patterns as integers, so one flipped bit always changes the sum. With
    ``backend.sharding=full`` and with DeepSpeed ZeRO no two ranks hold the same ranges, and nothing
    is compared.

    Raises:
        ReplicaError: on every rank; names the ranks that differ from the others.
    """
    if ranks() == 1:
        return
    kinds = sorted({name.partition(".")[0] for name in fragments})
    mine = " ".join(f"{kind}={sum_bits(fragments, kind)}" for kind in kinds)
    holders: dict[str, dict[int, str]] = defaultdict(dict)
    for rank, text in enumerate(gather_texts(f"{hash_ranges(fragments)} {mine}")):
        ranges, _, sums = text.partition(" ")
        holders[ranges][rank] = sums
    found = [
        format_difference(by_rank) for by_rank in holders.values() if len(set(by_rank.values())) > 1
    ]
    if found:
        raise ReplicaError(
            f"step {step} is not saved: {'; '.join(found)}; the optimizer keeps replicas equal to "
            "the bit, so memory, a link or a library of a machine failed; check these machines; "
            "the next launch continues from the checkpoint before"
        )


def hash_ranges(fragments: Mapping[str, Fragment]) -> int:
    """Hash the ranges that a rank holds, so that ranks with the same ranges can be grouped."""
    held = [(name, own.offset, own.local.numel()) for name, own in sorted(fragments.items())]
    return zlib.crc32(repr(held).encode())


def sum_bits(fragments: Mapping[str, Fragment], kind: str) -> int:
    """Sum the bit patterns of one kind of tensors (``model``, ``momentum``, a moment)."""
    bits = [
        own.local.view(torch.int32).sum(dtype=torch.int64)
        for name, own in fragments.items()
        if name.partition(".")[0] == kind and own.local.numel()
    ]
    return int(torch.stack(bits).sum()) if bits else 0


def format_difference(by_rank: Mapping[int, str]) -> str:
    """Name the ranks whose sums differ from the majority, and the kinds of tensors."""

    def join_ranks(some: Iterable[int]) -> str:
        return ", ".join(map(str, some))

    (usual, count), *_ = Counter(by_rank.values()).most_common()
    kinds = {
        one.partition("=")[0]
        for sums in by_rank.values()
        for one in set(sums.split()) ^ set(usual.split())
    }
    text = f"differ in {', '.join(sorted(kinds))}"
    if 2 * count <= len(by_rank):
        return f"replicas on ranks {join_ranks(by_rank)} {text}, and there is no majority"
    others = [rank for rank, sums in by_rank.items() if sums != usual]
    rest = [rank for rank in by_rank if rank not in others]
    return f"replicas on ranks {join_ranks(others)} {text} from those on {join_ranks(rest)}"


def choose_readers(fragments: Mapping[str, Fragment]) -> dict[str, int]:
    """Return by tensor the rank that reads it at a load, for all ranks that hold the same range.

    These ranks take turns, from the largest tensor to the smallest, so that all read about equally
    many values at the same time.
    """
    turns: Counter[dist.ProcessGroup | None] = Counter()
    readers: dict[str, int] = {}
    for name in sorted(fragments, key=lambda name: -math.prod(fragments[name].shape)):
        group = fragments[name].copies
        holders = [own_rank()] if group is None else dist.get_process_group_ranks(group)
        readers[name] = holders[turns[group] % len(holders)]
        turns[group] += 1
    return readers


def broadcast_copies(fragments: Mapping[str, Fragment], readers: Mapping[str, int]) -> None:
    """Send what one rank has read to the ranks that hold the same range; a collective."""
    for name, reader in readers.items():
        own = fragments[name]
        if own.copies is not None and ranks(own.copies) > 1 and own.local.numel():
            broadcast_tensor(own.local, reader, own.copies)
