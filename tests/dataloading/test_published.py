"""An index that is published beside tars is used unchanged, if it belongs to these tars."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from dataloading import index_file
from dataloading.data_set import Request, list_data, warn_of_many_files
from dataloading.entries import ENTRY
from dataloading.errors import DataError
from dataloading.index import Index, build_index, build_listed
from dataloading.kept_index import load_or_build, write_index
from tests.dataloading.store_case import RangeServer
from tests.dataloading.tar_case import reference, write_tar
from tests.dataloading.test_parts import equal, make_tars


@pytest.fixture
def tars(photographs: Path, tmp_path: Path) -> Path:
    """A copy of tars with their index, in other folders and of other times than the original."""
    make_tars(photographs, tmp_path / "tars" / "deep")
    listing = list_data(Request(tmp_path / "tars" / "deep"))
    path = write_index(listing, build_listed(listing))
    assert path.parent == tmp_path / "tars" / "deep" and path.name.startswith("image-index-")
    copy = copy_without_times(tmp_path / "tars", tmp_path / "copy")
    shutil.rmtree(tmp_path / "tars")
    return copy / "deep"


def copy_without_times(folder: Path, to: Path) -> Path:
    """Copy by name, the index first, as a slow ``cp -r`` does."""
    shutil.copytree(folder, to, copy_function=shutil.copyfile)
    for number, path in enumerate(sorted(to.rglob("*.*")), start=1):
        set_later(path, 100 * number)
    return to


def set_later(path: Path, seconds: float) -> None:
    time_s = path.stat().st_mtime + seconds
    os.utime(path, (time_s, time_s))


def swap_labels(tar: Path) -> None:
    """Edit a tar of one label so that its size stays."""
    members = [(name, tar.read_bytes()[at : at + size]) for name, at, size in reference(tar)]
    write_tar(tar, [(name, b"9" if name.endswith(".cls") else data) for name, data in members])


def labels_of(path: Path | str, kept: Path) -> tuple[str, ...]:
    index = load_or_build(path, kept)
    assert equal(index, build_index(path))
    return index.labels


def no_headers(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("dataloading.index_build.examine_shard", None)


@pytest.mark.parametrize("pattern", ["", "train-*.tar", "train-{0..3}.tar"])
def test_it_is_taken_without_reading_headers(
    tars: Path, tmp_path: Path, pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = build_index(tars / pattern)
    assert not any(item.extension == ".bin" for item in built.passed_over)
    no_headers(monkeypatch)
    taken = load_or_build(tars / pattern, tmp_path / "kept")
    assert equal(taken, built) and taken.open().read(3) == built.open().read(3)
    for path in tars.glob("image-index-*"):
        path.unlink()  # the copy in the folder is complete
    assert equal(load_or_build(tars / pattern, tmp_path / "kept", verify="always"), built)


def test_it_is_found_from_the_folder_of_the_tars(
    tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tars)
    built = build_index("train-{0..3}.tar")
    no_headers(monkeypatch)
    assert equal(load_or_build("train-{0..3}.tar", tmp_path / "kept"), built)


def test_another_of_other_tars_or_settings_is_not_taken(tars: Path, tmp_path: Path) -> None:
    fewer = load_or_build(tars / "train-{0..2}.tar", tmp_path / "fewer")
    assert len(fewer) == 9
    small = load_or_build(tars, tmp_path / "small", max_pixels=12_500)
    assert small.digest == build_index(tars, max_pixels=12_500).digest != fewer.digest


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("cut", "bytes, not those of 12 rows"),
        ("flip", "its rows are damaged"),
        ("text", "cannot be used"),
        ("empty", "it is cut short"),
        ("rows", "bytes, not those of 13 rows"),
        ("labels", "names tars or labels"),
        ("range", "names images beyond the end of their tar"),
        ("format", "of another format"),
        ("line", "cannot be used"),
    ],
)
def test_damaged_it_is_named_and_the_headers_are_read(
    tars: Path, tmp_path: Path, kind: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    (path,) = tars.glob("image-index-*")
    line, _, rows = path.read_bytes().partition(b"\n")
    facts = json.loads(line)
    beyond = np.frombuffer(rows, ENTRY).copy()
    beyond["offset"][5] += 1 << 20
    facts |= {
        "rows": {"images": 13},
        "labels": {"labels": []},
        "format": {"format": 3},
        "range": {"tree": index_file.hash_blocks(beyond.view(np.uint8))},
    }.get(kind, {})
    flipped = rows[:40] + bytes([rows[40] ^ 1]) + rows[41:]
    whole = json.dumps(facts).encode() + b"\n"
    data = {"cut": line + b"\n" + rows[:-1], "flip": whole + flipped, "text": b"<html>\n"}
    data |= {"empty": b"", "line": b"x" * 100, "range": whole + beyond.tobytes()}
    path.write_bytes(data.get(kind, whole + rows))
    index = load_or_build(tars, tmp_path / "kept")
    assert equal(index, build_index(tars))
    assert reason in caplog.text
    assert not list((tmp_path / "kept").glob(".*"))


def test_it_is_taken_from_a_store(
    tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = RangeServer(tars.parent)
    try:
        url = f"{server.url}/deep/train-{{0..3}}.tar"
        local, remote = build_index(tars), build_index(url)
        asked = len(server.requests)
        no_headers(monkeypatch)
        taken = load_or_build(url, tmp_path / "kept")
        assert equal(taken, remote) and taken.digest == local.digest
        read = {request.key for request in server.requests[asked:] if request.method == "GET"}
        assert len(read) == 1 and read.pop().startswith("deep/image-index-")
        assert np.array_equal(taken.entries, local.entries)
        listing = list_data(Request(url))
        with pytest.raises(DataError, match="nothing is written to stores; write the index into"):
            write_index(listing, taken)
        (path,) = tars.glob("image-index-*")
        again = write_index(listing, taken, tmp_path / "out")
        assert again.name == path.name
    finally:
        server.stop()


@pytest.mark.parametrize("copied", [False, True])  # as by rsync -a or cp -a
def test_it_is_not_taken_after_a_tar_has_changed_where_times_are_kept(
    photographs: Path,
    tmp_path: Path,
    copied: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tars = make_tars(photographs, tmp_path / "tars")
    listing = list_data(Request(tars))
    write_index(listing, build_listed(listing))
    if copied:
        tars = Path(shutil.copytree(tars, tmp_path / "copy"))
    with monkeypatch.context() as patch:
        no_headers(patch)
        assert load_or_build(tars, tmp_path / "first").labels == ("0", "1", "2", "3")
    swap_labels(tars / "train-2.tar")
    set_later(tars / "train-2.tar", 1)
    assert labels_of(tars, tmp_path / "second") == ("0", "1", "3", "9")
    assert "(train-2.tar has changed since, or was copied much later; publish the" in caplog.text
    assert "the headers of all images are read" in caplog.text
    for number in (0, 1, 3):
        swap_labels(tars / f"train-{number}.tar")
        set_later(tars / f"train-{number}.tar", 1)
    assert labels_of(tars, tmp_path / "third") == ("9",)
    listing = list_data(Request(tars))
    write_index(listing, build_listed(listing))
    no_headers(monkeypatch)
    assert load_or_build(tars, tmp_path / "fourth").labels == ("9",)


def test_it_is_not_taken_where_a_tar_was_written_long_after_it(
    tars: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    swap_labels(tars / "train-2.tar")
    set_later(tars / "train-2.tar", 3 * 3600)
    assert labels_of(tars, tmp_path / "kept") == ("0", "1", "3", "9")
    assert "(train-2.tar has changed since" in caplog.text


def test_one_of_an_earlier_release_is_taken(
    tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path,) = tars.glob("image-index-*")
    line, _, rows = path.read_bytes().partition(b"\n")
    facts = json.loads(line)
    del facts["versions"], facts["home"]
    path.write_bytes(json.dumps(facts).encode() + b"\n" + rows)
    no_headers(monkeypatch)
    assert len(load_or_build(tars, tmp_path / "kept")) == 12


def test_it_is_not_taken_where_a_kept_one_shows_that_tars_have_changed(
    tars: Path, tmp_path: Path
) -> None:
    assert load_or_build(tars, tmp_path / "kept").labels == ("0", "1", "2", "3")
    swap_labels(tars / "train-2.tar")  # soon after a copy without times
    assert labels_of(tars, tmp_path / "kept") == ("0", "1", "3", "9")


@pytest.mark.parametrize("home", [False, True])
def test_it_is_not_taken_after_a_tar_of_a_store_has_changed(
    tars: Path, tmp_path: Path, home: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("obstore", reason="the extra stores is not installed")
    server = RangeServer(tars.parent)
    try:
        url = f"{server.url}/deep/train-{{2..2}}.tar"
        listing = list_data(Request(url if home else tars / "train-2.tar"))
        path = write_index(listing, build_listed(listing), tmp_path / "out")
        shutil.copyfile(path, tars / path.name)
        with monkeypatch.context() as patch:
            no_headers(patch)
            assert load_or_build(url, tmp_path / "first").labels == ("2",)
        swap_labels(tars / "train-2.tar")
        set_later(tars / "train-2.tar", 20 if home else 2 * 3600)
        assert labels_of(url, tmp_path / "second") == ("9",)
    finally:
        server.stop()


def test_a_folder_has_none_and_many_files_are_a_warning(
    photographs: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    listing = list_data(Request(photographs))
    index: Index = build_listed(listing)
    with pytest.raises(DataError, match=r"beside tars only; .*--pack OUT"):
        write_index(listing, index)
    warn_of_many_files(listing)
    assert "--pack" not in caplog.text
    monkeypatch.setattr("dataloading.data_set.MANY_FILES", 11)
    warn_of_many_files(listing)
    text = "12 files, which every launch lists; pack them into tars (cmtmae check-data"
    assert f"{text} {photographs} --pack OUT)" in caplog.text
