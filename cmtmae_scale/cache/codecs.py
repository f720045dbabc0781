"""Storage codecs of features, their calibration, and their fidelity.

CLIP-like features have a few channels whose mean and range are far larger than those of the rest.
One scale per token would spend the whole int8 range on these channels, so int8 stores standardised
channels. The cosine of raw features hides the damage to small channels; fidelity is therefore
judged on standardised features.
"""

import errno
import hashlib
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from cmtmae_scale.errors import AGAIN, CacheError
from cmtmae_scale.runtime.storage import read_regular, write_atomic
from cmtmae_scale.teachers.base import TeacherView

Codec = Literal["int8", "bf16", "attention"]

LEVELS = 127
_SMALLEST = 2.0**-14
"""Smallest scale: float16 loses bits below it."""
_NO_FILE = frozenset({errno.ENOENT, errno.EINVAL, errno.EISDIR, errno.ELOOP, errno.EFBIG})
"""Errors of a file that is absent, is not a regular file, or is too large."""


class Calibration(NamedTuple):
    """Statistics that standardise channels, frozen when a cache is begun."""

    mean: Tensor
    """Per channel, ``[F]`` float32."""
    std: Tensor
    """Standard deviation per channel, ``[F]`` float32, above 0."""

    def to(self, device: torch.device) -> "Calibration":
        return Calibration(self.mean.to(device), self.std.to(device))


class Encoded(NamedTuple):
    """Stored features."""

    values: Tensor
    """``[B, T, F]`` int8, or bfloat16."""
    scales: Tensor | None
    """For int8, one scale per token, ``[B, T]`` float16."""


def calibrate(batches: Iterable[Tensor]) -> Calibration:
    """Compute mean and standard deviation per channel over all tokens.

    Args:
        batches: finite features ``[B, T, F]``.

    Raises:
        ValueError: if there is no token.
    """
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for features in batches:
        tokens = features.flatten(0, -2).double()
        count += len(tokens)
        total = total.to(tokens.device) + tokens.sum(0)
        squares = squares.to(tokens.device) + tokens.square().sum(0)
    if not count:
        raise ValueError("no token to calibrate with")
    mean = total / count
    std = (squares / count - mean.square()).clamp_min(0).sqrt()
    # The mean alone stores a constant channel exactly.
    std = torch.where(std > 1e-6 * std.max().clamp_min(1e-30), std, torch.ones_like(std))
    return Calibration(mean.float().cpu(), std.float().cpu())


def calibration_path(folder: Path, sha256: str) -> Path:
    """Return the calibration file, which is named by its digest."""
    return folder / f"calibration-{sha256[:16]}.safetensors"


def save_calibration(folder: Path, calibration: Calibration) -> str:
    """Write a calibration; return its SHA-256."""
    data = save(calibration._asdict())
    sha256 = hashlib.sha256(data).hexdigest()
    write_atomic(calibration_path(folder, sha256), data)
    return sha256


def load_calibration(folder: Path, sha256: str | None, width: int) -> Calibration | None:
    """Read the calibration of ``width`` channels that the manifest names by its digest, if any.

    Raises:
        CacheError: the file is absent or cannot be read, or differs from the manifest's digest.
    """
    if sha256 is None:
        return None
    path = calibration_path(folder, sha256)
    try:
        data = read_regular(path)
        if hashlib.sha256(data).hexdigest() != sha256:
            raise ValueError("it differs from its digest")
        tensors = load(data)
        found = Calibration(tensors["mean"], tensors["std"])
        if any(statistic.shape != (width,) for statistic in found):
            raise ValueError("its shape is not that of the features")
        if not all(bool(statistic.isfinite().all()) for statistic in found):
            raise ValueError("it holds values that are not finite")
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CacheError(f"cache.dir={folder}: {path.name} {explain_unusable(error)}") from error
    return found


def explain_unusable(error: Exception) -> str:
    """Return why a file of a cache cannot be used, and what to do.

    A file may be intact if the store fails or permissions are missing.
    """
    if isinstance(error, OSError) and error.errno not in _NO_FILE:
        return f"cannot be read ({error.strerror}); make it readable, and {AGAIN}"
    return f"cannot be trusted ({error}); delete the folder and build it again"


def encode(features: Tensor, codec: Codec, calibration: Calibration | None) -> Encoded:
    """Encode features for storage.

    Args:
        features: ``[B, T, F]``, finite.
        codec: ``int8`` or ``bf16``.
        calibration: for int8; on any device.
    """
    if codec == "bf16":
        return Encoded(features.to(torch.bfloat16), None)
    if codec != "int8" or calibration is None:
        raise ValueError(f"codec {codec} stores no features, or lacks its calibration")
    mean, std = calibration.to(features.device)
    standard = (features.float() - mean) / std
    scales = (standard.abs().amax(-1) / LEVELS).clamp_min(_SMALLEST).half()
    values = (standard / scales.float().unsqueeze(-1)).round_().clamp_(-LEVELS, LEVELS)
    return Encoded(values.to(torch.int8), scales)


