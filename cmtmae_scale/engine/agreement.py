"""Checks that all ranks of a launch have the same settings, code, images, weights and folder."""

import hashlib
import json
import os
import platform
import secrets
import socket
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import cmtmae_scale
import dataloading
from cmtmae_scale.config.changes import flatten
from cmtmae_scale.config.load import config_to_dict
from cmtmae_scale.config.schema import Trained
from cmtmae_scale.errors import ConfigError, may_pass
from cmtmae_scale.runtime.collectives import (
    all_ranks_agree,
    broadcast_text,
    gather_texts,
    on_all_ranks,
    ranks,
)
from cmtmae_scale.runtime.launch import World
from cmtmae_scale.runtime.lock import describe_unusable
from cmtmae_scale.runtime.versions import library_versions
from dataloading.index import Index

SHARED_WAIT_S = 10.0
"""Seconds in which a file of rank 0 must become visible; a network file system may cache names."""
NUMERIC_VARIABLES = (
    "CUBLAS_WORKSPACE_CONFIG",
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
)
"""Environment variables that change what a GPU computes."""
DECODING_PACKAGES = (
    *("numpy", "pillow", "torchvision", "nvidia-dali-cuda130", "nvidia-dali-cuda120"),
    *("nvidia-nvimgcodec-cu13", "nvidia-nvimgcodec-cu12"),
)
"""Packages whose version, or absence on a rank, changes views."""
REMEDY = "launch every rank with the same recipe, overrides, environment and installation"
MOST_NAMED = 8
"""Maximum number of settings or ranks that a message names."""


def launch_facts(config: Trained, world: World, device: torch.device) -> dict[str, Any]:
    """Return what must be equal on all ranks before anything is built, by key.

    Args:
        config: checked settings.
        world: place of this process.
        device: device of this rank; only its type must be equal.
    """
    facts = flatten(config_to_dict(config)) | {"world size": world.world_size}
    return facts | code_facts(device)


def code_facts(device: torch.device) -> dict[str, Any]:
    """Return what computes on this rank: versions, source code, environment and kind of device."""
    versions: dict[str, str | None] = {**library_versions(), "Python": platform.python_version()}
    for package in DECODING_PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    facts: dict[str, Any] = {f"version of {name}": found for name, found in versions.items()}
    facts |= {"source code": source_digest()[:12], "device": device.type}
    return facts | {name: os.environ.get(name) for name in NUMERIC_VARIABLES}


def source_digest() -> str:
    """Return the SHA-256 of the source code of this package and of ``dataloading``."""
    total = hashlib.sha256()
    for package in (cmtmae_scale, dataloading):
        root = Path(package.__path__[0])
        for path in sorted(root.rglob("*.py")):
            total.update(f"{path.relative_to(root).as_posix()}\0".encode())
            total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def require_equal(facts: Mapping[str, Any], remedy: str) -> None:
    """Compare facts over all ranks; a collective.

    Args:
        facts: plain values by key.
        remedy: what to do if they differ.

    Raises:
        ConfigError: on every rank; names the keys that differ, their values and the ranks.
    """
    if ranks() == 1:
        return
    text = json.dumps(facts, sort_keys=True, default=str)
    if len(set(gather_texts(hashlib.sha256(text.encode()).hexdigest()))) == 1:
        return
    everyone = [json.loads(one) for one in gather_texts(text)]
    found = find_differences(everyone)
    more = f"; and {len(found) - MOST_NAMED} more" if len(found) > MOST_NAMED else ""
    raise ConfigError(f"the ranks differ in {'; '.join(found[:MOST_NAMED])}{more}; {remedy}")


def find_differences(everyone: list[dict[str, Any]]) -> list[str]:
    """Return a text per key whose value is not the same on every rank.

    Args:
        everyone: facts of every rank, in rank order.
    """
    found: list[str] = []
    for key in sorted({key for facts in everyone for key in facts}):
        holders: dict[str, list[int]] = defaultdict(list)
        for rank, facts in enumerate(everyone):
            value = json.dumps(facts[key]) if key in facts else "absent"
            holders[value].append(rank)
        if len(holders) > 1:
            values = [f"{value} on {name_ranks(who)}" for value, who in holders.items()]
            more = ["other values"] if len(values) > MOST_NAMED else []
            found.append(f"{key}: {', '.join(values[:MOST_NAMED] + more)}")
    return found


def name_ranks(some: Iterable[int]) -> str:
    """Return ranks as text, such as ``ranks 1, 3 and 12 more``."""
    listed = list(some)
    if len(listed) == 1:
        return f"rank {listed[0]}"
    rest = len(listed) - MOST_NAMED
    shown = ", ".join(map(str, listed[:MOST_NAMED]))
    return f"ranks {shown}" + (f" and {rest} more" if rest > 0 else "")


