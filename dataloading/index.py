"""The list of samples: what there is, how large it is, and a digest that names it."""

import hashlib
import io
import json
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dataloading.errors import DataError
from dataloading.headers import HeaderError, size_of_file
from dataloading.sources import FolderSource, Source

logger = logging.getLogger(__name__)

ENTRY = np.dtype(
    [
        ("shard", "<u4"),  # file of the sample; 0 in a folder
        ("offset", "<u8"),  # bytes before it in that file; 0 in a folder
        ("size", "<u4"),  # bytes
        ("width", "<u2"),
        ("height", "<u2"),
        ("label", "<i4"),  # row of Index.labels; -1: directly under the folder
        ("flags", "u1"),  # 0; unusable files are left out
    ]
)
EXTENSIONS = frozenset(
    (
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib"),
        *(".gif", ".tif", ".tiff", ".jp2", ".avif", ".ppm", ".pgm"),
    )
)
MAX_PIXELS = 100_000_000
SourceName = Literal["auto", "folder"]

_FORMAT = 1
_CHUNK = 512
_READERS = 8


@dataclass(frozen=True, eq=False)
class Index:
    """Usable samples of a data set; row i is sample id i.

    Attributes:
        root: folder of the images.
        source: layout under it.
        entries: structured array of ``ENTRY``, one row a sample.
        names: key of each row: path relative to the root, with ``/``; sorted.
        labels: names of the labels, sorted: the folders directly under the root.
        left_out: (name, reason) of files that look like images and cannot be used.
        digest: sha256 over keys and sizes (bytes, width, height) of all rows, hexadecimal.
    """

    root: Path
    source: Literal["folder"]
    entries: NDArray[np.void]
    names: Sequence[str]
    labels: tuple[str, ...]
    left_out: tuple[tuple[str, str], ...]
    digest: str

    def __len__(self) -> int:
        return len(self.entries)

    def open(self) -> Source:
        """Return a reader of the samples' bytes."""
        return FolderSource(self.root, self.names)


class _File(NamedTuple):
    name: str
    size: int
    mtime_ns: int


class _Examined(NamedTuple):
    width: int
    height: int
    fault: str | None


def build_index(
    path: str | os.PathLike[str], source: SourceName = "auto", max_pixels: int = MAX_PIXELS
) -> Index:
    """List a folder of images; headers are read, nothing is decoded.

    Files are taken by their extension, links to folders are followed, hidden files are passed
    over. Empty, unreadable and oversized files are left out and reported in ``Index.left_out``.

    Args:
        path: folder of images; the folders directly under it are labels.
        source: layout; "auto" looks (so far there is "folder" only).
        max_pixels: images with more pixels (width x height) are left out.

    Returns:
        The index, ordered by name.

    Raises:
        DataError: if the folder is missing or holds no usable image.
        ValueError: if ``source`` is not a known layout.
    """
    root = Path(path)
    return _examine_all(root, source, max_pixels, _list_files(root, source))


def load_or_build(
    path: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    source: SourceName = "auto",
    max_pixels: int = MAX_PIXELS,
) -> Index:
    """Load the index kept in a directory, or build it there.

    It is kept as ``index.npy`` and ``index.json``, both replaced atomically, and used again while
    names, sizes and modification times of all files and ``max_pixels`` are as they were.

    Args:
        path: folder of images.
        directory: where the index is kept; made if it does not exist.
        source: as in ``build_index``.
        max_pixels: as in ``build_index``.

    Returns:
        The index.

    Raises:
        DataError: as ``build_index``, or if the directory cannot be written.
        ValueError: if ``source`` is not a known layout.
    """
    root, folder = Path(path), Path(directory)
    files = _list_files(root, source)
    listing = _listing_digest(files, max_pixels)
    kept = _load(root, folder, listing)
    if kept is not None:
        return kept
    index = _examine_all(root, source, max_pixels, files)
    try:
        _save(index, folder, listing)
    except OSError as error:
        raise DataError(
            f"{folder}: the index cannot be written ({error.strerror}); "
            "set data.index to a folder that can"
        ) from error
    return index


def _list_files(root: Path, source: str) -> list[_File]:
    """Image files under the root, by name."""
    if source not in get_args(SourceName):
        raise ValueError(f"source is {source!r}; expected one of {get_args(SourceName)}")
    if not root.is_dir():
        found = "is not a folder" if root.exists() else "does not exist"
        raise DataError(
            f"{root}: {found}; set data.path to a folder of images, sub-folders are labels"
        )
    try:
        files = sorted(_walk(root, "", frozenset()))
    except OSError as error:
        raise DataError(
            f"{error.filename}: cannot be listed ({error.strerror}); "
            "make the whole of data.path readable"
        ) from error
    if not files:
        raise DataError(
            f"{root}: no image files (.jpg, .png, .webp ...) found; "
            "set data.path to a folder of images, sub-folders are labels"
        )
    return files


def _walk(folder: Path, prefix: str, above: frozenset[tuple[int, int]]) -> Iterator[_File]:
    """Yield image files; a link to a folder above itself is not followed again."""
    facts = folder.stat()
    here = (facts.st_dev, facts.st_ino)
    if here in above:
        return
    with os.scandir(folder) as items:
        for item in items:
            if item.name.startswith("."):
                continue
            if item.is_dir():
                yield from _walk(Path(item.path), f"{prefix}{item.name}/", above | {here})
            elif os.path.splitext(item.name)[1].lower() in EXTENSIONS:
                try:
                    status = item.stat()
                except FileNotFoundError:  # a link to nothing; reported with the unreadable ones
                    yield _File(prefix + item.name, -1, 0)
                else:
                    yield _File(prefix + item.name, status.st_size, status.st_mtime_ns)


