"""A killed build of an index continues; a verified index is opened by other processes."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dataloading.folders
import dataloading.webdataset
from dataloading.data_set import Request, list_data
from dataloading.errors import DataError
from dataloading.index import Index, build_index
from dataloading.kept_index import (
    build_kept,
    find_kept,
    help_index,
    load_or_build,
    open_kept,
    require_files,
    share_listing,
)
from tests.dataloading.tar_case import write_tar


class Killed(BaseException):
    """Ends a build like a signal."""


def make_tars(photographs: Path, folder: Path) -> Path:
    files = sorted(photographs.rglob("*.jpg"))
    for number in range(4):
        content = [(f"{path.stem}.jpg", path.read_bytes()) for path in files[number::4]]
        content += [(f"{path.stem}.cls", b"%d" % number) for path in files[number::4]]
        content += [("bad.jpg", b"no image"), ("notes.txt", b"text")]
        write_tar(folder / f"train-{number}.tar", content)
    return folder


def equal(one: Index, other: Index) -> bool:
    facts = [
        (i.source, list(i.names), i.labels, i.excluded, i.digest, i.passed_over, i.shards)
        for i in (one, other)
    ]
    return facts[0] == facts[1] and np.array_equal(one.entries, other.entries)


@pytest.mark.parametrize("kind", ["tars", "folder"])
def test_a_killed_build_continues(
    photographs: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, kept = photographs, tmp_path / "kept"
    module, name = dataloading.folders, "_examine"
    if kind == "tars":
        path = make_tars(photographs, tmp_path / "tars")
        module, name = dataloading.webdataset, "_examine_shard"
    monkeypatch.setattr("dataloading.index_build.FOLDER_PIECE", 3)
    monkeypatch.setattr("dataloading.index_build.READERS", 1)
    original = getattr(module, name)
    examined: list[Any] = []
    limit = 2 if kind == "tars" else 6

    def examine(*arguments: Any) -> Any:
        if len(examined) == limit:
            raise Killed
        examined.append(arguments)
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, examine)
        with pytest.raises(Killed):
            load_or_build(path, kept)
    parts = sorted((kept / "parts").iterdir())
    assert len(parts) == 2
    parts[0].write_bytes(parts[0].read_bytes()[:-1])  # as after a power cut
    examined.clear()
    limit = 99
    monkeypatch.setattr(module, name, examine)
    index = load_or_build(path, kept)
    assert len(examined) == (3 if kind == "tars" else 9)
    assert not (kept / "parts").exists()
    monkeypatch.undo()
    assert equal(index, build_index(path))
    assert equal(index, load_or_build(path, kept))


@pytest.mark.parametrize("kind", ["tars", "folder"])
def test_other_processes_open_what_one_has_verified(
    photographs: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_tars(photographs, tmp_path / "tars") if kind == "tars" else photographs
    first = load_or_build(path, tmp_path / "kept")
    monkeypatch.setattr("dataloading.kept_index.list_data", None)  # nothing is listed
    monkeypatch.setattr("dataloading.index_file.hashlib", None)  # and nothing is hashed
    other = open_kept(path, tmp_path / "kept", first.digest, first.list_shards())
    assert equal(first, other) and other.open().read(3) == first.open().read(3)
    with pytest.raises(DataError, match=r"its digest is .*, not 00000000"):
        open_kept(path, tmp_path / "kept", "0" * 64, first.list_shards())
    with pytest.raises(DataError, match="cannot be opened"):
        open_kept(path, tmp_path / "elsewhere", first.digest, first.list_shards())


@pytest.mark.parametrize("kind", ["tars", "folder"])
def test_ranks_share_the_work_of_a_build(
    photographs: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_tars(photographs, tmp_path / "tars") if kind == "tars" else photographs
    (photographs / "empty.jpg").touch()
    monkeypatch.setattr("dataloading.index_build.FOLDER_PIECE", 4)
    request, kept = Request(path), tmp_path / "kept"
    help_index(request, kept, (0, 2))  # no listing is shared: nothing to do
    found, listing = find_kept(request, kept, "changed")
    assert found is None and listing is not None
    share_listing(listing, kept)
    moved = path.rename(tmp_path / "moved")  # a rank that does not see the data keeps nothing
    help_index(request, kept, (0, 2))
    assert {one.suffix for one in (kept / "parts").iterdir()} == {".bin", ".json"}
    moved.rename(path)
    for rank in range(2):
        help_index(request, kept, (rank, 2))
    assert len(list((kept / "parts").iterdir())) == 2 + 4
    with monkeypatch.context() as patch:
        patch.setattr("dataloading.index_build.examine_shard", None)
        patch.setattr("dataloading.index_build.examine_files", None)
        index = build_kept(listing, kept)
    assert equal(index, build_index(path)) and not (kept / "parts").exists()


def test_a_piece_with_an_unreadable_image_is_examined_again(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (photographs / "class0" / "gone.jpg").symlink_to("nowhere.jpg")  # which a listing compares
    monkeypatch.setattr("dataloading.index_build.FOLDER_PIECE", 5)
    request, kept = Request(photographs), tmp_path / "kept"
    listing, header_of_file = list_data(request), dataloading.folders.header_of_file

    def refuse(path: Path) -> Any:
        if path.parent.name == "class2":
            raise PermissionError(errno.EACCES, "Permission denied")
        return header_of_file(path)

    def fail(*arguments: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("dataloading.folders.header_of_file", refuse)
        patch.setattr("dataloading.kept_index.gather", fail)
        with pytest.raises(Killed):
            build_kept(listing, kept)
    assert len(list((kept / "parts").iterdir())) == 1  # of three pieces, with the dangling link
    assert len(build_kept(listing, kept)) == 12


def test_helper_processes_build_the_same_index(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tars = make_tars(photographs, tmp_path / "tars")
    monkeypatch.setattr("dataloading.index_build._PIECES_PER_HELPER", 1)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2, 3})
    assert equal(load_or_build(tars, tmp_path / "kept"), build_index(tars))


def test_a_machine_without_room_for_helper_processes_builds_alone(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    tars = make_tars(photographs, tmp_path / "tars")
    monkeypatch.setattr("dataloading.index_build._PIECES_PER_HELPER", 1)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2, 3})
    monkeypatch.setattr("subprocess.Popen", refuse)
    assert equal(load_or_build(tars, tmp_path / "kept"), build_index(tars))


def test_a_helper_process_leaves_failing_storage_to_who_builds() -> None:
    code = """
import dataloading.index_build as build
from dataloading.errors import ReadError
def fail(*_):
    raise ReadError("the store fails")
build.help_build = fail
build.main()
"""
    arguments = json.dumps(["data", "parts", 1, 2, 100, True])
    with subprocess.Popen(
        [sys.executable, "-c", code, arguments],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as helper:
        assert helper.stderr is not None and helper.stderr.read() == ""
        assert helper.wait() == 0


def test_another_machine_must_see_the_same_files(photographs: Path) -> None:
    request = Request(photographs)
    contents = list_data(request).digest(with_times=False)
    os.utime(next(photographs.rglob("*.jpg")), (1, 1))  # a copy
    require_files(request, contents)
    next(photographs.rglob("*.jpg")).unlink()
    with pytest.raises(DataError, match=r"names or sizes of the 11 files on host .* copy them"):
        require_files(request, contents)