def decode(encoded: Encoded, calibration: Calibration | None) -> Tensor:
    """Decode features ``[B, T, F]``: float32 from int8, bfloat16 as stored. No host sync.

    Args:
        encoded: on any device.
        calibration: for int8, on the same device.
    """
    if encoded.scales is None:
        return encoded.values
    if calibration is None:
        raise ValueError("int8 features need the calibration that they were stored with")
    # Two passes over the features: the product reads int8, the second writes over the first.
    standard = encoded.values * encoded.scales.float().unsqueeze(-1)
    return torch.addcmul(calibration.mean, standard, calibration.std, out=standard)


def round_features(features: Tensor, codec: Codec, calibration: Calibration | None) -> Tensor:
    """Encode and decode features ``[B, T, F]``; arguments as for both."""
    return decode(encode(features, codec, calibration), calibration)


def round_view(view: TeacherView, codec: Codec, calibration: Calibration | None) -> TeacherView:
    """Round an online view as the cache would; without calibration int8 features are unchanged.

    The calibration is on the view's device.
    """
    attention, features, _ = view
    if features is not None and (codec == "bf16" or calibration is not None):
        features = round_features(features, codec, calibration)
    return TeacherView(None if attention is None else attention.half().float(), features)


class Fidelity(NamedTuple):
    """Cosine of stored and online features per token: mean, 1st percentile, minimum."""

    raw: tuple[float, float, float]
    standardised: tuple[float, float, float]


def measure_fidelity(online: Tensor, stored: Tensor, calibration: Calibration) -> Fidelity:
    """Compare features ``[B, T, F]``, raw and standardised."""
    raw, standardised = token_cosines(online, stored, calibration)
    return Fidelity(summarise_cosines(raw), summarise_cosines(standardised))


def token_cosines(
    online: Tensor, stored: Tensor, calibration: Calibration
) -> tuple[Tensor, Tensor]:
    """Return the cosine per token of features ``[B, T, F]``, raw and standardised, 1-D float64."""
    mean, std = calibration.to(online.device)
    online, stored = online.float(), stored.float()
    pairs = (online, stored), ((online - mean) / std, (stored - mean) / std)
    raw, standardised = (
        torch.cosine_similarity(ours.double(), kept.double(), dim=-1).flatten()
        for ours, kept in pairs
    )
    return raw, standardised


def summarise_cosines(cosines: Tensor) -> tuple[float, float, float]:
    """Return mean, 1st percentile and minimum of cosines; NaN if any is NaN."""
    found = cosines.sort().values
    if bool(found[-1].isnan()):  # NaN is sorted last, where percentile and minimum may miss it
        return math.nan, math.nan, math.nan
    return float(found.mean()), float(found[len(found) // 100]), float(found[0])


class Bounds(NamedTuple):
    """Differences that rounding explains."""

    cosine: float
    """Minimum mean cosine of standardised features."""
    distance: float
    """Maximum mean total variation distance of attention maps, 0 to 1."""


BOUNDS = {torch.float32: Bounds(0.999, 0.001), torch.bfloat16: Bounds(0.99, 0.05)}
"""By the teacher's compute dtype. float32: rounding by the codec alone (int8: about 0.9999; float16
attention: 0.0003). bfloat16: two forwards of one teacher in other batches or on another device
differ by rounding of 1 part in 256 per operation. Another teacher, crop or image is far outside."""


class Agreement(NamedTuple):
    """Difference of online and stored views."""

    cosine: float | None
    """Mean over tokens, of standardised features; ``None``: no features."""
    distance: float | None
    """Mean total variation distance of attention maps; ``None``: no attention."""

    def within(self, bounds: Bounds) -> bool:
        """Return whether rounding explains the difference; it does not explain NaN."""
        features = self.cosine is None or self.cosine >= bounds.cosine
        return features and (self.distance is None or self.distance <= bounds.distance)

    def __str__(self) -> str:
        numbers = [] if self.cosine is None else [f"standardised cosine {self.cosine:.5f}"]
        if self.distance is not None:
            numbers.append(f"distance of attention maps {self.distance:.5f}")
        return ", ".join(numbers)


def measure_agreement(
    online: TeacherView, stored: TeacherView, rows: list[int], calibration: Calibration | None
) -> Agreement:
    """Compare some rows of two views of a batch. Synchronises with the host.

    Args:
        online: the teacher's view.
        stored: the cache's view.
        rows: indices in the batch, at least one.
        calibration: standardises channels; ``None``: the online features' own statistics.
    """
    cosine = distance = None
    if online.features is not None and stored.features is not None:
        ours, kept = (features[rows].float() for features in (online.features, stored.features))
        cosine = measure_fidelity(ours, kept, calibration or calibrate([ours])).standardised[0]
    if online.attention is not None and stored.attention is not None:
        difference = online.attention[rows].float() - stored.attention[rows].float()
        distance = float(difference.abs().sum(-1).mean()) / 2
    return Agreement(cosine, distance)
