"""A path that means something else than one data set is answered with the key to use."""

import errno
import os
import re
from pathlib import Path

import pytest

from dataloading.errors import DataError
from dataloading.index import build_index
from dataloading.kept_index import load_or_build
from dataloading.name_checks import find_equal_labels, find_splits
from dataloading.shard_patterns import has_files
from dataloading.webdataset import decode_class
from tests.dataloading.bad_data_case import PNG
from tests.dataloading.tar_case import write_tar
from tests.dataloading.test_passed_over import counts, images, write_files


@pytest.mark.parametrize(
    ("train", "test"),
    [("train", "val"), ("Training", "test"), ("x/train2017", "x/val2017"), ("a_train", "a_valid")],
)
def test_folders_of_two_splits_are_no_classes(tmp_path: Path, train: str, test: str) -> None:
    root = write_files(tmp_path, [f"{train}/c/0.png", f"{test}/c/1.png"])
    with pytest.raises(DataError, match="a training and a test set and no classes") as caught:
        build_index(root)
    assert f"holds {train}/ and {test}/" in str(caught.value)
    assert f"set data.path={root / train}, or data.source=folder" in str(caught.value)
    assert len(build_index(root / train)) == 1 and len(build_index(root, "folder")) == 2


def test_tars_of_two_splits_are_not_mixed(tmp_path: Path) -> None:
    for name in ("in1k-train-00", "in1k-train-01", "in1k-validation-00"):
        write_tar(tmp_path / f"{name}.tar", images(2))
    for path in (tmp_path, tmp_path / "*.tar"):
        with pytest.raises(DataError, match="of a training and of a test set") as caught:
            build_index(path)
        pattern = str(caught.value).partition("set data.path=")[2].partition(",")[0]
        assert pattern == f"{tmp_path}/in*k-train-*.tar"
        assert len(build_index(pattern)) == 4
        assert len(build_index(path, "webdataset")) == 6
    explicit = tmp_path / "in1k-{train-00,validation-00}.tar"
    assert len(build_index(explicit)) == 4


def test_classes_of_two_splits_each_are_not_mixed(tmp_path: Path) -> None:
    names = [f"{name}/{part}/0.png" for name in ("cat", "dog") for part in ("train", "test")]
    root = write_files(tmp_path, names)
    with pytest.raises(
        DataError, match=r"holds \*/train/ and \*/test/, .* with links to the train"
    ):
        build_index(root)
    assert len(build_index(root, "folder")) == 4
    assert len(build_index(write_files(tmp_path / "x", ["cat/train/0.png", "dog/0.png"]))) == 2


def test_one_tar_of_two_splits_is_not_mixed(tmp_path: Path, caplog) -> None:
    members = images(2, "in1k/train/{}.png") + images(2, "in1k/val/{}.png")
    path = write_tar(tmp_path / "a.tar", members)
    with pytest.raises(DataError, match=r"members are of in1k/train/ and in1k/val/, a training"):
        build_index(path)
    caplog.set_level("INFO")
    assert len(build_index(path, "webdataset")) == 4 and "all are used" in caplog.text
    assert len(build_index(write_tar(path, images(2, "train/{}.png")))) == 2


