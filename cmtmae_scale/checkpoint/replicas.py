"""Tensors that several ranks hold must be the same bits on all of them, or none is worth saving."""

import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

import torch

from cmtmae_scale.backends.base import Fragment
from cmtmae_scale.errors import ReplicaError
from cmtmae_scale.runtime.collectives import ranks, texts_of_all


def refuse_differences(step: int, fragments: Mapping[str, Fragment]) -> None:
    """Compare the fragments of ranks that hold the same ones; a collective.

    A rank's bits are summed as integers: one bit more or less always shows. With
    ``backend.sharding=full`` and DeepSpeed ZeRO no two ranks hold the same, and nothing is compared.

    Args:
        step: for the message.
        fragments: this rank's part of every tensor.

    Raises:
        ReplicaError: on every rank, naming the ranks that stand against the others.
    """
    if ranks() == 1:
        return
    kinds = sorted({name.partition(".")[0] for name in fragments})
    mine = " ".join(f"{kind}={checksum(fragments, kind)}" for kind in kinds)
    holders: dict[str, dict[int, str]] = defaultdict(dict)
    for rank, text in enumerate(texts_of_all(f"{place_of(fragments)} {mine}")):
        place, _, sums = text.partition(" ")
        holders[place][rank] = sums
    told = [difference(by_rank) for by_rank in holders.values() if len(set(by_rank.values())) > 1]
    if told:
        raise ReplicaError(
            f"step {step} is not saved: {'; '.join(told)}; the optimizer keeps them equal to the "
            "bit, so memory, a link or a library of a machine failed; look at these machines; the "
            "next start continues from the checkpoint before"
        )


def place_of(fragments: Mapping[str, Fragment]) -> int:
    """A number for the ranges of the tensors that a rank holds."""
    held = [(name, part.offset, part.local.numel()) for name, part in sorted(fragments.items())]
    return zlib.crc32(repr(held).encode())


def checksum(fragments: Mapping[str, Fragment], kind: str) -> int:
    """Sum of the bit patterns of one kind of tensors (``model``, ``momentum``, a moment)."""
    bits = [
        part.local.view(torch.int32).sum(dtype=torch.int64)
        for name, part in fragments.items()
        if name.partition(".")[0] == kind and part.local.numel()
    ]
    return int(torch.stack(bits).sum()) if bits else 0


def difference(by_rank: Mapping[int, str]) -> str:
    """Say which of the ranks that hold the same tensors differ, and in what."""

    def named(some: Iterable[int]) -> str:
        return ", ".join(map(str, some))

    (usual, count), *_ = Counter(by_rank.values()).most_common()
    kinds = {
        one.partition("=")[0]
        for sums in by_rank.values()
        for one in set(sums.split()) ^ set(usual.split())
    }
    text = f"differ in {', '.join(sorted(kinds))}"
    if 2 * count <= len(by_rank):
        return f"replicas on ranks {named(by_rank)} {text}, and no majority tells which is right"
    others = [rank for rank, sums in by_rank.items() if sums != usual]
    rest = [rank for rank in by_rank if rank not in others]
    return f"replicas on ranks {named(others)} {text} from those on {named(rest)}"
