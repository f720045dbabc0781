"""On-disk format of a teacher cache: one manifest, and shards of a fixed number of rows.

``cache.dir/manifest.json`` records what the rows are computed from. The calibration file is beside
it. ``parts/00001/00001234.safetensors`` holds rows ``[1234 * rows_per_shard, ...)``. A shard gets
this name when it is complete, so that listing the folders finds the complete shards, and its header
holds its seal: the SHA-256 of the file with zeros in place of these 64 digits. The checksum of a
row covers its bytes, its number and the identity of the cache, and is verified at every read.

Format 1, which is read and continued, has all shards in ``parts``. A shard counts with its seal
beside it: ``parts/00000012.json``, size and SHA-256.
"""

import errno
import hashlib
import json
import logging
import os
import re
import time
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from cmtmae_scale.cache.codecs import Codec, explain_unusable
from cmtmae_scale.errors import CacheError, remedy_for
from cmtmae_scale.runtime.storage import (
    atomic_path,
    digest,
    read_json,
    read_regular,
    sync,
    write_atomic,
)
from dataloading.files import open_regular

logger = logging.getLogger(__name__)

FORMAT = 2
FORMATS = (1, FORMAT)
"""Formats that are read."""
ENDLESS = 1 << 62
"""``num_rows`` of a cache whose rows are the positions of a run's stream."""
MANIFEST = "manifest.json"
SHARDS = "parts"
SHARDS_PER_FOLDER = 1000
SUFFIX = ".safetensors"
HEADER_LIMIT = 1 << 20
NO_DIGEST = b"0" * 64
SEAL_SUFFIX = ".json"
DRAFT = re.compile(r"\.\d{8,}\.(?:safetensors|json)\.[0-9a-f]{8}\.tmp")
"""Name of what ``atomic_path`` writes before a shard, or a seal of format 1, gets its name."""
ABANDONED_S = 600.0
"""Age of a draft that no process will finish, seconds."""
SEAL_BYTES = 4096
"""Largest seal of format 1 that is read."""
STORED_NAMES = {"rows_per_shard": "rows_a_part"}
"""Fields whose name in ``manifest.json`` differs."""


