"""Write one tar of a pack, and verify it by reading it back."""

import hashlib
import io
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from PIL import Image

from dataloading.errors import DataError
from dataloading.shards import list_shards
from dataloading.sources import TarSource
from dataloading.webdataset import examine_shards

_EXTENSIONS = {
    **{"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "DIB": "dib"},
    **{"GIF": "gif", "TIFF": "tif", "JPEG2000": "jp2", "AVIF": "avif", "PPM": "ppm"},
}


class Sample(NamedTuple):
    """A sample to write into a tar."""

    key: str
    label: bytes
    data: bytes


def write_samples(file: BinaryIO, samples: Iterable[Sample], total: Any) -> None:
    """Write a tar of ``KEY.jpg`` (or the extension of the format of the image) and ``KEY.cls``.

    ``total`` is a hash that is updated with the samples, as in ``hash_samples``.

    Raises:
        OSError: if the file cannot be written.
    """
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key, label, data in samples:
            _feed(total, label, data)
            _add(tar, f"{key}.{extension(data)}", data)
            if label:
                _add(tar, f"{key}.cls", label)


def find_difference(tar: Path, digest: str, number: int, max_pixels: int) -> str | None:
    """Read a tar back and return how it differs from what was written.

    Returns ``None`` if label and bytes of all ``number`` samples have the given digest.
    """
    try:
        same = hash_samples(tar, number, max_pixels) == digest
    except DataError as error:
        return str(error)
    except OSError as error:
        return f"it cannot be read back: {error.strerror}"
    return None if same else "its samples are not those that were written"


def hash_samples(tar: Path, number: int, max_pixels: int) -> str:
    """Hash label and bytes of all samples of a tar, as the ordinary index finds them.

    Args:
        tar: the file.
        number: samples that it should have.
        max_pixels: as for the index.

    Raises:
        DataError: if it cannot be indexed, or has another number of samples.
        OSError: if it cannot be read.
    """
    shards = list_shards(tar)
    found = examine_shards(tar, shards, max_pixels)
    if len(found.entries) != number or found.excluded:
        raise DataError(f"{tar}: {len(found.entries)} samples, {number} were written")
    labels = [label.encode("utf-8", "surrogateescape") for label in found.labels]
    source = TarSource([tar], found.entries)
    total = hashlib.sha256()
    try:
        for row in range(number):
            label = int(found.entries["label"][row])
            _feed(total, labels[label] if label >= 0 else b"", source.read(row))
    finally:
        source.close()
    return total.hexdigest()


def _feed(total: Any, label: bytes, data: bytes) -> None:
    """Feed one sample to a hash, so that no two lists of samples feed the same bytes."""
    total.update(b"%d %d\n" % (len(label), len(data)) + label)
    total.update(data)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Write a member without time and owner in its header."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def extension(data: bytes) -> str:
    """Return the extension of an encoded image; ``jpg`` for unknown formats."""
    if data.startswith(b"\xff\xd8"):
        return "jpg"
    with Image.open(io.BytesIO(data)) as image:
        return _EXTENSIONS.get(image.format or "", "jpg")
