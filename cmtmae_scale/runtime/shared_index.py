"""The index of a data set, built and opened by all ranks together."""

import json
import os
import socket
from pathlib import Path

import torch.distributed as dist

from cmtmae_scale.runtime.collectives import (
    broadcast_text,
    gather_texts,
    on_all_ranks,
    on_all_ranks_for_long,
    ranks,
)
from dataloading.addresses import is_url
from dataloading.data_set import Listing, Request
from dataloading.index import Index
from dataloading.kept_index import (
    Verify,
    build_kept,
    find_kept,
    help_index,
    open_kept,
    require_files,
    share_listing,
)


def open_on_all_ranks(
    request: Request, folder: Path, verify: Verify, recheck_excluded: bool = True
) -> Index:
    """Let rank 0 find or build an index, with the help of all ranks; open it on every rank.

    For each machine and folder of the path other than rank 0's, one rank compares names and sizes
    of the files with those that rank 0 accepted; the other ranks open the index. No rank builds an
    index that rank 0 accepted. This may take longer than the time limit of a collective. A
    collective.

    Args:
        request: the data set of the index.
        folder: folder that keeps the index, for all ranks.
        verify: as for ``load_or_build``.
        recheck_excluded: whether images that could not be read before are tried again; a run that
            resumes keeps the images that it began with.

    Raises:
        DataError: on every rank, if the images cannot be used on one, or differ.
        ReadError: on every rank, if storage fails on one for longer than reads are retried.
    """
    rank, world_size = (dist.get_rank(), ranks()) if ranks() > 1 else (0, 1)
    first = on_all_ranks_for_long(
        lambda: begin_index(request, folder, verify, recheck_excluded) if rank == 0 else None
    )
    kept, listing = first if first is not None else (None, None)
    facts = [kept is not None, listing.digest(with_times=False) if listing is not None else None]
    is_kept, contents = json.loads(broadcast_text(json.dumps(facts)))
    places = gather_texts(f"{socket.gethostname()} {identify_place(request.path)}")
    checks = places.index(places[rank]) == rank != 0 and not is_url(request.path)
    if contents is not None and verify != "never":
        on_all_ranks_for_long(lambda: require_files(request, contents) if checks else None)
    if not is_kept:
        on_all_ranks_for_long(lambda: help_index(request, folder, (rank, world_size)))
    index = on_all_ranks_for_long(
        lambda: build_kept(listing, folder) if listing is not None and kept is None else kept
    )
    agreed = [index.digest, index.list_shards()] if index is not None else None
    digest, shards = json.loads(broadcast_text(json.dumps(agreed)))
    return on_all_ranks(
        lambda: open_kept(request.path, folder, digest, shards) if index is None else index
    )


def begin_index(
    request: Request, folder: Path, verify: Verify, recheck_excluded: bool
) -> tuple[Index | None, Listing | None]:
    """Return the index that may be used, or share the listing to build it from; rank 0 does."""
    kept, listing = find_kept(request, folder, verify, recheck_excluded)
    if kept is None and listing is not None and ranks() > 1:
        share_listing(listing, folder)
    return kept, listing


def identify_place(path: Path | str) -> str:
    """Return device and inode of a folder or file; for a pattern, those of its folder.

    An address is returned as it is. A path that cannot be accessed counts as absent: the listing
    reports the reason on all ranks, but a rank that failed here would leave the others waiting.
    """
    if isinstance(path, str):
        return path
    while not os.path.exists(path) and path != path.parent:
        path = path.parent
    found = path.stat()
    return f"{found.st_dev} {found.st_ino}"
