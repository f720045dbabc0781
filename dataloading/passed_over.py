"""Files and tar members that the index passes over, counted by extension, with the remedy."""

import functools
import os
import re
from collections.abc import Iterable, Sequence

from dataloading.entries import EXTENSIONS, Kind, Passed

_UNREAD = frozenset(
    {".heic", ".heif", ".hif", ".jxl", ".jxr", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf"}
    | {".rw2", ".raf", ".raw", ".svg", ".psd", ".exr", ".hdr", ".dcm", ".tga", ".ico", ".pnm"}
    | {".pbm", ".j2k", ".jpx", ".xcf", ".eps"}
)
_DOCUMENTS = frozenset(
    {".txt", ".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".xml", ".yaml", ".yml", ".toml", ".md"}
    | {".rst", ".html", ".htm", ".py", ".sh", ".log", ".ini", ".db", ".cls", ".cls.txt", ".pdf"}
    | {".cls.json", ".ipynb", ".sha256", ".md5", ".bib", ".lst", ".names"}
)
_DOCUMENT_NAMES = frozenset(
    {"readme", "license", "licence", "copying", "makefile", "authors", "notice", "citation"}
    | {"sha256sums", "md5sums", "checksums", "manifest", "labels", "classes"}
)
_ARCHIVES = frozenset({".zip", ".tar", ".tgz", ".tbz", ".tbz2", ".txz", ".7z", ".rar", ".gz"})
_CONTAINERS = frozenset(
    {".parquet", ".arrow", ".tfrecord", ".tfrecords", ".lmdb", ".mdb", ".h5", ".hdf5", ".rec"}
    | {".npy", ".npz", ".mat", ".beton", ".pkl", ".pickle", ".pt"}
)
_LABELS = frozenset(
    {".json", ".txt", ".cls.txt", ".cls.json", ".label", ".class", ".target", ".csv"}
)
_NEAR = re.compile(rf"({'|'.join(map(re.escape, EXTENSIONS | _UNREAD))})(?![a-z0-9])")
_MAX_GROUPS = 64  # distinct extensions counted; names such as a.<random> would have millions
_OTHERS = "of other extensions"


Counts = dict[tuple[Kind, str], Passed]
"""By kind and extension; made by ``count_passed``."""


def count_passed(counts: Counts, kind: Kind, extension: str, name: str, number: int = 1) -> None:
    """Add files to the counts; beyond 64 extensions the others are counted together."""
    key = (kind, extension)
    old = counts.get(key)
    if old is None:
        if len(counts) >= _MAX_GROUPS and extension != _OTHERS:
            return count_passed(counts, kind, _OTHERS, name, number)
        counts[key] = Passed(kind, extension, number, name)
    else:
        counts[key] = Passed(kind, extension, old.number + number, min(old.first, name))
    return None


def count_files(counts: Counts, prefix: str, others: Iterable[str], images: Iterable[str]) -> None:
    """Count the files of one folder that are not taken as images.

    Args:
        counts: added to.
        prefix: put before the names that are kept.
        others: names of the files.
        images: names of the images in the same folder.
    """
    stems = {name.partition(".")[0] for name in images}
    for name in others:
        stem, dot, rest = name.partition(".")
        extension = extension_of(f"a{dot}{rest}") if stem else ""
        kind = "file" if extension else kind_of_bare(name)
        if kind == "file" and not is_image_like(extension) and stem in stems:
            kind = "beside"
        count_passed(counts, kind, extension, prefix + name)


def sort_counts(all_counts: Sequence[Counts]) -> tuple[Passed, ...]:
    """Sum counts; the most frequent first."""
    total: Counts = {}
    for counts in all_counts:
        for passed in counts.values():
            count_passed(total, passed.kind, passed.extension, passed.first, passed.number)
    return tuple(sorted(total.values(), key=lambda p: (-p.number, p.kind, p.extension)))


@functools.lru_cache(maxsize=1024)
def extension_of(name: str) -> str:
    """Return the extension, in lower case, of a file name that is not that of an image.

    Of ``a.jpg.1`` and ``a.tar.gz`` it is ``.jpg.1`` and ``.tar.gz``; a number alone is no
    extension.
    """
    stem, last = os.path.splitext(name.lower())
    before = os.path.splitext(stem)[1]
    if before in EXTENSIONS or before in (".tar", ".cls"):
        return (before + last)[:16]
    if _NEAR.match(last):
        return last[:16]
    if len(last) < 2 or len(last) > 12 or last[1:].isdigit() or last[1].isspace():
        return ""
    return last


def kind_of_bare(name: str) -> Kind:
    """Return the kind of a file without extension by its name."""
    if name.startswith("."):
        return "hidden"
    return "beside" if name.lower() in _DOCUMENT_NAMES else "file"


def is_image_like(extension: str) -> bool:
    """Return whether a file is an image by its extension: a format that is not read, or a copy."""
    return _NEAR.match(extension) is not None


def is_archive(extension: str) -> bool:
    """Return whether a file is a tar or another archive by its extension."""
    return extension in _ARCHIVES or extension.startswith(".tar.")


def may_hold_label(extension: str) -> bool:
    """Return whether a member of this extension beside an image commonly holds its label."""
    return extension in _LABELS


def lost_images(passed: Iterable[Passed]) -> int:
    """Return how many of the files may have been images: neither documents nor hidden."""
    return sum(
        item.number
        for item in passed
        if item.kind in ("key", "link", "null", "path")
        or (item.kind == "file" and item.extension not in _DOCUMENTS)
    )


def format_count(number: int, noun: str) -> str:
    """Return a number and a noun, in the singular for 1."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def format_passed(passed: Sequence[Passed], what: str = "file") -> str:
    """Format counts by extension, then a remedy for each kind; empty where there are none."""
    if not passed:
        return ""
    total = sum(item.number for item in passed)
    counts = ", ".join(f"{item.number} {_label(item)}" for item in passed)
    remedies: dict[str, str] = {}
    for item in passed:
        remedy = _remedy(item)
        if remedy:
            remedies.setdefault(remedy.partition(": ")[2], remedy)
    return "; ".join([f"{format_count(total, what)} passed over: {counts}", *remedies.values()])


def _label(item: Passed) -> str:
    if item.kind == "hidden":
        return "hidden"
    if item.kind == "empty":
        return "empty folder" if item.number == 1 else "empty folders"
    if item.kind == "label":
        return f"{item.extension} beside images without .cls"
    if item.kind == "key":
        return f"{item.extension} behind a second dot"
    if item.kind == "second":
        return f"{item.extension} behind a second dot beside an image of the same key"
    if item.kind == "link":
        return f"{item.extension} that are links or devices"
    if item.kind == "null":
        return "without an image (null)"
    if item.kind == "path":
        return "with the path of an image and without its bytes"
    return item.extension or "without extension"


def _remedy(item: Passed) -> str:
    name, extension = item.first, item.extension
    base = name.rpartition("/")[2]
    if item.kind in ("key", "second"):
        stem, last = os.path.splitext(base)
        return (
            f"{name}: a key ends at the first dot of the name, so the extension is "
            f"{base[base.find('.') :]}; rename such members, for "
            f"example to {stem.replace('.', '_')}{last}"
        )
    if item.kind == "label":
        return f"{name}: labels are read from KEY.cls only; write that member for labelled images"
    if item.kind == "link":
        return (
            f"{name}: links within a tar are not followed; write the tar with "
            "tar --dereference --hard-dereference"
        )
    if item.kind == "path":
        return (
            f"{name}: paths are not followed; embed the bytes (Dataset.push_to_hub of Hugging Face "
            "datasets does), or set data.path to the folder of the images"
        )
    if item.kind != "file" or extension in _DOCUMENTS:
        return ""
    if extension in _UNREAD:
        return f"{name}: this format is not read; convert such files to JPEG, PNG or WebP"
    if extension == ".tar":
        return (
            f"{name}: tars are read where data.path is their folder or a pattern of tars; unpack "
            "a tar that is within another"
        )
    if extension == ".parquet":
        return (
            f"{name}: Parquet files are read from a file system, where data.path is their folder, "
            "one of them or a pattern of them"
        )
    if extension in _CONTAINERS:
        return f"{name}: this container is not read; write its images as files, or as .tar files"
    if is_archive(extension):
        return (
            f"{name}: archives are not read in place; unpack them, or decompress each .tar.gz to a "
            ".tar and set data.path to the folder of the .tar files"
        )
    if not extension or is_image_like(extension):
        return f"{name}: only known extensions are read; rename images to end in .jpg, .png ..."
    return ""