def _examine_all(root: Path, source: str, max_pixels: int, files: list[_File]) -> Index:
    Image.init()
    chunks = [files[at : at + _CHUNK] for at in range(0, len(files), _CHUNK)]

    def examine(chunk: list[_File]) -> list[_Examined]:
        return [_examine(root, file, max_pixels) for file in chunk]

    with warnings.catch_warnings(), ThreadPoolExecutor(_READERS) as pool:
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # max_pixels decides
        examined = [result for results in pool.map(examine, chunks) for result in results]

    left_out = tuple(
        (file.name, result.fault)
        for file, result in zip(files, examined, strict=True)
        if result.fault is not None
    )
    usable = [(f, r) for f, r in zip(files, examined, strict=True) if r.fault is None]
    if left_out:
        name, reason = left_out[0]
        logger.warning(
            "%s: %d of %d files are left out; first: %s (%s)",
            *(root, len(left_out), len(files), name, reason),
        )
        if not usable:
            raise DataError(
                f"{root}: none of {len(files)} image files is usable; first: {name} ({reason}); "
                "replace them, raise data.max_pixels or set data.path to another folder"
            )
    names = [file.name for file, _ in usable]
    labels = tuple(sorted({name.partition("/")[0] for name in names if "/" in name}))
    number = {label: i for i, label in enumerate(labels)}
    entries = np.zeros(len(usable), dtype=ENTRY)
    entries["size"] = [file.size for file, _ in usable]
    entries["width"] = [result.width for _, result in usable]
    entries["height"] = [result.height for _, result in usable]
    entries["label"] = [number[n.partition("/")[0]] if "/" in n else -1 for n in names]
    logger.info("%s: %d images, %d labels", root, len(names), len(labels))
    digest = _digest(names, entries)
    return Index(root, "folder", entries, names, labels, left_out, digest)


def _examine(root: Path, file: _File, max_pixels: int) -> _Examined:
    if file.size == 0:
        return _Examined(0, 0, "empty file")
    if file.size >= 1 << 32:
        return _Examined(0, 0, f"{file.size} bytes are 4 GiB or more")
    try:
        width, height = size_of_file(root / file.name)
    except HeaderError as error:
        return _Examined(0, 0, str(error))
    except OSError as error:
        return _Examined(0, 0, f"cannot be read: {error.strerror}")
    if max(width, height) >= 1 << 16:
        return _Examined(0, 0, f"{width} x {height}: a side is 65536 pixels or more")
    if width * height > max_pixels:
        return _Examined(0, 0, f"{width} x {height} has more than {max_pixels} pixels (max_pixels)")
    return _Examined(width, height, None)


def _encode(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def _digest(names: Sequence[str], entries: NDArray[np.void]) -> str:
    total = hashlib.sha256(b"dataloading index 1\n")
    rows = zip(
        names,
        entries["size"].tolist(),
        entries["width"].tolist(),
        entries["height"].tolist(),
        strict=True,
    )
    for name, size, width, height in rows:
        total.update(_encode(name) + b"\0%d %d %d\n" % (size, width, height))
    return total.hexdigest()


def _listing_digest(files: list[_File], max_pixels: int) -> str:
    total = hashlib.sha256(b"listing %d %d\n" % (_FORMAT, max_pixels))
    for file in files:
        total.update(_encode(file.name) + b"\0%d %d\n" % (file.size, file.mtime_ns))
    return total.hexdigest()


def _load(root: Path, folder: Path, listing: str) -> Index | None:
    """Return the kept index, or ``None`` if there is none, it is damaged or no longer true."""
    try:
        facts: dict[str, Any] = json.loads((folder / "index.json").read_text(encoding="ascii"))
        if facts["listing"] != listing:
            logger.info("%s: the files have changed, the index is built again", root)
            return None
        data = (folder / "index.npy").read_bytes()
        if hashlib.sha256(data).hexdigest() != facts["npy_sha256"]:
            raise ValueError("index.npy does not belong to index.json")
        entries = cast(NDArray[np.void], np.load(io.BytesIO(data), allow_pickle=False))
        return Index(
            root=root,
            source="folder",
            entries=entries,
            names=facts["names"],
            labels=tuple(facts["labels"]),
            left_out=tuple((name, reason) for name, reason in facts["left_out"]),
            digest=facts["digest"],
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s: the index cannot be used (%s) and is built again", folder, error)
        return None


def _save(index: Index, folder: Path, listing: str) -> None:
    buffer = io.BytesIO()
    np.save(buffer, index.entries, allow_pickle=False)
    facts = {
        "format": _FORMAT,
        "source": index.source,
        "digest": index.digest,
        "listing": listing,
        "npy_sha256": hashlib.sha256(buffer.getvalue()).hexdigest(),
        "labels": index.labels,
        "left_out": index.left_out,
        "names": index.names,
    }
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "index.npy", buffer.getvalue())
    _write(folder / "index.json", json.dumps(facts, indent=0).encode("ascii"))


def _write(path: Path, data: bytes) -> None:
    """Replace a file in one piece; a crash leaves the old one or the new one."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    try:
        with draft.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
