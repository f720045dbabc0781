"""The subset of an archive that is made up like Tiny-ImageNet's."""

import hashlib
import io
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cmtmae_scale.tools.study import tiny_imagenet
from cmtmae_scale.tools.study.tiny_imagenet import make_tiny_imagenet, write_subset
from dataloading.errors import DataError
from dataloading.index import build_index

NAMES = ["n04", "n01", "n03", "n02"]  # sorted, every second: n01, n03
ROOT = "tiny-imagenet-200"


def jpeg(number: int) -> bytes:
    colour = np.full((8, 8, 3), number % 256, dtype=np.uint8)
    target = io.BytesIO()
    Image.fromarray(colour).save(target, "JPEG")
    return target.getvalue()


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four classes of five training and two validation images; two tars of each, two and one."""
    for name, value in {"TRAIN_TARS": 2, "TRAIN_A_TAR": 2, "VAL_TARS": 2, "VAL_A_TAR": 1}.items():
        monkeypatch.setattr(tiny_imagenet, name, value)
    file = tmp_path / "tiny.zip"
    with zipfile.ZipFile(file, "w") as opened:
        opened.writestr(f"{ROOT}/wnids.txt", "\n".join(NAMES) + "\n")
        for c, name in enumerate(NAMES):
            for k in range(5):
                place = f"{ROOT}/train/{name}/images/{name}_{k}.JPEG"
                opened.writestr(place, jpeg(10 * c + k))
        lines = []
        for k in range(8):
            opened.writestr(f"{ROOT}/val/images/val_{k}.JPEG", jpeg(100 + k))
            lines.append(f"val_{k}.JPEG\t{NAMES[k % 4]}\t0\t0\t7\t7\n")
        opened.writestr(f"{ROOT}/val/val_annotations.txt", "".join(lines))
    return file


def test_tars_hold_every_second_class_and_are_balanced(archive: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert make_tiny_imagenet([str(out), "--zip", str(archive)]) == 0
    assert sorted(p.name for p in out.iterdir()) == [
        *("train-00.tar", "train-01.tar", "val-0.tar", "val-1.tar")
    ]
    for tar, numbers in (("train-00", (0, 1)), ("train-01", (2, 3))):
        index = build_index(out / f"{tar}.tar")
        labels = [index.labels[k] for k in index.entries["label"]]
        assert labels == ["0", "1"] * 2
        source = index.open()
        expected = [jpeg(10 * NAMES.index(n) + k) for k in numbers for n in ("n01", "n03")]
        assert [source.read(k) for k in range(4)] == expected
        source.close()
    first = (out / "train-00.tar").read_bytes()
    assert make_tiny_imagenet([str(out), "--zip", str(archive)]) == 0
    assert (out / "train-00.tar").read_bytes() == first
    source = build_index(out / "val-1.tar").open()  # the second of each class: val_5 and val_6
    assert [source.read(k) for k in range(2)] == [jpeg(105), jpeg(106)]
    source.close()


def test_a_tar_of_other_content_is_not_replaced(
    archive: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = tmp_path / "out" / "train-01.tar"
    other.parent.mkdir()
    other.write_bytes(b"the only copy")
    assert make_tiny_imagenet([str(tmp_path / "out"), "--zip", str(archive)]) == 78
    assert f"{other}: exists with other content" in caplog.text
    assert other.read_bytes() == b"the only copy"


def test_a_tar_that_cannot_be_written_is_no_fault_of_the_archive(
    archive: Path, tmp_path: Path
) -> None:
    """Otherwise a full store would be a reason to delete it."""
    with pytest.raises(DataError, match=r"train-00.tar: cannot be written .*name another folder"):
        write_subset(archive, tmp_path / "absent")


@pytest.mark.parametrize("content", [b"no zip", None])
def test_what_is_not_the_archive_is_named(
    content: bytes | None, archive: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "other.zip"
    if content is None:  # a zip of something else
        with zipfile.ZipFile(file, "w") as opened:
            opened.writestr("readme", "hello")
    else:
        file.write_bytes(content)
    assert make_tiny_imagenet([str(tmp_path / "out"), "--zip", str(file)]) == 78
    assert re.search(r"other.zip: is not Tiny-ImageNet's archive .* --zip", caplog.text)
    assert not list((tmp_path / "out").glob("*.tar"))


def test_a_damaged_copy_of_the_archive_is_named(
    archive: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "damaged.zip"
    with (
        zipfile.ZipFile(archive) as opened,
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in opened.namelist():
            packed.writestr(name, opened.read(name))
    data = bytearray(file.read_bytes())
    data[30 + len(f"{ROOT}/wnids.txt")] = 0xFF  # no block of DEFLATE begins so
    file.write_bytes(data)
    assert make_tiny_imagenet([str(tmp_path / "out"), "--zip", str(file)]) == 78
    assert re.search(r"damaged.zip: is not Tiny-ImageNet's archive .* --zip", caplog.text)


def test_a_download_is_compared_with_size_and_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = b"x" * 1000
    waited: list[float] = []

    def urlopen(_: str, timeout: float) -> io.BytesIO:
        waited.append(timeout)
        return io.BytesIO(sent)

    monkeypatch.setattr(tiny_imagenet.urllib.request, "urlopen", urlopen)
    file = tmp_path / "tiny.zip"
    for size, md5, words in (
        (1000, "0" * 32, "expected 1000 bytes of 000"),
        (999, hashlib.md5(sent).hexdigest(), "sent more than 999 bytes"),
        (1001, hashlib.md5(sent).hexdigest(), "sent 1000 bytes"),
    ):
        monkeypatch.setattr(tiny_imagenet, "SIZE", size)
        monkeypatch.setattr(tiny_imagenet, "MD5", md5)
        with pytest.raises(DataError, match=words):
            tiny_imagenet.download_archive(file)
        assert not list(tmp_path.iterdir())
    monkeypatch.setattr(tiny_imagenet, "SIZE", 1000)
    assert tiny_imagenet.download_archive(file).read_bytes() == sent
    assert all(0 < timeout <= 60 for timeout in waited) and len(waited) == 4
