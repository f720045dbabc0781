"""A cache on storage: one manifest, and parts of a fixed number of rows.

``cache.dir/manifest.json`` names what the rows were computed from, and the calibration beside it;
``parts/00000012.safetensors`` holds rows ``[12 * rows_a_part, ...)`` and counts only with
``parts/00000012.json`` beside it, its size and SHA-256. A row vouches for itself: its checksum
covers its bytes, its number and the cache it belongs to, and is compared at each read.
"""

import hashlib
import json
import os
import re
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast, get_args

import torch
from torch import Tensor

from cmtmae_scale.cache.codecs import Codec
from cmtmae_scale.errors import CacheError

FORMAT = 1
ENDLESS = 1 << 62
"""``num_rows`` of a cache whose rows are the positions of a run's stream."""
MANIFEST = "manifest.json"
PARTS = "parts"


@dataclass(frozen=True)
class Manifest:
    """What a cache holds, and what it was computed from."""

    fingerprint: dict[str, Any]
    """Teacher, views, data: a run must have the same (``cache/identity.py``)."""
    recorded: dict[str, Any]
    """Decoder and versions: a difference is worth a warning."""
    codec: Codec
    """How features are stored."""
    num_rows: int
    """Rows of a finished cache; ``ENDLESS``: it is never finished."""
    rows_a_part: int
    """Rows of a part; the last one may have fewer."""
    patches: int
    """N, values of a map; 0: no maps are stored."""
    tokens: int
    """T, tokens of the features; 0: no features are stored."""
    width: int
    """F, channels of the features."""
    calibration_sha256: str | None
    """Digest of the calibration's file; ``None`` where the codec has none."""
    format: int = FORMAT

    @property
    def num_parts(self) -> int:
        """Parts of a finished cache."""
        return -(-self.num_rows // self.rows_a_part)

    @property
    def identity(self) -> int:
        """A number that the checksum of every row begins with."""
        text = json.dumps(asdict(self), sort_keys=True)
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")

    def rows_of(self, part: int) -> range:
        """Row numbers of a part."""
        first = part * self.rows_a_part
        return range(first, min(first + self.rows_a_part, self.num_rows))

    def fields(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Tensors of a part: type and shape of one row."""
        found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        if self.patches:
            found["attention"] = (torch.float16, (self.patches,))
        if self.tokens:
            stored = torch.int8 if self.codec == "int8" else torch.bfloat16
            found["features"] = (stored, (self.tokens, self.width))
            if self.codec == "int8":
                found["scales"] = (torch.float16, (self.tokens,))
        found["valid"] = (torch.uint8, ())
        found["checksum"] = (torch.int64, ())
        return found

    def row_bytes(self) -> int:
        """Bytes of a row on storage, headers apart."""
        total = 0
        for dtype, shape in self.fields().values():
            total += dtype.itemsize * int(torch.Size(shape).numel())
        return total


def part_path(folder: Path, part: int) -> Path:
    """File of a part."""
    return folder / PARTS / f"{part:08d}.safetensors"


def seal_path(folder: Path, part: int) -> Path:
    """The file that says that a part is complete."""
    return folder / PARTS / f"{part:08d}.json"


def checksum(identity: int, row: int, fields: list[memoryview]) -> int:
    """CRC-32 of a row's bytes, begun with the cache's identity and the row's number.

    Args:
        identity: ``Manifest.identity``.
        row: number of the row.
        fields: bytes of attention, features, scales and ``valid``, in the order of
            ``Manifest.fields``.
    """
    value = zlib.crc32(row.to_bytes(8, "little"), identity)
    for field in fields:
        value = zlib.crc32(field, value)
    return value


def row_bytes_of(field: Tensor, row: int) -> memoryview:
    """Bytes of one row of a contiguous tensor on the CPU; live memory."""
    array: Any = field[row : row + 1].view(torch.uint8).numpy()
    return memoryview(array).cast("B")


def read_manifest(folder: Path) -> Manifest:
    """Read and check a manifest.

    Raises:
        CacheError: an absent or damaged manifest, or a folder that others may write to.
    """
    refuse_open_folder(folder)
    path = folder / MANIFEST
    try:
        tree = json.loads(path.read_text())
        stored = tree.pop("sha256")
        found = Manifest(**tree)
        if stored != digest_of(found):
            raise ValueError("it differs from its own digest")
        check_types(found)
        if found.format != FORMAT:
            raise ValueError(f"its format is {found.format}, this version reads {FORMAT}")
    except FileNotFoundError as error:
        raise CacheError(
            f"cache.dir={folder}: holds no {MANIFEST}; build it with "
            "launchers/precompute_teacher.py, or set teacher.mode=online"
        ) from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CacheError(
            f"cache.dir={folder}: {MANIFEST} cannot be trusted ({error}); delete the folder and "
            "build it again"
        ) from error
    return found


def check_types(manifest: Manifest) -> None:
    """Refuse a manifest whose values nothing could work with.

    Raises:
        ValueError: naming the field.
    """
    for name, lowest in (("num_rows", 1), ("rows_a_part", 1), ("patches", 0), ("tokens", 0)):
        value = getattr(manifest, name)
        if type(value) is not int or value < lowest:
            raise ValueError(f"{name} is {value!r}")
    if type(manifest.width) is not int or manifest.width < bool(manifest.tokens):
        raise ValueError(f"width is {manifest.width!r}")
    if manifest.codec not in get_args(Codec):
        raise ValueError(f"codec is {manifest.codec!r}")
    calibrated = manifest.codec == "int8" and manifest.tokens > 0
    sha256: object = manifest.calibration_sha256
    named = isinstance(sha256, str) and re.fullmatch(r"[0-9a-f]{64}", sha256) is not None
    if named != calibrated or (sha256 is None) == calibrated:
        raise ValueError(f"calibration_sha256 is {sha256!r}")
    for name in ("fingerprint", "recorded"):
        if not isinstance(getattr(manifest, name), dict):
            raise ValueError(f"{name} is no group of values")


def digest_of(manifest: Manifest) -> str:
    """SHA-256 of a manifest's content."""
    return hashlib.sha256(json.dumps(asdict(manifest), sort_keys=True).encode()).hexdigest()


def manifest_text(manifest: Manifest) -> str:
    """A manifest as it is written, with its own digest."""
    return json.dumps({**asdict(manifest), "sha256": digest_of(manifest)}, indent=1)


def refuse_open_folder(folder: Path) -> None:
    """Refuse a cache that anyone may write to: what it says would be anyone's word.

    Raises:
        CacheError: naming the folder and the remedy.
    """
    try:
        mode = os.stat(folder).st_mode
    except OSError as error:
        raise CacheError(f"cache.dir={folder}: cannot be opened ({error.strerror})") from error
    if mode & 0o002:
        raise CacheError(f"cache.dir={folder}: everyone may write to it; run chmod o-w {folder}")


class Seal(NamedTuple):
    """What makes a part count."""

    size: int
    sha256: str


def read_seal(folder: Path, part: int) -> Seal | None:
    """The seal of a part, or ``None`` where the part is not complete."""
    try:
        tree = cast(dict[str, Any], json.loads(seal_path(folder, part).read_text()))
        return Seal(int(tree["size"]), str(tree["sha256"]))
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
