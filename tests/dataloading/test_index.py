import errno
import io
import json
import os

import numpy as np
import pytest
from PIL import Image, features

import dataloading.folders
from dataloading import headers
from dataloading.data_set import Request, list_data
from dataloading.entries import ENTRY
from dataloading.errors import DataError, ReadError
from dataloading.headers import (
    HeaderError,
    has_avif,
    header_of_file,
    header_of_range,
    size_of_bytes,
)
from dataloading.index import build_index
from dataloading.kept_index import build_kept, find_kept, load_or_build, write_index
from tests.dataloading.bad_data_case import AVIF
from tests.dataloading.tar_case import write_tar
from tests.references.index_digest import folder_digest


def test_folder_is_listed_in_order_with_sizes_and_labels(photographs):
    index = build_index(photographs)
    assert list(index.names) == sorted(index.names) and len(index) == 12
    assert index.labels == ("class0", "class1", "class2")
    assert index.entries.dtype == ENTRY
    source = index.open()
    for i, name in enumerate(index.names):
        row = index.entries[i]
        with Image.open(photographs / name) as image:
            assert (row["width"], row["height"]) == image.size
        assert index.labels[row["label"]] == name.split("/")[0]
        assert source.read(i) == (photographs / name).read_bytes()
        assert row["size"] == len(source.read(i))
        assert row["flags"] == 0


def test_files_directly_under_the_folder_have_no_label(tmp_path, picture):
    picture(0, 20, 30).save(tmp_path / "b.png")
    (tmp_path / "a").mkdir()
    picture(1, 20, 30).save(tmp_path / "a" / "c.webp")
    index = build_index(tmp_path, source="folder")
    assert list(index.names) == ["a/c.webp", "b.png"]
    assert index.entries["label"].tolist() == [0, -1]


def test_digest_is_stable_and_follows_keys_and_sizes(photographs, tmp_path):
    digest = build_index(photographs).digest
    moved = photographs.rename(tmp_path / "elsewhere")
    for path in moved.rglob("*.jpg"):
        os.utime(path, (1, 1))
    assert build_index(moved).digest == digest
    (moved / "class0" / "00.jpg").rename(moved / "class0" / "0x.jpg")
    renamed = build_index(moved).digest
    assert renamed != digest
    with (moved / "class0" / "0x.jpg").open("ab") as file:
        file.write(b"\0")
    assert build_index(moved).digest not in (digest, renamed)


def test_unusable_files_are_excluded_with_reasons(photographs, picture):
    good = build_index(photographs)
    (photographs / "empty.jpg").touch()
    (photographs / "text.jpg").write_text("this is not an image")
    (photographs / "header.jpg").write_bytes((photographs / good.names[0]).read_bytes()[:30])
    (photographs / "gone.jpg").symlink_to("nowhere.jpg")
    picture(0, 300, 200).save(photographs / "large.png")
    (photographs / "notes.txt").write_text("skipped")
    (photographs / ".hidden.jpg").write_text("skipped")
    index = build_index(photographs, max_pixels=59_999)
    assert dict(index.excluded) == {
        "empty.jpg": "empty file",
        "gone.jpg": "cannot be read: No such file or directory",
        "header.jpg": "JPEG ends before its frame header",
        "large.png": "300 x 200 has more than 59999 pixels (max_pixels)",
        "text.jpg": "not an image of a known format",
    }
    assert list(index.names) == list(good.names) and index.digest == good.digest


def test_link_to_a_folder_above_ends(photographs):
    (photographs / "class0" / "again").symlink_to(photographs)
    assert len(build_index(photographs)) == 12


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "does not exist; set data.path to a folder of images"),
        (lambda p: p.write_text("x"), "is not a folder; set data.path to a folder of images"),
        (lambda p: p.mkdir(), r"no image files \(.jpg, .png, .webp ...\) found; set data.path"),
    ],
)
def test_missing_or_empty_folder_is_the_users_error(tmp_path, make, message):
    path = tmp_path / "photos"
    make(path)
    with pytest.raises(DataError, match=message) as caught:
        build_index(path)
    assert str(path) in str(caught.value)
    assert caught.value.exit_code == 78


def test_a_single_image_is_told_to_go_into_a_folder(tmp_path):
    path = tmp_path / "a b.JPG"
    path.touch()
    with pytest.raises(DataError, match=r"is not a folder but an image: put it, or a link to it"):
        build_index(path)


def test_folder_without_a_usable_image_is_the_users_error(tmp_path):
    (tmp_path / "a.jpg").touch()
    with pytest.raises(DataError, match=r"none of 1 image files is usable; first: a.jpg \(empty"):
        build_index(tmp_path)


