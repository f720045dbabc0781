"""Images of the first study from Tiny-ImageNet: 100 classes, 64 x 64, as tars.

python -m cmtmae_scale.tools.study.tiny_imagenet datasets/tinyimagenet100-64 [--zip FILE]
"""

import io
import logging
import shutil
import sys
import tarfile
import urllib.request
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from cmtmae_scale.errors import EXIT_DONE
from cmtmae_scale.runtime.arguments import Parser
from cmtmae_scale.runtime.storage import atomic_path
from dataloading.errors import DataError

ADDRESS = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
ROOT = "tiny-imagenet-200"
TRAIN_TARS, TRAIN_A_TAR = 12, 25
VAL_TARS, VAL_A_TAR = 5, 10
"""Number of tars, and images per class and tar: any subset of tars is balanced."""

logger = logging.getLogger(__name__)


class Sample(NamedTuple):
    """One pair of tar members."""

    key: str
    jpeg: bytes
    label: int


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
        return error.exit_code
    return EXIT_DONE


def download_archive(file: Path) -> Path:
    """Download the archive (250 MB), unless it exists.

    Raises:
        DataError: if the download fails.
    """
    if file.exists():
        return file
    logger.info("fetching %s (250 MB) ...", ADDRESS)
    try:
        with (
            urllib.request.urlopen(ADDRESS) as response,
            atomic_path(file) as draft,
            draft.open("wb") as opened,
        ):
            shutil.copyfileobj(response, opened)
    except OSError as error:
        raise DataError(
            f"{ADDRESS}: cannot be downloaded ({error}); name a copy with --zip"
        ) from error
    return file


def write_subset(archive: Path, folder: Path) -> None:
    """Write ``train-00.tar`` to ``train-11.tar`` and ``val-0.tar`` to ``val-4.tar``.

    Every second class in the order of names, images 0 to 299 of each, 25 per tar; of the official
    validation images all 50 of each of these classes, 10 per tar. The JPEG bytes are kept.

    Args:
        archive: Tiny-ImageNet's zip.
        folder: output folder; existing tars are replaced.

    Raises:
        DataError: if the archive is not Tiny-ImageNet's.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            names = sorted(opened.read(f"{ROOT}/wnids.txt").decode().split())
            labels = {name: label for label, name in enumerate(names[::2])}
            for tar in range(TRAIN_TARS):
                numbers = range(tar * TRAIN_A_TAR, (tar + 1) * TRAIN_A_TAR)
                write_samples(
                    folder / f"train-{tar:02d}.tar", train_samples(opened, labels, numbers)
                )
            files = validation_files(opened, labels)
            for tar in range(VAL_TARS):
                numbers = range(tar * VAL_A_TAR, (tar + 1) * VAL_A_TAR)
                write_samples(
                    folder / f"val-{tar}.tar", val_samples(opened, labels, files, numbers)
                )
    except (OSError, LookupError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{archive}: is not Tiny-ImageNet's archive ({error}); delete it, or name another with "
            "--zip"
        ) from error


def train_samples(
    archive: zipfile.ZipFile, labels: Mapping[str, int], numbers: range
) -> Iterator[Sample]:
    """Yield training images of some numbers, all classes in turn."""
    for number in numbers:
        for name, label in labels.items():
            file = f"{ROOT}/train/{name}/images/{name}_{number}.JPEG"
            yield Sample(f"{name}_{number}", archive.read(file), label)


def validation_files(archive: zipfile.ZipFile, labels: Mapping[str, int]) -> dict[str, list[str]]:
    """Return the validation image names per class, in the order of the annotations."""
    files: dict[str, list[str]] = {name: [] for name in labels}
    for line in archive.read(f"{ROOT}/val/val_annotations.txt").decode().splitlines():
        file, name = line.split("\t")[:2]
        if name in files:
            files[name].append(file)
    return files


def val_samples(
    archive: zipfile.ZipFile,
    labels: Mapping[str, int],
    files: Mapping[str, Sequence[str]],
    numbers: range,
) -> Iterator[Sample]:
    """Yield validation images of some indices within their class, all classes in turn."""
    for number in numbers:
        for name, label in labels.items():
            file = files[name][number]
            yield Sample(Path(file).stem, archive.read(f"{ROOT}/val/images/{file}"), label)


def write_samples(file: Path, samples: Iterable[Sample]) -> None:
    """Write a WebDataset tar, whole or not at all; the same samples give the same bytes."""
    with atomic_path(file) as draft, tarfile.open(draft, "w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            for suffix, data in (("jpg", sample.jpeg), ("cls", str(sample.label).encode())):
                member = tarfile.TarInfo(f"{sample.key}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    logger.info("%s", file)


if __name__ == "__main__":
    sys.exit(make_tiny_imagenet())