def require_equal_launch(config: Trained, world: World, device: torch.device) -> None:
    """Compare settings, code and environment over all ranks; a collective.

    Raises:
        ConfigError: see ``require_equal``.
    """
    if ranks() > 1:
        require_equal(launch_facts(config, world, device), REMEDY)
        if config.backend.name == "fsdp" and config.backend.sharding == "hybrid":
            require_equal_nodes(world)


def require_equal_nodes(world: World) -> None:
    """Refuse nodes that ``backend.sharding=hybrid`` would not shard within; a collective.

    Raises:
        ConfigError: on every rank, if nodes have different numbers of ranks, or the ranks of a node
            are not consecutive.
    """
    remedy = "or use backend.sharding=full or replicate"
    require_equal(
        {"ranks on the node": world.local_world_size},
        "backend.sharding=hybrid needs the same number of ranks on each node: correct the launch, "
        f"{remedy}",
    )
    if not all_ranks_agree(world.rank % world.local_world_size == world.local_rank):
        raise ConfigError(
            "backend.sharding=hybrid: the ranks of a node are not consecutive, so that each shard "
            "group would span nodes; number ranks node by node (srun --distribution=block), "
            f"{remedy}"
        )


def require_equal_images(index: Index, path: str) -> None:
    """Compare number and digest of the images over all ranks; a collective.

    Args:
        index: this rank's index.
        path: ``data.path``.

    Raises:
        ConfigError: see ``require_equal``.
    """
    require_equal(
        {"number of images": len(index), "digest of the images": index.digest[:12]},
        f"data.path={path} must hold the same images on every machine: copy them again",
    )


def require_equal_weights(describe: Callable[[], Mapping[str, Any]]) -> None:
    """Compare the sources of weights over all ranks; a collective.

    Args:
        describe: returns plain facts, such as digests of files, by their names in messages; called
            only if there are several ranks.

    Raises:
        ConfigError: see ``require_equal``.
    """
    if ranks() > 1:
        require_equal(
            describe(), "the same file of weights must be on every machine: copy it again"
        )


def require_shared(run_dir: Path, rank: int) -> str:
    """Verify that every rank sees the folder that rank 0 writes to; a collective.

    Rank 0 creates an empty file with a random name, which needs no space, in the run's folder and
    in its checkpoints, which may be a link to other storage. Every rank lists the folders.

    Args:
        run_dir: the run's folder; rank 0 may write to it.
        rank: this rank.

    Returns:
        A random name of this launch, the same on every rank.

    Raises:
        ConfigError: on every rank; names the hosts that do not see the file, or the folder that
            cannot be written.
        StorageError: on every rank, if the store is full or fails.
    """
    token = broadcast_text(secrets.token_hex(8))
    folders = [run_dir, run_dir / "checkpoints"]
    name = f".shared-{token}"

    def create() -> None:
        try:
            folders[1].mkdir(exist_ok=True)
            for folder in folders:
                (folder / name).touch()
        except OSError as error:
            raise describe_unusable(run_dir, error) from error

    try:
        on_all_ranks(create if rank == 0 else lambda: None)
        unseen = on_all_ranks(lambda: find_unshared(folders, name))
        mine = {"host": socket.gethostname(), "blind": unseen}
        everyone = [json.loads(text) for text in gather_texts(json.dumps(mine))]
    finally:
        if rank == 0:
            for folder in folders:
                with suppress(OSError):  # the other ranks continue; an empty file may remain
                    (folder / name).unlink()
    blind = {number: one for number, one in enumerate(everyone) if one["blind"]}
    if blind:
        hosts = sorted({one["host"] for one in blind.values()})
        folder = next(iter(blind.values()))["blind"]
        more = f" and {len(hosts) - MOST_NAMED} more" if len(hosts) > MOST_NAMED else ""
        raise ConfigError(
            f"run.output_dir={run_dir} is not shared: a file that rank 0 on host "
            f"{everyone[0]['host']} wrote to {folder} is not visible to {name_ranks(blind)} on "
            f"host {', '.join(hosts[:MOST_NAMED])}{more}; set run.output_dir to an absolute path "
            "on storage that all machines share"
        )
    return token


def find_unshared(folders: list[Path], name: str) -> str | None:
    """Return the first folder in which a file does not appear within ``SHARED_WAIT_S``.

    Raises:
        OSError: if the store fails on this machine for that long, so that it is unknown whether the
            folder is shared.
    """
    limit = time.monotonic() + SHARED_WAIT_S
    for folder in folders:
        while not is_listed_in(folder, name, is_last := time.monotonic() > limit):
            if is_last:
                return str(folder)
            time.sleep(0.2)
    return None


def is_listed_in(folder: Path, name: str, is_last: bool) -> bool:
    """Return whether a folder lists a name; opening a folder renews what a client has cached.

    Raises:
        OSError: if the store fails at the last attempt.
    """
    try:
        return name in os.listdir(folder)
    except OSError as error:
        if is_last and may_pass(error):
            raise
        return False
