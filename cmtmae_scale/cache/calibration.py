"""The calibration of a cache, and how a cache is begun: once, whoever comes first."""

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save_file

from cmtmae_scale.cache.claim import once
from cmtmae_scale.cache.codecs import Calibration
from cmtmae_scale.cache.format import MANIFEST, Manifest, manifest_text, read_manifest
from cmtmae_scale.cache.identity import check_identity, warn_of_provenance
from cmtmae_scale.errors import CacheError
from cmtmae_scale.runtime.storage import digest, sync

logger = logging.getLogger(__name__)

CLAIM = ".calibrating"


def calibration_path(folder: Path, sha256: str) -> Path:
    """File of a calibration; its name tells its content."""
    return folder / f"calibration-{sha256[:16]}.safetensors"


def load_calibration(folder: Path, manifest: Manifest) -> Calibration | None:
    """Read what int8 features were standardised with; ``None`` where the codec has none.

    Raises:
        CacheError: if the file is absent or not the one that the manifest names.
    """
    if manifest.calibration_sha256 is None:
        return None
    path = calibration_path(folder, manifest.calibration_sha256)
    try:
        if digest(path) != manifest.calibration_sha256:
            raise ValueError("it differs from its digest")
        tensors = load(path.read_bytes())
        found = Calibration(tensors["mean"], tensors["std"])
        if any(one.shape != (manifest.width,) for one in found):
            raise ValueError("its shape is not that of the features")
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CacheError(
            f"cache.dir={folder}: {path.name} cannot be trusted ({error}); delete the folder and "
            "build it again"
        ) from error
    return found


def begin(
    folder: Path, wanted: Manifest, calibrate: Callable[[Callable[[], None]], Calibration]
) -> Manifest:
    """Begin a cache, or join one that was begun.

    Args:
        folder: ``cache.dir``.
        wanted: the manifest, without its calibration.
        calibrate: makes the calibration; calls its argument now and then. Not called if another
            process has published one, which is waited for.

    Raises:
        CacheError: if the folder holds another cache, or cannot be written.
    """
    try:
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        return once(
            folder / CLAIM,
            lambda: find(folder, wanted),
            lambda live: publish(folder, wanted, calibrate, live),
        )
    except OSError as error:
        raise CacheError(
            f"cache.dir={folder}: cannot be written ({error.strerror}); name another folder"
        ) from error


def find(folder: Path, wanted: Manifest) -> Manifest | None:
    """The manifest of a cache that was begun, if it is the wanted one."""
    if not (folder / MANIFEST).exists():
        return None
    found = read_manifest(folder)
    check_identity(found, wanted.fingerprint, str(folder))
    for field in ("codec", "num_rows", "rows_a_part", "patches", "tokens", "width"):
        before, after = getattr(found, field), getattr(wanted, field)
        if before != after:
            raise CacheError(
                f"cache.dir={folder}: was begun with {field}={before}, now it is {after}; restore "
                "it or name another folder"
            )
    warn_of_provenance(found, wanted.recorded, str(folder))
    return found


def publish(
    folder: Path,
    wanted: Manifest,
    calibrate: Callable[[Callable[[], None]], Calibration],
    live: Callable[[], None],
) -> Manifest:
    """Calibrate, and make the manifest appear whole, unless somebody was faster."""
    sha256 = None
    if wanted.codec == "int8" and wanted.tokens:
        sha256 = save_calibration(folder, calibrate(live))
    manifest = replace(wanted, calibration_sha256=sha256)
    draft = folder / f".{MANIFEST}.{os.getpid()}"
    draft.write_text(manifest_text(manifest))
    sync(draft)
    try:
        os.link(draft, folder / MANIFEST)
    except FileExistsError:
        logger.info("%s was published by another process", folder / MANIFEST)
    finally:
        draft.unlink()
    sync(folder)
    return read_manifest(folder)


def save_calibration(folder: Path, calibration: Calibration) -> str:
    """Write a calibration; returns its digest."""
    draft = folder / f".calibration.{os.getpid()}"
    tensors: dict[str, Any] = calibration._asdict()
    save_file(tensors, draft)
    draft.chmod(0o644)  # safetensors lets nobody else read
    sync(draft)
    sha256 = digest(draft)
    draft.replace(calibration_path(folder, sha256))
    return sha256
