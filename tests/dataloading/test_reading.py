"""Storage that fails: reads are retried for a while, then the batch raises an error."""

import errno
import io
import os
import threading

import pytest
import torch
from PIL import Image

from dataloading.errors import DataError, ReadError
from dataloading.index import build_index
from dataloading.kept_index import load_or_build
from dataloading.patience import Patience
from dataloading.reading import start_threads
from dataloading.shard_patterns import has_files
from dataloading.stream import Stream
from tests.dataloading.decoder_case import DECODERS
from tests.dataloading.tar_case import write_tar

OPTIONS = {"seed": 0, "micro_batch": 2, "sizes": (24,), "threads": 2, "shuffle": "none"}


class Faltering:
    """``os.open`` that fails for one file, a given number of times."""

    def __init__(self, monkeypatch, name: str, times: float, number: int = errno.EIO) -> None:
        self.name, self.left, self.number, self.calls = name, times, number, 0
        self.open = os.open
        monkeypatch.setattr(os, "open", self)

    def __call__(self, path, *rest, **named):
        if str(path).endswith(self.name) and self.left > 0:
            self.calls += 1
            self.left -= 1
            raise OSError(self.number, os.strerror(self.number), path)
        return self.open(path, *rest, **named)


@pytest.mark.parametrize("decode", DECODERS)
def test_the_failure_comes_once_at_its_batch_and_the_others_are_as_ever(
    photographs, monkeypatch, decode
):
    index = build_index(photographs)
    with Stream(index, decode=decode, **OPTIONS) as stream:
        expected = [next(stream) for _ in range(6)]
    broken = Faltering(monkeypatch, index.names[5], float("inf"))
    with Stream(index, decode=decode, patience_s=0.3, **OPTIONS) as stream:
        got = [next(stream), next(stream)]
        with pytest.raises(ReadError, match=f"{index.names[5]}: Input/output error, tried for 0"):
            next(stream)
        got += [None] + [next(stream) for _ in range(3)]
        assert (stream.draws, stream.bad) == (10, 0)
    assert broken.calls > 2
    for one, two in zip(expected, got, strict=True):
        if two is not None:
            assert torch.equal(one.position, two.position) and two.valid.all()
            assert torch.equal(one.images[0], two.images[0])


@pytest.mark.parametrize("decode", DECODERS)
def test_a_file_that_comes_back_in_time_changes_nothing(photographs, monkeypatch, decode, caplog):
    index = build_index(photographs)
    with Stream(index, decode=decode, **OPTIONS) as stream:
        expected = next(stream)
    Faltering(monkeypatch, index.names[1], 2, errno.ENOENT)
    with Stream(index, decode=decode, **OPTIONS) as stream:
        got = next(stream)
    assert torch.equal(expected.images[0], got.images[0]) and got.valid.all()
    assert f"{index.names[1]}: No such file or directory; tried again for 60.0 s" in caplog.text


@pytest.mark.parametrize("decode", DECODERS)
def test_closing_does_not_wait_for_storage(photographs, monkeypatch, decode):
    index = build_index(photographs)
    Faltering(monkeypatch, index.names[5], float("inf"))
    stream = Stream(index, decode=decode, patience_s=1e6, **{**OPTIONS, "threads": 3})
    if decode == "torch":  # DALI requests later batches before it returns the first
        next(stream)
    before = threading.active_count()
    closing = threading.Thread(target=stream.close)
    closing.start()
    closing.join(30)
    assert not closing.is_alive() and threading.active_count() < before


def test_storage_that_is_gone_is_waited_for_once():
    patience = Patience(0.2)
    calls = []

    def fail():
        calls.append(1)
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(ReadError, match=r"a.jpg: Input/output error"):
        patience.retry(fail, "a.jpg")
    first = len(calls)
    assert first > 1
    for _ in range(5):
        with pytest.raises(ReadError):
            patience.retry(fail, "b.jpg")
    assert len(calls) == first + 5
    assert patience.retry(lambda: 7, "c.jpg") == 7


def test_threads_that_cannot_be_started_are_an_error_and_no_hang(monkeypatch):
    started, start = [], threading.Thread.start

    def start_two(thread):
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start_two)
        with pytest.raises(DataError, match=r"^3 threads .* \(can't .*\); lower data.workers"):
            start_threads(3)
    for thread in started:
        thread.join(10)
        assert not thread.is_alive()


def test_what_is_no_read_error_is_not_tried_again():
    def bug():
        raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError):
        Patience(60).retry(bug, "a.jpg")


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_failing_storage_leaves_nothing_out_of_an_index(photographs, monkeypatch, number):
    whole = build_index(photographs)
    Faltering(monkeypatch, whole.names[4], 2, number)
    assert build_index(photographs).digest == whole.digest


