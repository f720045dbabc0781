"""What every form of the command needs: index and teacher, and this process's share."""

from pathlib import Path

import torch

from cmtmae_scale.cache.build import Builder
from cmtmae_scale.cache.claim import once
from cmtmae_scale.cache.format import Manifest
from cmtmae_scale.cache.identity import Keyed
from cmtmae_scale.config.derive import Needs, needs
from cmtmae_scale.config.schema import Config
from cmtmae_scale.errors import CacheError
from cmtmae_scale.runtime.launch import World
from cmtmae_scale.teachers.build import assemble, compute_dtype
from dataloading.index import Index, load_or_build


def make_builder(
    config: Config, place: Path, device: torch.device, keyed: Keyed = "views"
) -> Builder:
    """Index and teacher of a run; the index is built by one process, the others wait.

    Args:
        config: the run.
        place: folder of the index.
        device: where the teacher runs.
        keyed: what a row's number means.

    Raises:
        CacheError: if nothing can be written where the index belongs.
    """
    teacher = assemble(config, stored_needs(config), load=True).to(device, compute_dtype(config))
    return Builder(config, find_index(config, place), teacher, device, keyed)


def find_index(config: Config, place: Path) -> Index:
    """Build the index or read it.

    Raises:
        CacheError: if nothing can be written where it belongs.
    """
    try:
        return open_index(config, place)
    except OSError as error:
        raise CacheError(
            f"{place}: cannot be written ({error.strerror}); correct cache.dir or data.index"
        ) from error


def open_index(config: Config, folder: Path) -> Index:
    """Build the index or read it."""
    folder.mkdir(mode=0o755, parents=True, exist_ok=True)

    def find() -> Index | None:
        return read() if (folder / "index.json").exists() else None

    def read() -> Index:
        return load_or_build(
            config.data.path,
            folder,
            source=config.data.source,
            max_pixels=config.data.max_pixels,
        )

    return once(folder / ".indexing", find, lambda live: read())


def stored_needs(config: Config) -> Needs:
    """What of the teacher a cache stores: maps alone where the codec says so."""
    found = needs(config)
    if config.cache.codec == "attention":
        return found._replace(teacher_features=False)
    return found


def my_parts(manifest: Manifest, share: tuple[int, int], world: World) -> range:
    """This process's parts, without a word to the others."""
    first, step = my_stripe(share, world)
    return range(first, manifest.num_parts, step)


def my_stripe(share: tuple[int, int], world: World) -> tuple[int, int]:
    """Number of this process among those who share the parts, and how many they are."""
    number, of = share
    return number * world.world_size + world.rank, of * world.world_size
