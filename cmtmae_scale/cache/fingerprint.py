"""Fingerprint of a cache: what its rows are computed from; compared with that of a run."""

import json
import logging
from collections.abc import Iterator
from typing import Any, Literal, cast

import torch

from cmtmae_scale import __version__
from cmtmae_scale.cache.format import Manifest
from cmtmae_scale.config.schema import Config
from cmtmae_scale.config.teachers import entry_message
from cmtmae_scale.errors import CacheError
from dataloading.index import Index
from dataloading.stream import choose_decoder

logger = logging.getLogger(__name__)

Keyed = Literal["views", "positions"]
"""Meaning of a row's number: one of K views of a sample, or a position of the run's stream."""
WEIGHTS = "teacher.weights_sha256"
CONFIG_KEYS = {
    "views.seed": "run.seed",
    "views.scale": "views.crop_scale",
    "views.ratio": "views.aspect_ratio",
    "views.flip": "views.hflip",
    "views.count": "views.views_per_image",
    "views.shuffle": "data.shuffle",
}
"""Config key of a stored field, where the names differ."""


def cache_fingerprint(
    config: Config, teacher: dict[str, object], index: Index, keyed: Keyed
) -> dict[str, Any]:
    """Return everything that a row depends on, except the codec.

    ``teacher`` is ``Teacher.fingerprint()``.
    """
    views: dict[str, Any] = {
        "seed": config.run.seed,
        "scale": list(config.views.crop_scale),
        "ratio": list(config.views.aspect_ratio),
        "flip": config.views.hflip,
        "count": config.views.views_per_image,
    }
    if keyed == "positions":
        views["shuffle"] = config.data.shuffle
    own = {key: value for key, value in teacher.items() if key != "library_version"}
    data = {"digest": index.digest, "images": len(index)}
    found = {"keyed": keyed, "teacher": own, "views": views, "data": data}
    return cast(dict[str, Any], json.loads(json.dumps(found)))  # same types as from a manifest


def check_fingerprint(manifest: Manifest, wanted: dict[str, Any], folder: str) -> None:
    """Refuse a cache whose fingerprint differs from the run's, ``wanted``.

    Raises:
        CacheError: names the first field that differs, both values and the remedy.
    """
    built, asked = dict(flatten_groups(manifest.fingerprint)), dict(flatten_groups(wanted))
    if asked.get(WEIGHTS) is None or built.get(WEIGHTS) is None:
        text = "weights not checked: their file is not available; compared by name"
        logger.warning("%s", entry_message(f"cache.dir={folder}: {text}"))
        built.pop(WEIGHTS, None)
        asked.pop(WEIGHTS, None)
    for key in sorted(built.keys() | asked.keys()):
        before, after = built.get(key), asked.get(key)
        if before != after:
            raise CacheError(
                f"cache.dir={folder}: {CONFIG_KEYS.get(key, key)}: the cache was built with "
                f"{before}, the run has {after}; change the run, build another cache, or set "
                "teacher.mode=online"
            )


def provenance(config: Config, device: torch.device) -> dict[str, Any]:
    """Return what rows depend on only slightly: versions and decoder."""
    return {
        "cmtmae_scale": __version__,
        "torch": torch.__version__,
        "decode": choose_decoder(config.data.decode, device),
    }


def warn_about_provenance(manifest: Manifest, here: dict[str, Any], folder: str) -> None:
    """Log where the provenance of a cache differs from the provenance ``here``."""
    for key in sorted(manifest.recorded.keys() & here.keys()):
        before, after = manifest.recorded[key], here[key]
        if before != after:
            text = f"cache.dir={folder}: built with {key} {before}, here is {after}"
            logger.warning("%s", entry_message(text))


def flatten_groups(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested groups by dotted name."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flatten_groups(cast(dict[str, Any], value), f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
