"""Images of the first study from Tiny-ImageNet: 100 classes, 64 x 64, as tars.

python -m cmtmae_scale.tools.study.tiny_imagenet datasets/tinyimagenet100-64 [--zip FILE]
"""

import filecmp
import hashlib
import http.client
import io
import logging
import sys
import tarfile
import urllib.request
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from cmtmae_scale.errors import EXIT_DONE, exit_code_of, remedy_for
from cmtmae_scale.runtime.arguments import Parser
from cmtmae_scale.runtime.storage import atomic_path
from dataloading.errors import DataError

ADDRESS = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
SIZE, MD5 = 248_100_043, "90528d7ca1a48142e341f4ef8d21d0de"
"""Of the archive; the MD5 is that of Avalanche's ``benchmarks/datasets/tiny_imagenet``."""
TIMEOUT_S = 60
"""Seconds without a byte after which the download is aborted."""
ROOT = "tiny-imagenet-200"
TRAIN_TARS, TRAIN_A_TAR = 12, 25
VAL_TARS, VAL_A_TAR = 5, 10
"""Number of tars, and images per class and tar: any subset of tars is balanced."""

logger = logging.getLogger(__name__)


def make_tiny_imagenet(arguments: Sequence[str] | None = None) -> int:
    """Download the archive and write the tars; returns the exit code."""
    parser = Parser(description="Write the images of the first study.", allow_abbrev=False)
    parser.add_argument("folder", type=Path, metavar="DIR", help="output folder")
    parser.add_argument("--zip", type=Path, help=f"a copy of {ADDRESS}; default: downloaded to DIR")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        options.folder.mkdir(parents=True, exist_ok=True)
        archive = options.zip or download_archive(options.folder / f"{ROOT}.zip")
        write_subset(archive, options.folder)
    except DataError as error:
        logger.error("%s", error)
        return exit_code_of(error)
    return EXIT_DONE


def download_archive(file: Path) -> Path:
    """Download the archive (250 MB), unless it exists.

    Raises:
        DataError: if the download fails, or another file is sent.
    """
    if file.exists():
        return file
    logger.info("fetching %s (250 MB) ...", ADDRESS)
    try:
        with (
            urllib.request.urlopen(ADDRESS, timeout=TIMEOUT_S) as response,
            atomic_path(file) as draft,
        ):
            copy_verified(response, draft)
    except (OSError, http.client.HTTPException) as error:
        raise DataError(
            f"{ADDRESS}: cannot be downloaded ({error}); name a copy with --zip"
        ) from error
    return file


def copy_verified(response: BinaryIO, file: Path) -> None:
    """Write the response of a server, at most ``SIZE`` bytes, and compare size and MD5.

    Raises:
        DataError: if they differ.
        OSError: if the server sends nothing for ``TIMEOUT_S``, or the store refuses.
    """
    digest, size = hashlib.md5(usedforsecurity=False), 0
    with file.open("wb") as opened:
        while size <= SIZE and (data := response.read(2**20)):
            opened.write(data)
            digest.update(data)
            size += len(data)
    if (size, digest.hexdigest()) != (SIZE, MD5):
        raise DataError(
            f"{ADDRESS}: sent {'more than ' if size > SIZE else ''}{min(size, SIZE)} bytes of MD5 "
            f"{digest.hexdigest()}, expected {SIZE} bytes of {MD5}; name a copy with --zip"
        )


def write_subset(archive: Path, folder: Path) -> None:
    """Write ``train-00.tar`` to ``train-11.tar`` and ``val-0.tar`` to ``val-4.tar``.

    Every second class in the order of names, images 0 to 299 of each, 25 per tar; of the official
    validation images all 50 of each of these classes, 10 per tar. The JPEG bytes are kept.

    Raises:
        DataError: if the archive is not Tiny-ImageNet's, or a tar of that name has other content
            or cannot be written.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            names = sorted(opened.read(f"{ROOT}/wnids.txt").decode().split())
            labels = {name: label for label, name in enumerate(names[::2])}
            for tar in range(TRAIN_TARS):
                images = [
                    (f"{ROOT}/train/{name}/images/{name}_{number}.JPEG", label)
                    for number in range(tar * TRAIN_A_TAR, (tar + 1) * TRAIN_A_TAR)
                    for name, label in labels.items()
                ]
                write_images(folder / f"train-{tar:02d}.tar", opened, images)
            files = validation_files(opened, labels)
            for tar in range(VAL_TARS):
                images = [
                    (f"{ROOT}/val/images/{files[name][number]}", label)
                    for number in range(tar * VAL_A_TAR, (tar + 1) * VAL_A_TAR)
                    for name, label in labels.items()
                ]
                write_images(folder / f"val-{tar}.tar", opened, images)
    except (OSError, LookupError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"{archive}: is not Tiny-ImageNet's archive ({error}); delete it, or name another with "
            "--zip"
        ) from error


def validation_files(archive: zipfile.ZipFile, labels: Mapping[str, int]) -> dict[str, list[str]]:
    """Return the validation image names per class, in the order of the annotations."""
    files: dict[str, list[str]] = {name: [] for name in labels}
    for line in archive.read(f"{ROOT}/val/val_annotations.txt").decode().splitlines():
        file, name = line.split("\t")[:2]
        if name in files:
            files[name].append(file)
    return files


def write_images(file: Path, archive: zipfile.ZipFile, images: Iterable[tuple[str, int]]) -> None:
    """Write images and their labels as a WebDataset tar, whole or not at all, always the same.

    Raises:
        DataError: if the file exists with other content, or cannot be written.
    """
    try:
        with atomic_path(file) as draft:
            write_tar(draft, archive, images)
            if file.exists() and not filecmp.cmp(draft, file, shallow=False):
                raise DataError(f"{file}: exists with other content; name an empty or a new folder")
    except OSError as error:
        raise DataError(
            f"{file}: cannot be written ({error}); {remedy_for(error, 'name another folder')}"
        ) from error
    logger.info("%s", file)


def write_tar(draft: Path, archive: zipfile.ZipFile, images: Iterable[tuple[str, int]]) -> None:
    """Write images and their labels into a new tar."""
    with tarfile.open(draft, "w", format=tarfile.USTAR_FORMAT) as tar:
        for path, label in images:
            for suffix, data in (("jpg", archive.read(path)), ("cls", str(label).encode())):
                member = tarfile.TarInfo(f"{Path(path).stem}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


if __name__ == "__main__":
    sys.exit(make_tiny_imagenet())
