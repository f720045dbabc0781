"""The statistics that int8 features were stored with."""

import hashlib
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load

from cmtmae_scale.cache.codecs import Calibration
from cmtmae_scale.cache.format import CALIBRATION, Manifest
from cmtmae_scale.errors import CacheError


def load_calibration(folder: Path, manifest: Manifest) -> Calibration | None:
    """Read and check the calibration of a cache.

    Args:
        folder: ``cache.dir``.
        manifest: the cache's.

    Returns:
        Mean and deviation, ``[F]`` float32 on the CPU, or ``None`` where the codec needs none.

    Raises:
        CacheError: an absent file, or one that the manifest does not mean.
    """
    if manifest.codec != "int8" or not manifest.tokens:
        return None
    try:
        data = (folder / CALIBRATION).read_bytes()
        if hashlib.sha256(data).hexdigest() != manifest.calibration_sha256:
            raise ValueError("it differs from its digest in the manifest")
        tensors = load(data)
        found = Calibration(tensors["mean"].float(), tensors["std"].float())
        if any(one.shape != (manifest.width,) for one in found):
            raise ValueError(f"it is not of {manifest.width} channels")
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CacheError(
            f"cache.dir={folder}: {CALIBRATION} cannot be used ({error}); delete the folder and "
            "build it again"
        ) from error
    return found