def test_failing_storage_within_a_header_is_no_fault_of_the_picture(tmp_path, picture, monkeypatch):
    """Pillow reads these headers, and raises errors of the same kind for wrong bytes."""
    buffer = io.BytesIO()
    picture(0, 60, 50).save(buffer, "PNG")
    write_tar(tmp_path / "a.tar", [("a.png", buffer.getvalue())])
    read, failed = os.pread, []

    def falter(descriptor, size, offset):
        data = read(descriptor, size, offset)
        if data.startswith(b"\x89PNG") and not failed:
            failed.append(offset)
            raise OSError(errno.EIO, "Input/output error")
        return data

    monkeypatch.setattr(os, "pread", falter)
    index = build_index(tmp_path)
    assert failed and len(index) == 1 and not index.excluded


def test_a_tar_is_opened_anew_when_its_handle_goes_stale(tmp_path, monkeypatch):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (9, 7)).save(tmp_path / name)
    pictures = [(tmp_path / name).read_bytes() for name in ("a.png", "b.png")]
    tar = write_tar(tmp_path / "a.tar", [("a.png", pictures[0]), ("b.png", pictures[1])])
    source = build_index(tar).open()
    assert source.read(0) == pictures[0]
    read, stale = os.pread, []

    def falter(descriptor, size, offset):
        if not stale:
            stale.append(descriptor)
            raise OSError(errno.ESTALE, "Stale file handle")
        return read(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", falter)
    assert source.read(1) == pictures[1] and stale


def test_an_index_that_cannot_be_read_is_not_made(photographs, tmp_path, monkeypatch):
    whole = build_index(photographs)
    monkeypatch.setattr("dataloading.index_build.PATIENCE_S", 0.2)
    Faltering(monkeypatch, whole.names[4], float("inf"))
    with pytest.raises(ReadError, match=f"{whole.names[4]}: Input/output error") as caught:
        load_or_build(photographs, tmp_path / "kept")
    assert caught.value.exit_code == 75 and not (tmp_path / "kept").exists()


def test_a_folder_that_may_not_be_listed_is_refused_not_excluded(photographs, monkeypatch):
    real = os.scandir

    def refuse(path):
        if str(path).endswith("class1"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"class1: cannot be listed .* make the whole") as caught:
        build_index(photographs)
    assert caught.value.exit_code == 78


class Listing:
    """A call on a path that fails for one name, a given number of times."""

    def __init__(self, call, name: str, times: float, number: int) -> None:
        self.call, self.name, self.left, self.number = call, name, times, number

    def __call__(self, path=".", *rest, **named):
        if str(path).rstrip("/").endswith(self.name) and self.left > 0:
            self.left -= 1
            raise OSError(self.number, os.strerror(self.number), str(path))
        return self.call(path, *rest, **named)


@pytest.mark.parametrize("source", ["auto", "webdataset"])
@pytest.mark.parametrize(
    ("call", "name"), [("scandir", "shards"), ("stat", "b.tar"), ("lstat", "b.tar")]
)
@pytest.mark.parametrize("path", ["shards", "shards/*.tar", "*/[b].tar", "*/b.tar"])
def test_tars_are_listed_again_while_storage_fails(
    tmp_path, picture, monkeypatch, source, call, name, path
):
    buffer = io.BytesIO()
    picture(0, 60, 50).save(buffer, "PNG")
    write_tar(tmp_path / "shards" / "b.tar", [("a.png", buffer.getvalue())])
    whole = build_index(tmp_path / path, source)
    monkeypatch.setattr(os, call, Listing(getattr(os, call), name, 1, errno.ENOTCONN))
    assert build_index(tmp_path / path, source).digest == whole.digest


@pytest.mark.parametrize(("call", "name"), [("scandir", "two"), ("lstat", "two/b.tar")])
def test_a_folder_of_a_pattern_that_may_not_be_listed_is_refused(
    tmp_path, picture, monkeypatch, call, name
):
    """``glob`` skips it, and a run would train on the other folders' images alone."""
    buffer = io.BytesIO()
    picture(0, 60, 50).save(buffer, "PNG")
    for folder in ("one", "two"):
        write_tar(tmp_path / folder / "b.tar", [("a.png", buffer.getvalue())])
    pattern = tmp_path / "*" / ("*.tar" if call == "scandir" else "b.tar")
    assert len(build_index(pattern)) == 2 and has_files(pattern)
    monkeypatch.setattr(os, call, Listing(getattr(os, call), name, 99, errno.EACCES))
    message = rf"{name}/?: cannot be listed \(Permission denied\); .* name the others in braces"
    for use in (build_index, has_files):
        with pytest.raises(DataError, match=message):
            use(pattern)
