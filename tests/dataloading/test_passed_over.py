"""Nothing is dropped without being counted: one line by extension, an error above half."""

import io
import logging
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from dataloading.errors import DataError
from dataloading.index import Index, build_index
from dataloading.kept_index import load_or_build
from dataloading.passed_over import extension_of
from tests.dataloading.bad_data_case import PNG
from tests.dataloading.tar_case import write_tar


def write_files(root: Path, names: Sequence[str]) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(PNG)
    return root


def images(count: int, form: str = "{}.png") -> list[tuple[str, bytes]]:
    return [(form.format(i), PNG) for i in range(count)]


def counts(index: Index) -> dict[tuple[str, str], int]:
    return {(item.kind, item.extension): item.number for item in index.passed_over}


def test_files_of_a_folder_are_counted_by_extension(tmp_path: Path, caplog) -> None:
    good = [f"c/{i}.png" for i in range(6)] + ["c/6.PNG", "d/7.JPEG"]
    lost = ["c/a.HEIC", "c/b.heic", "c/c.png.1", "c/d", "d/e.jpg~", "d/f.zip", "d/g.jpg (1)"]
    known = ["notes.txt", "README", "c/0.json", "c/._0.png", "__MACOSX/c/._1.png", ".DS_Store"]
    root = write_files(tmp_path, good + lost + known)
    (root / "gone.heic").symlink_to("nowhere")
    (root / "empty").mkdir()
    with caplog.at_level(logging.INFO):
        index = build_index(root)
    assert list(index.names) == sorted(good) and not index.excluded
    assert counts(index) == {
        ("file", ".heic"): 3,
        ("file", ".png.1"): 1,
        ("file", ""): 1,
        ("file", ".jpg~"): 1,
        ("file", ".jpg (1)"): 1,
        ("file", ".zip"): 1,
        ("file", ".txt"): 1,
        ("beside", ""): 1,
        ("beside", ".json"): 1,
        ("hidden", ""): 3,
        ("empty", ""): 1,
    }
    (record,) = [record for record in caplog.records if "passed over" in record.getMessage()]
    text = record.getMessage()
    assert record.levelno == logging.WARNING
    assert text.startswith(f"{root}: 15 files passed over: 3 ") and "3 .heic" in text
    assert "1 without extension" in text and "c/a.HEIC: this format is not read; convert" in text
    assert "d/f.zip: archives are not read in place; unpack them" in text


def test_documents_and_sidecars_alone_are_no_warning_and_no_error(tmp_path: Path, caplog) -> None:
    names = [f"{i}{extension}" for i in range(3) for extension in (".png", ".xml", ".npy", ".mask")]
    with caplog.at_level(logging.INFO):
        index = build_index(write_files(tmp_path, [*names, "LICENSE", "data.yaml", "._0.png"]))
    assert len(index) == 3 and sum(counts(index).values()) == 12
    (record,) = [record for record in caplog.records if "passed over" in record.getMessage()]
    assert record.levelno == logging.INFO


@pytest.mark.parametrize("extension", ["HEIC", "jpg.1", "cr2", "unknown", ""])
def test_more_than_half_of_a_folder_is_an_error(tmp_path: Path, extension: str) -> None:
    others = [f"b{i}.{extension}".rstrip(".") for i in range(3)]
    root = write_files(tmp_path, ["0.png", "1.png", *others[:2]])
    assert len(build_index(root)) == 2  # half
    write_files(root, others)
    found = f"3 .{extension.lower()}" if extension else "3 without extension"
    with pytest.raises(DataError, match="more than half of the files, 3 of 5") as caught:
        build_index(root)
    assert f"3 files passed over: {found}" in str(caught.value) and caught.value.exit_code == 78


def test_a_folder_without_images_names_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"no image files .* 3 files passed over: 3 \.tar\.gz.*folder"
    ):
        build_index(write_files(tmp_path / "a", [f"{i}.tar.gz" for i in range(3)]))
    with pytest.raises(DataError, match=r"2 \.tar; train/x.tar: tars are read where data.path is"):
        build_index(write_files(tmp_path / "b", ["train/x.tar", "val/x.tar"]))
    with pytest.raises(DataError, match=r"1 .parquet; d/a.parquet: Parquet files are read from a "):
        build_index(write_files(tmp_path / "c", ["d/a.parquet"]))
    with pytest.raises(DataError, match=r"x.zip: is not a folder but an archive.*unpack it"):
        build_index(write_files(tmp_path, ["x.zip"]) / "x.zip")


def test_an_image_whose_key_has_a_dot_is_counted_and_named(tmp_path: Path, caplog) -> None:
    dots = images(40, "img_{}.v2.0.png")
    path = write_tar(tmp_path / "a.tar", [*images(40, "b_{}.png"), *dots, ("b_1.seg.png", PNG)])
    index = build_index(path)
    assert len(index) == 40 and counts(index) == {("key", ".png"): 40, ("second", ".png"): 1}
    assert "41 members passed over: 40 .png behind a second dot" in caplog.text
    assert "the extension is .v2.0.png; rename such members, for example to img_0_v2_0.png" in (
        caplog.text
    )
    with pytest.raises(DataError, match=r"more than half of the members, 40 of 79, .*img_0_v2_0"):
        build_index(write_tar(tmp_path / "a.tar", [*images(39), *dots]))
    with pytest.raises(DataError, match=r"no usable image in 1 tar file; 40 members passed over"):
        build_index(write_tar(tmp_path / "a.tar", dots))