def test_unknown_source_is_refused(photographs):
    with pytest.raises(ValueError, match="source is 'tar'"):
        build_index(photographs, source="tar")  # pyright: ignore


def test_kept_index_is_used_while_the_files_are_the_same(photographs, tmp_path, monkeypatch):
    (photographs / "empty.jpg").touch()
    built = load_or_build(photographs, tmp_path / "kept")
    assert [p.suffix for p in sorted((tmp_path / "kept").iterdir())] == [".bin", ".json"]
    monkeypatch.delattr(dataloading.folders, "header_of_file")  # reading a header would fail
    loaded = load_or_build(photographs, tmp_path / "kept")
    assert loaded.digest == built.digest == folder_digest(loaded.names, loaded.entries)
    assert list(loaded.names) == list(built.names) and loaded.labels == built.labels
    assert loaded.excluded == built.excluded
    assert np.array_equal(loaded.entries, built.entries)


def test_index_is_built_again_when_a_file_changes(photographs, tmp_path, picture):
    kept = tmp_path / "kept"
    before = load_or_build(photographs, kept)
    name = before.names[0]
    picture(5, 61, 47).save(photographs / name)
    after = load_or_build(photographs, kept)
    assert (after.entries[0]["width"], after.entries[0]["height"]) == (61, 47)
    assert after.digest != before.digest
    (photographs / name).unlink()
    assert len(load_or_build(photographs, kept)) == 11
    picture(5, 61, 47).save(photographs / "new.png")
    assert "new.png" in load_or_build(photographs, kept).names


def test_other_pixel_limit_builds_again(photographs, tmp_path):
    assert len(load_or_build(photographs, tmp_path / "kept")) == 12
    fewer = load_or_build(photographs, tmp_path / "kept", max_pixels=12_500)
    assert 0 < len(fewer) < 12


@pytest.mark.parametrize("name", ["index-*.bin", "index.json"])
def test_damaged_index_is_built_again(photographs, tmp_path, name):
    kept = tmp_path / "kept"
    digest = load_or_build(photographs, kept).digest
    (path,) = kept.glob(name)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    assert load_or_build(photographs, kept).digest == digest
    assert path.read_bytes() == data


def test_an_index_removes_nothing_of_the_users_from_its_folder(photographs, tmp_path):
    others = [tmp_path / name for name in ("index.npy", "index-train.bin", "parts/x.csv")]
    for file in others:
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"the only copy")
    load_or_build(photographs, tmp_path)
    load_or_build(photographs, tmp_path, max_pixels=12_500)
    assert [file.read_bytes() for file in others] == [b"the only copy"] * 3
    assert len(list((tmp_path / "parts").iterdir())) == 1
    assert len(list(tmp_path.glob("index-*.bin"))) == 2


@pytest.mark.parametrize("text", ['{"shards": [], "version": 2}', "[]", '[{"file": 1}]', "7"])
def test_an_index_json_of_another_program_is_not_replaced(photographs, tmp_path, text):
    (tmp_path / "index.json").write_text(text)
    listing = list_data(Request(photographs))
    for build in (
        lambda: load_or_build(photographs, tmp_path),
        lambda: build_kept(listing, tmp_path),  # check-data --index
    ):
        with pytest.raises(DataError, match=r"json: is not an index of images.* a folder of its"):
            build()
    assert (tmp_path / "index.json").read_text() == text