def test_pointers_and_web_pages_are_named(tmp_path: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    for name, content, words in (
        ("a.tar", pointer, "is not a tar but a Git-LFS pointer: run git lfs pull"),
        ("a.tar", b"<!DOCTYPE html><title>Sign in</title>".ljust(2000), "but a web page"),
        ("a.png", pointer, "not an image of a known format but a Git-LFS pointer"),
    ):
        folder = tmp_path / words[-9:]
        folder.mkdir()
        (folder / name).write_bytes(content)
        with pytest.raises(DataError, match=words):
            build_index(folder)


def test_words_are_found_in_any_writing() -> None:
    for names in (["TrainImages", "TestImages"], ["voc-trainval", "voc-test"], ["TRAIN", "Dev"]):
        assert find_splits(names) == tuple(names)


def test_classes_with_such_words_are_classes() -> None:
    assert find_splits(["train", "car", "bus"]) is None
    assert find_splits([*map(str, range(8)), "bullet train", "test tube"]) is None
    assert find_splits(["constrain", "valley", "latest"]) is None


def test_a_glob_is_the_folder_in_its_order(tmp_path: Path) -> None:
    folder = tmp_path / "data[1]"
    for i in (2, 0, 1):
        write_tar(folder / f"s-{i}.tar", images(2, f"{i}_{{}}.png"))
    whole = build_index(folder)
    for pattern in ("*.tar", "s-?.tar", "s-[0-2].tar", "s-*", "../data*/s-*.tar"):
        index = build_index(folder / pattern)
        assert index.digest == whole.digest and list(index.names) == list(whole.names)
    assert len(build_index(folder / "s-{0,2}*.tar")) == 4
    with pytest.raises(
        DataError, match=r"no .tar files found \(.* holds 3: s-0.tar ...\); set data"
    ):
        build_index(folder / "x-*.tar")
    with pytest.raises(DataError, match=r"no .tar files found; 1 file passed over: 1 .png"):
        build_index(write_files(tmp_path / "p", ["a.png"]) / "*.png")


def test_folders_that_a_pattern_matches_do_not_vanish(tmp_path: Path) -> None:
    write_tar(tmp_path / "s-a.tar", images(2))
    write_tar(tmp_path / "s-b" / "0.tar", images(2, "b_{}.png"))
    index = build_index(tmp_path / "s-*")
    assert counts(index) == counts(build_index(tmp_path)) == {("file", ".tar"): 1}
    assert len(index) == 2 and len(build_index(tmp_path / "**" / "*")) == 4
    write_tar(tmp_path / "s-b" / "1.tar", images(2, "c_{}.png"))
    for path in (tmp_path, tmp_path / "s-*"):
        with pytest.raises(DataError, match=r"only 1 of 3 archives are .tar files named or held"):
            build_index(path)


def test_more_compressed_tars_than_tars_are_an_error(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", images(1))
    write_files(tmp_path, ["b.tar.gz"])
    assert len(build_index(tmp_path)) == 1
    write_files(tmp_path, ["c.tar.gz"])
    with pytest.raises(
        DataError, match=r"only 1 of 3 archives are .tar files named or held directly; 2"
    ):
        build_index(tmp_path)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("[a.tar,b.tar]", "is it a list"),
        ("a.tar,b.tar", "is it a list"),
        ("a.tar::b.tar", "is it a list"),
        ("photos,more", "is it a list"),
        ("hf://datasets/photos", r"hf:// is not read; use s3://, gs:// or https://"),
        ("s3:/bucket/photos", "an address or a command is not read"),
        ("pipe:cat x.tar", "an address or a command is not read"),
        ("~/no/such", "~ is not expanded: write the full path"),
    ],
)
def test_paths_of_other_programs_are_explained(path: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        build_index(path)


def test_an_empty_path_is_not_the_working_folder(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(write_files(tmp_path, ["a.png"]))
    assert len(build_index(".")) == 1
    for use in (build_index, lambda path: load_or_build(path, tmp_path / "index")):
        with pytest.raises(DataError, match=r"the path of the images is empty; set data\.path"):
            use("")


def test_a_path_that_may_not_be_looked_up_is_refused_by_name(tmp_path: Path, monkeypatch) -> None:
    locked, stat = tmp_path / "locked", os.stat

    def look_up(path, *arguments, **options):
        if str(path).startswith(f"{locked}/"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return stat(path, *arguments, **options)

    monkeypatch.setattr(os, "stat", look_up)
    for name in ("photos", "train-*.tar"):
        path = locked / name
        for use in (build_index, has_files):
            with pytest.raises(DataError, match=re.escape(f"{path}: cannot be looked up (Perm")):
                use(path)


def test_a_long_list_in_braces_is_no_file_name(tmp_path: Path) -> None:
    names = [f"train-{number:06d}" for number in range(40)]
    for name in names:
        write_tar(tmp_path / f"{name}.tar", images(1))
    pattern = tmp_path / f"{{{','.join(names)}}}.tar"
    assert len(pattern.name) > 255 and has_files(pattern)
    assert len(build_index(pattern)) == 40
    with pytest.raises(DataError, match="does not exist"):
        build_index(tmp_path / ("x" * 300))


def test_class_texts_with_a_byte_order_mark_or_spaces_are_read(tmp_path: Path) -> None:
    texts = [b"\xef\xbb\xbf5", b"5\r\n", "5\n".encode("utf-16"), b" 5 ", b"\xef\xbb\xbf 7"]
    members = [*images(6), *((f"{i}.cls", text) for i, text in enumerate([*texts, b" \n"]))]
    index = build_index(write_tar(tmp_path / "a.tar", members))
    assert index.labels == ("5", "7") and index.entries["label"].tolist() == [0, 0, 0, 0, 1, -1]
    assert [reason for _, reason in index.excluded] == [
        "a class without text; its image has no label"
    ]
    assert decode_class("5".encode("utf-16-be")) != "5"  # without a mark it is not guessed


def test_labels_that_are_one_number_are_named(tmp_path: Path, caplog) -> None:
    members = [("a.png", PNG), ("a.cls", b"7"), ("b.png", PNG), ("b.cls", b"007")]
    build_index(write_tar(tmp_path / "a.tar", members))
    assert "the labels 007 and 7 are the same number and count as two classes" in caplog.text
    assert find_equal_labels(["000", "001", "cat", "-1", "7"]) is None
    assert find_equal_labels(["7", "7.0"]) and find_equal_labels(["+7", "07"])