@dataclass(frozen=True)
class Manifest:
    """Content of a cache, and what it is computed from."""

    fingerprint: dict[str, Any]
    """Teacher, views and data; a run must have the same (``cache/fingerprint.py``)."""
    recorded: dict[str, Any]
    """Provenance: decoder and versions; a difference causes a warning."""
    codec: Codec
    """How features are stored."""
    num_rows: int
    """Rows of a complete cache; ``ENDLESS``: the cache is never complete."""
    rows_per_shard: int
    """Rows of a shard; the last shard may have fewer."""
    patches: int
    """N, values of an attention map; 0: no attention is stored."""
    tokens: int
    """T, tokens of the features; 0: no features are stored."""
    width: int
    """F, channels of the features."""
    calibration_sha256: str | None
    """SHA-256 of the calibration file; ``None``: the codec has none."""
    format: int = FORMAT

    def to_dict(self) -> dict[str, Any]:
        return {STORED_NAMES.get(name, name): value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Self:
        """Build a manifest from stored names.

        Raises:
            TypeError: a field is missing or unknown.
        """
        names = {stored: name for name, stored in STORED_NAMES.items()}
        return cls(**{names.get(stored, stored): value for stored, value in tree.items()})

    @property
    def sha256(self) -> str:
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    @cached_property
    def identity(self) -> int:
        """Initial value of every row's checksum: the first four bytes of ``sha256``."""
        return int(self.sha256[:8], 16)

    @property
    def num_shards(self) -> int:
        """Shards of a complete cache."""
        return -(-self.num_rows // self.rows_per_shard)

    def shard_rows(self, shard: int) -> range:
        first = shard * self.rows_per_shard
        return range(first, min(first + self.rows_per_shard, self.num_rows))

    def fields(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Return dtype and shape per row of each tensor of a shard."""
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
        """Return the stored bytes per row, without headers."""
        return sum(
            dtype.itemsize * torch.Size(shape).numel() for dtype, shape in self.fields().values()
        )

    def empty_rows(self, count: int, pin_memory: bool = False) -> dict[str, Tensor]:
        """Return uninitialised tensors for ``count`` rows, on the CPU."""
        return {
            name: torch.empty((count, *shape), dtype=dtype, pin_memory=pin_memory)
            for name, (dtype, shape) in self.fields().items()
        }


def shard_path(folder: Path, manifest: Manifest, shard: int) -> Path:
    """Return the file of a shard."""
    name = f"{shard:08d}{SUFFIX}"
    if manifest.format == 1:
        return folder / SHARDS / name
    return folder / SHARDS / f"{shard // SHARDS_PER_FOLDER:05d}" / name


def shard_exists(folder: Path, manifest: Manifest, shard: int) -> bool:
    """Return whether a shard is complete."""
    path = shard_path(folder, manifest, shard)
    return os.path.exists(path) and (manifest.format > 1 or os.path.exists(old_seal_path(path)))


def list_shards(place: Path, suffix: str = SUFFIX) -> set[int]:
    """Return the complete shards in one folder of shards; none if it is absent.

    Raises:
        OSError: if it cannot be listed.
    """
    try:
        names = os.listdir(place)
    except FileNotFoundError:
        return set()
    stems = (name.removesuffix(suffix) for name in names if name.endswith(suffix))
    return {int(stem) for stem in stems if stem.isdecimal()}


def list_shard_folders(folder: Path) -> list[Path]:
    """Return the sub-folders of a cache that hold shards.

    Raises:
        CacheError: if they cannot be listed.
    """
    try:
        with os.scandir(folder / SHARDS) as entries:
            return [Path(entry) for entry in entries if entry.name.isdecimal() and entry.is_dir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise listing_error(folder, error) from error


def listing_error(folder: Path, error: OSError) -> CacheError:
    """Return the error of a folder in a cache that cannot be listed."""
    return CacheError(
        f"cache.dir={folder}: {error.filename} cannot be listed ({error.strerror}); "
        f"{remedy_for(error, 'correct its permissions')}"
    )


def row_checksum(identity: int, row: int, fields: list[memoryview]) -> int:
    """Compute the CRC-32 of a row from its bytes in the order of ``Manifest.fields``."""
    value = zlib.crc32(row.to_bytes(8, "little"), identity)
    for field in fields:
        value = zlib.crc32(field, value)
    return value


def row_memory(field: Tensor, row: int) -> memoryview:
    """Return one row of a contiguous CPU tensor as writable bytes that share its memory."""
    array: Any = field[row : row + 1].view(torch.uint8).numpy()
    return memoryview(array).cast("B")


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of a cache.

    Raises:
        CacheError: the manifest is absent, damaged or cannot be read, or everyone may write to
            the folder or to its shards.
    """
    for place in (folder, folder / SHARDS, *list_shard_folders(folder)):
        refuse_world_writable(place)
    try:
        tree = read_json(read_regular(folder / MANIFEST))
        if not {"num_rows", "fingerprint"} & set(tree):
            raise CacheError(
                f"cache.dir={folder}: {MANIFEST} is not that of a cache; name another folder"
            )
        stored = tree.pop("sha256")
        found = Manifest.from_dict(tree)
        if stored != found.sha256:
            raise ValueError("it differs from its own digest")
        check_manifest(found)
        if found.format not in FORMATS:
            raise ValueError(f"its format is {found.format}, this version reads {FORMATS}")
    except FileNotFoundError as error:
        raise CacheError(
            f"cache.dir={folder}: holds no {MANIFEST}; build it with "
            "cmtmae precompute, or set teacher.mode=online"
        ) from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CacheError(f"cache.dir={folder}: {MANIFEST} {explain_unusable(error)}") from error
    return found


def check_manifest(manifest: Manifest) -> None:
    """Refuse a manifest with illegal values.

    Raises:
        ValueError: names the field.
    """
    for name, lowest in (("num_rows", 1), ("rows_per_shard", 1), ("patches", 0), ("tokens", 0)):
        value = getattr(manifest, name)
        if type(value) is not int or value < lowest:
            raise ValueError(f"{name} is {value!r}")
    if type(manifest.width) is not int or manifest.width < bool(manifest.tokens):
        raise ValueError(f"width is {manifest.width!r}")
    if manifest.codec not in get_args(Codec):
        raise ValueError(f"codec is {manifest.codec!r}")
    calibrated = manifest.codec == "int8" and manifest.tokens > 0
    sha256: object = manifest.calibration_sha256
    is_digest = isinstance(sha256, str) and re.fullmatch(r"[0-9a-f]{64}", sha256) is not None
    if is_digest != calibrated or (sha256 is None) == calibrated:
        raise ValueError(f"calibration_sha256 is {sha256!r}")
    for name in ("fingerprint", "recorded"):
        if not isinstance(getattr(manifest, name), dict):
            raise ValueError(f"{name} is not a group of values")


def manifest_text(manifest: Manifest) -> str:
    """Return the text of ``manifest.json``, with the manifest's own digest."""
    return json.dumps({**manifest.to_dict(), "sha256": manifest.sha256}, indent=1)


def refuse_world_writable(folder: Path) -> None:
    """Refuse a folder that everyone may write to, because anyone could have written its content.

    Raises:
        CacheError: names the folder and the remedy.
    """
    try:
        mode = os.stat(folder).st_mode
    except FileNotFoundError:  # a sidecar may have deleted it
        return
    except OSError as error:
        raise CacheError(f"cache.dir={folder}: cannot be opened ({error.strerror})") from error
    if mode & 0o002:
        raise CacheError(f"cache.dir={folder}: everyone may write to it; run chmod o-w {folder}")


def missing_shards(folder: Path, manifest: Manifest) -> list[int]:
    """Return the shards that are not complete.

    Raises:
        CacheError: if the folders of the shards cannot be listed.
    """
    try:
        if manifest.format == 1:
            complete = list_shards(folder / SHARDS) & list_shards(folder / SHARDS, SEAL_SUFFIX)
        else:
            complete = set[int]().union(*map(list_shards, list_shard_folders(folder)))
    except OSError as error:
        raise listing_error(folder, error) from error
    return [shard for shard in range(manifest.num_shards) if shard not in complete]


def delete_abandoned_drafts(folder: Path) -> None:
    """Delete the drafts of killed processes, which are never read and may take a GiB each."""
    for place in (folder / SHARDS, *list_shard_folders(folder)):
        with suppress(OSError):  # no permission, or deleted since; the shards are not affected
            for name in filter(DRAFT.fullmatch, os.listdir(place)):
                if not is_recent_draft(place / name):
                    (place / name).unlink(missing_ok=True)
                    logger.info("deleted %s, which a killed process left", place / name)


def is_recent_draft(path: Path) -> bool:
    """Return whether a file is a draft that another process may be writing."""
    if not path.name.startswith(".") and path.suffix != ".tmp":
        return False
    try:
        return time.time() - path.stat().st_mtime < ABANDONED_S
    except OSError:
        return True


class Seal(NamedTuple):
    """The SHA-256 that a shard should have, and the SHA-256 that it has."""

    stored: str
    found: str


def read_seal(folder: Path, manifest: Manifest, shard: int) -> Seal:
    """Read every byte of a shard and return its seal.

    Raises:
        OSError: if it is absent or cannot be read.
        ValueError: if its header is damaged, or the seal of format 1 cannot be read.
    """
    path = shard_path(folder, manifest, shard)
    with open(open_regular(path), "rb") as opened:
        if manifest.format > 1:
            head, at = read_header(opened)
            return Seal(head[at : at + len(NO_DIGEST)].decode(), unsealed_digest(opened))
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    try:
        tree = read_json(read_regular(old_seal_path(path), SEAL_BYTES))
        return Seal(str(tree["sha256"]), found)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"its seal cannot be read ({error})") from None


def old_seal_path(path: Path) -> Path:
    """Return the seal of a shard of format 1."""
    return path.with_suffix(SEAL_SUFFIX)


def read_header(opened: BinaryIO) -> tuple[bytes, int]:
    """Return a shard's bytes up to the end of the header, and the digest's offset in them.

    Raises:
        ValueError: if it is damaged.
    """
    opened.seek(0)
    start = opened.read(8)
    head = start + opened.read(min(int.from_bytes(start, "little"), HEADER_LIMIT))
    found = re.search(rb'"sha256":"([0-9a-f]{64})"', head)
    if found is None:
        raise ValueError("its header is damaged")
    return head, found.start(1)


def unsealed_digest(opened: BinaryIO) -> str:
    """Return the SHA-256 of a shard with zeros in place of the digest in its header."""
    head, at = read_header(opened)
    found = hashlib.sha256(head[:at] + NO_DIGEST + head[at + len(NO_DIGEST) :])
    while block := opened.read(1 << 20):
        found.update(block)
    return found.hexdigest()


def as_os_error(error: SafetensorError, path: Path) -> OSError:
    """Return the store's error behind that of safetensors, whose text holds the error number."""
    found = re.search(r"(?:os error |Os \{ code: )(\d+)", str(error))  # the second: older versions
    number = int(found[1]) if found else errno.EIO
    return OSError(number, os.strerror(number), str(path))


def write_shard(folder: Path, manifest: Manifest, shard: int, fields: Mapping[str, Tensor]) -> None:
    """Write a shard; it gets its name when it is on storage.

    ``fields`` holds all tensors of the manifest on the CPU, without the checksums.

    Raises:
        OSError: if the store refuses; the shard then does not count as complete.
    """
    names = [name for name in manifest.fields() if name != "checksum"]
    identity = manifest.identity
    sums = [
        row_checksum(identity, row, [row_memory(fields[name], i) for name in names])
        for i, row in enumerate(manifest.shard_rows(shard))
    ]
    tensors = {name: fields[name].contiguous() for name in names}
    tensors["checksum"] = torch.tensor(sums)
    path = shard_path(folder, manifest, shard)
    try:
        write_tensors(path, tensors, manifest.format == 1)
    except FileNotFoundError:  # a sidecar deleted the folder, which was still empty
        write_tensors(path, tensors, manifest.format == 1)


def write_tensors(path: Path, tensors: dict[str, Tensor], has_seal_file: bool) -> None:
    """Write the file of a shard with its seal.

    Raises:
        OSError: if the store refuses.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as draft:
        try:
            save_file(tensors, draft, {"sha256": NO_DIGEST.decode()})
        except SafetensorError as error:
            raise as_os_error(error, path) from error
        draft.chmod(0o644)  # safetensors creates files that only their owner may read
        with draft.open("r+b") as opened:
            _, at = read_header(opened)
            sha256 = unsealed_digest(opened)
            opened.seek(at)
            opened.write(sha256.encode())
        seal = None
        if has_seal_file:
            seal = json.dumps({"size": draft.stat().st_size, "sha256": digest(draft)})
            old_seal_path(path).unlink(missing_ok=True)
    if seal is not None:
        write_atomic(old_seal_path(path), seal)
    sync(path.parent)