def test_the_locked_folder_of_an_index_is_named(photographs, tmp_path, monkeypatch):
    stat = os.stat

    def look_up(path, *arguments, **options):
        if str(path).startswith(f"{tmp_path}/locked/"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return stat(path, *arguments, **options)

    monkeypatch.setattr(os, "stat", look_up)
    with pytest.raises(DataError, match=r"locked: the index cannot be written \(Permission den"):
        load_or_build(photographs, tmp_path / "locked")


def test_an_index_of_format_3_is_replaced_with_its_file(photographs, tmp_path):
    facts = {"format": 3, "listing": "0", "npy_sha256": "0"}
    (tmp_path / "index.json").write_text(json.dumps(facts))
    (tmp_path / "index.npy").touch()
    load_or_build(photographs, tmp_path)
    assert not (tmp_path / "index.npy").exists()


def test_what_is_verified_of_a_kept_index(photographs, tmp_path, picture):
    kept = tmp_path / "kept"
    load_or_build(photographs, kept)
    built = build_index(photographs)  # not mapped from what is damaged now
    (path,) = kept.glob("index-*.bin")
    data = bytearray(path.read_bytes())
    data[12] ^= 1  # of the first row's size, as a failing disk may
    path.write_bytes(data)
    changed = load_or_build(photographs, kept)  # names, sizes and times are as they were
    assert changed.entries["size"][0] != built.entries["size"][0]
    always = load_or_build(photographs, kept, verify="always")
    assert always.entries.tobytes() == build_index(photographs).entries.tobytes()
    picture(5, 61, 47).save(photographs / built.names[0])
    never = load_or_build(photographs, kept, verify="never")
    assert never.digest == built.digest and never.passed_over == built.passed_over
    assert load_or_build(photographs, kept, "folder", 12_500, verify="never").digest != built.digest


def test_an_index_that_is_not_verified_is_of_this_very_data_set(
    photographs, tmp_path, picture, monkeypatch, caplog
):
    kept, other = tmp_path / "kept", tmp_path / "other"
    for folder in (other / "a", tmp_path / "tars"):
        folder.mkdir(parents=True)
    picture(1, 20, 30).save(other / "a" / "b.png")
    write_tar(tmp_path / "tars" / "x.tar", [("b.png", (other / "a" / "b.png").read_bytes())])
    assert len(load_or_build(photographs, kept, verify="never")) == 12
    monkeypatch.chdir(photographs.parent)
    with monkeypatch.context() as patch:
        patch.setattr("dataloading.kept_index.list_data", None)  # nothing is listed
        assert len(load_or_build(photographs.name, kept, verify="never")) == 12
    for path, names, before in [
        (other, ["a/b.png"], photographs),
        (tmp_path / "tars", ["byte 512 of x.tar"], other),
        (other, ["a/b.png"], tmp_path / "tars"),
    ]:
        assert list(load_or_build(path, kept, verify="never").names) == names
        assert f"the index is built again: it is the index of {before}" in caplog.text
        caplog.clear()
    both = photographs / "x.tar"
    both.write_bytes((tmp_path / "tars" / "x.tar").read_bytes())
    for source, number in [("folder", 12), ("webdataset", 1), ("folder", 12)]:
        assert len(load_or_build(photographs, kept, source, verify="never")) == number


def test_an_index_without_its_path_is_used_while_the_files_are_the_same(
    photographs, tmp_path, monkeypatch
):
    kept = tmp_path / "kept"
    load_or_build(photographs, kept)
    moved = photographs.rename(tmp_path / "moved")
    facts = json.loads((kept / "index.json").read_text())
    for known in ({}, {"root": facts.pop("root")}):  # without: of an earlier version
        (kept / "index.json").write_text(json.dumps(facts | known))
        with monkeypatch.context() as patch:
            patch.delattr(dataloading.folders, "header_of_file")  # reading a header would fail
            for verify in ("never", "changed", "always"):
                assert len(load_or_build(moved, kept, verify=verify)) == 12
    os.utime(next(moved.rglob("*.jpg")), (1, 1))
    load_or_build(moved, kept, verify="never")
    assert json.loads((kept / "index.json").read_text())["root"] == str(moved)


def test_an_image_that_could_not_be_read_is_looked_at_by_every_launch(
    photographs, tmp_path, monkeypatch, caplog
):
    caplog.set_level("INFO")
    kept, header_of_file = tmp_path / "kept", dataloading.folders.header_of_file
    (photographs / "gone.jpg").symlink_to("nowhere.jpg")
    (photographs / "empty.jpg").touch()
    locked = {photographs / "class0" / name for name in ("00.jpg", "03.jpg")}

    def read(path):
        if path in locked:
            raise PermissionError(errno.EACCES, "Permission denied")
        return header_of_file(path)

    monkeypatch.setattr(dataloading.folders, "header_of_file", read)
    for verify in ("changed", "changed", "always", "never"):
        index = load_or_build(photographs, kept, verify=verify)
        assert len(index) == 10
        assert ("class0/00.jpg", "cannot be read: Permission denied") in index.excluded
        text = f"{photographs}: 4 files excluded or damaged; {kept / 'index.json'} lists them"
        assert text in caplog.text and "built again" not in caplog.text
        caplog.clear()
    locked.pop()
    assert len(load_or_build(photographs, kept, verify="never")) == 10
    used, _ = find_kept(Request(photographs), kept, "always", recheck_excluded=False)
    assert used is not None and len(used) == 10  # a run that resumes
    assert len(load_or_build(photographs, kept)) == 11
    assert "jpg was excluded and may be usable now" in caplog.text
    locked.clear()
    index = load_or_build(photographs, kept)
    assert len(index) == 12 and index.digest == build_index(photographs).digest


@pytest.mark.parametrize("kind", ["folder", "tars", "published"])
def test_an_image_that_pillow_lacked_is_used_by_a_newer_pillow(
    photographs, tmp_path, kind, monkeypatch
):
    if not has_avif():
        pytest.skip("this Pillow knows no AVIF")
    path, kept = photographs, tmp_path / "kept"
    (photographs / "a.avif").write_bytes(AVIF)
    (photographs / "b.avif").write_bytes(AVIF[:40])  # damaged for every Pillow
    if kind != "folder":
        path = tmp_path / "tars"
        files = sorted(photographs.rglob("*.*"))
        write_tar(path / "x.tar", [(file.name, file.read_bytes()) for file in files])
    with monkeypatch.context() as patch:
        patch.delitem(features.modules, "avif")
        formats = [name for name in headers._FORMATS if name != "AVIF"]
        patch.setattr(headers, "_FORMATS", formats)
        index = build_index(path) if kind == "published" else load_or_build(path, kept)
        assert [reason for _, reason in index.excluded] == [
            "not an image of a known format (AVIF, which this Pillow lacks: install Pillow 11.3 or "
            "later)"
        ] * 2
        if kind == "published":
            write_index(list_data(Request(path)), index)
        assert len(load_or_build(path, kept)) == 12
    assert len(load_or_build(path, kept)) == 13
    monkeypatch.setattr("dataloading.kept_index.build_kept", None)
    assert len(load_or_build(path, kept)) == 13


def test_index_folder_that_cannot_be_made_is_the_users_error(photographs, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot be written .* set data.index"):
        load_or_build(photographs, tmp_path / "file" / "kept")


@pytest.mark.parametrize(
    ("number", "remedy"),
    [(errno.ENOSPC, "make room there"), (errno.ESTALE, "see that the storage works")],
)
def test_a_store_that_refuses_an_index_may_take_it_later(
    photographs, tmp_path, monkeypatch, number, remedy
):
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("dataloading.index_file.publish", fail)
    with pytest.raises(ReadError, match=rf"the index cannot be written .*; {remedy} and try again"):
        load_or_build(photographs, tmp_path / "kept")


@pytest.mark.parametrize(("mode", "progressive"), [("RGB", True), ("L", False), ("CMYK", False)])
def test_jpeg_size_is_found_behind_long_metadata(tmp_path, picture, mode, progressive):
    for length in (0, 1000, 5000, 60000):
        path = tmp_path / f"{length}.jpg"
        image = picture(0, 70, 33).convert(mode)
        profile = b"\xff" * length  # looks like markers
        image.save(path, progressive=progressive, icc_profile=profile or None, comment=b"\xff\xc0")
        assert header_of_file(path)[:2] == size_of_bytes(path.read_bytes()) == (70, 33)


def test_jpeg_size_is_found_behind_more_than_the_prefix(tmp_path, picture):
    path = tmp_path / "a.jpg"
    picture(0, 70, 33).save(path, icc_profile=b"\0" * 200_000)
    assert header_of_file(path)[:2] == (70, 33)


@pytest.mark.parametrize("suffix", ["png", "bmp", "gif", "tiff", "webp"])
def test_sizes_of_other_formats(tmp_path, picture, suffix):
    path = tmp_path / f"a.{suffix}"
    picture(0, 31, 17).save(path)
    assert header_of_file(path)[:2] == size_of_bytes(path.read_bytes()) == (31, 17)


def test_every_cut_of_a_header_is_refused(tmp_path, picture):
    path = tmp_path / "a.jpg"
    picture(0, 31, 17).save(path)
    data = path.read_bytes()
    start = data.index(b"\xff\xc0")
    for cut in range(start + 9):
        path.write_bytes(data[:cut])
        with pytest.raises(HeaderError):
            size_of_bytes(data[:cut])
        with pytest.raises(HeaderError):
            header_of_file(path)
    with pytest.raises(HeaderError, match="31 x 0 pixels"):
        size_of_bytes(data[: start + 5] + b"\0\0" + data[start + 7 :])


@pytest.mark.parametrize("profile", [0, 5000, 200_000])
def test_size_within_a_file_is_that_of_the_bytes(tmp_path, picture, profile):
    for form in ("JPEG", "PNG", "TIFF", "WEBP"):
        file = io.BytesIO()
        picture(0, 70, 33).save(file, form, icc_profile=b"\0" * profile or None)
        data = file.getvalue()
        (tmp_path / "a").write_bytes(b"x" * 777 + data + b"\xff\xd8\xff" * 1000)
        descriptor = os.open(tmp_path / "a", os.O_RDONLY)
        assert header_of_range(descriptor, 777, len(data))[:2] == size_of_bytes(data) == (70, 33)
        for cut in (0, 1):
            with pytest.raises(HeaderError):
                header_of_range(descriptor, 777, cut)
        os.close(descriptor)