def test_members_of_other_formats_and_ignored_labels_are_counted(tmp_path: Path, caplog) -> None:
    others = ["x.heic", "noext", "._0.png", "__MACOSX/._1.png", "2.cls.txt", "3.json", "y.cls"]
    members = [*images(9), ("1.cls", b"4"), ("1.json", b"{}"), ("1.npy", b"x")]
    members += [(name, b"x") for name in others]
    path = write_tar(tmp_path / "tars" / "a.tar", members)
    (tmp_path / "tars" / "b.tar.gz").write_bytes(b"x")
    expected = {
        ("file", ".heic"): 1,
        ("file", ""): 1,
        ("hidden", ""): 2,
        ("label", ".cls.txt"): 1,
        ("label", ".json"): 1,
        ("file", ".cls"): 1,
    }
    assert counts(build_index(path)) == expected
    caplog.clear()
    assert counts(build_index(path.parent)) == {**expected, ("file", ".tar.gz"): 1}
    assert "1 .json beside images without .cls" in caplog.text
    assert "a.tar/2.cls.txt: labels are read from KEY.cls only" in caplog.text


def test_links_in_a_tar_are_counted_and_named(tmp_path: Path, caplog) -> None:
    """As ``tar`` stores the second of two names of one file."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in images(3):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for name, kind in (
            ("d/h.png", tarfile.LNKTYPE),
            ("s.v1.PNG", tarfile.SYMTYPE),
            ("latest", tarfile.SYMTYPE),
            ("old.txt", b"M"),
            ("d", tarfile.DIRTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "0.png"
            tar.addfile(info)
    index = build_index(path)
    assert len(index) == 3 and index.excluded == ()
    assert counts(index) == {("link", ".png"): 2, ("beside", ""): 1, ("beside", ".txt"): 1}
    record = next(r for r in caplog.records if "4 members passed over" in r.getMessage())
    assert record.levelname == "WARNING" and "2 .png that are links or devices" in record.message
    assert "d/h.png: links within a tar are not followed; write the tar with" in record.message


def test_a_label_that_is_a_link_is_named(tmp_path: Path) -> None:
    """As ``tar`` stores it after a program that links equal files."""
    path = write_tar(tmp_path / "a.tar", [*images(2), ("0.cls", b"7")])
    link = tarfile.TarInfo("1.cls")
    link.type, link.linkname = tarfile.LNKTYPE, "0.cls"
    with tarfile.open(path, "a") as tar:
        tar.addfile(link)
    index = build_index(path)
    assert index.entries["label"].tolist() == [0, -1] and index.unused_images() == []
    ((name, reason),) = index.label_faults()
    assert name.endswith("of a.tar (1.cls)")
    assert reason == "a link, which is not followed; its image has no label"


def test_sidecars_of_labelled_images_are_not_passed_over(tmp_path: Path) -> None:
    members = [*images(4), *((f"{i}{ext}", b"1") for i in range(4) for ext in (".cls", ".json"))]
    assert build_index(write_tar(tmp_path / "a.tar", members)).passed_over == ()


def test_counts_survive_a_reload(tmp_path: Path, caplog) -> None:
    write_tar(tmp_path / "tars" / "a.tar", [*images(3), ("x.heic", b"x")])
    write_files(tmp_path / "folder", ["0.png", "1.HEIC"])
    for name in ("tars", "folder"):
        built = load_or_build(tmp_path / name, tmp_path / "kept" / name)
        with caplog.at_level(logging.INFO):
            caplog.clear()
            loaded = load_or_build(tmp_path / name, tmp_path / "kept" / name)
        assert (
            loaded.passed_over == built.passed_over and loaded.passed_over[0].extension == ".heic"
        )
        (record,) = caplog.records  # loaded, not built
        assert "passed over: 1 .heic" in record.getMessage()


def test_many_extensions_are_counted_together(tmp_path: Path) -> None:
    names = [f"0.x{i}" for i in range(80)]
    index = build_index(write_files(tmp_path, ["0.png", *names]))
    assert len(index.passed_over) == 65 and sum(counts(index).values()) == 80


@pytest.mark.parametrize(
    ("name", "extension"),
    [
        ("a.HEIC", ".heic"),
        ("a.jpg.12", ".jpg.12"),
        ("a.tar.gz", ".tar.gz"),
        ("frame.000123", ""),
        ("a.jpg_large", ".jpg_large"),
        ("Mr. Smith and a friend", ""),
        ("a.", ""),
    ],
)
def test_extension_of(name: str, extension: str) -> None:
    assert extension_of(name) == extension
