"""Pieces of remote tars that are kept: the bytes of the store, one request each, and room."""

import io
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dataloading import store_cache, store_source
from dataloading.entries import ENTRY
from dataloading.errors import DataError
from dataloading.index import Index, build_index
from dataloading.order import WINDOW, window_ids
from dataloading.store_cache import StoreCache, remove_oldest
from dataloading.stores import RemoteTar
from dataloading.stream import Stream
from tests.dataloading.conftest import smooth
from tests.dataloading.store_case import RangeServer
from tests.dataloading.tar_case import write_tar

pytest.importorskip("obstore", reason="the extra stores is not installed")

SAMPLES = 24


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tars")
    for shard in range(2):
        members: list[tuple[str, bytes]] = []
        for i in range(shard * SAMPLES // 2, (shard + 1) * SAMPLES // 2):
            file = io.BytesIO()
            smooth(i, 64, 80).save(file, "JPEG", quality=90)
            members.append((f"{i:02d}.jpg", file.getvalue()))
        write_tar(root / f"train-{shard}.tar", members)
    return root


@pytest.fixture
def server(tars: Path) -> Iterator[RangeServer]:
    server = RangeServer(tars)
    yield server
    server.stop()


@pytest.fixture
def index(server: RangeServer, monkeypatch: pytest.MonkeyPatch) -> Index:
    """The pieces are smaller than most images."""
    for module in (store_cache, store_source):
        monkeypatch.setattr(module, "PIECE", 1000)
    return build_index(f"{server.url}/train-{{0..1}}.tar")


def pieces_of(index: Index) -> int:
    tars = [tar for tar in index.shards if isinstance(tar, RemoteTar)]
    return sum(-(-tar.size // store_cache.PIECE) for tar in tars)


def test_each_piece_is_requested_once_for_all_that_share_the_folder(
    index: Index, tars: Path, server: RangeServer, tmp_path: Path
) -> None:
    files = build_index(tars).open()
    before = len(server.requests)
    for _ in range(2):  # another process, or another run
        source = index.open(tmp_path / "kept")
        source.prefetch(range(SAMPLES))
        assert [source.read(i) for i in range(SAMPLES)] == [files.read(i) for i in range(SAMPLES)]
        assert source.read(3) == files.read(3)
        source.close()
    ranges = [request.span for request in server.requests[before:]]
    assert 0 < len(ranges) <= pieces_of(index)
    assert all(first % 1000 == 0 for first, _ in filter(None, ranges))


@pytest.mark.parametrize("worker_type", ["thread", pytest.param("process", marks=pytest.mark.slow)])
def test_views_are_those_without_a_cache(index: Index, tmp_path: Path, worker_type) -> None:
    def draw(folder: Path | None) -> list[np.ndarray]:
        options = {"sizes": (16,), "threads": 2, "worker_type": worker_type, "patience_s": 5.0}
        with Stream(index, seed=1, micro_batch=8, store_cache=folder, **options) as stream:
            return [next(stream).images[0].numpy().copy() for _ in range(6)]

    expected, found = draw(None), draw(tmp_path / "kept")
    assert all(np.array_equal(a, b) for a, b in zip(expected, found, strict=True))
    assert any((tmp_path / "kept").glob("*/*"))


def test_a_damaged_or_foreign_piece_is_not_used(index: Index, tmp_path: Path) -> None:
    source = index.open(tmp_path)
    expected = source.read(0)
    for file in tmp_path.glob("*/*"):
        file.write_bytes(b"cut short")
    assert source.read(0) == expected
    assert all(file.stat().st_size > 9 for file in tmp_path.glob("*/*"))
    first, other = (
        store_cache._folder_of(RemoteTar("s3://b/a.tar", 5, version)) for version in ("1", "2")
    )
    assert first != other


def test_only_pieces_are_removed_to_make_room(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "thesis").mkdir()
    others = [tmp_path / "thesis" / name for name in ("chapter.tex", "00000000")]
    for file in others:
        file.write_bytes(b"the only copy")
        os.utime(file, (1, 1))
    source = index.open(tmp_path)
    source.read(0)
    (folder,) = {file.parent for file in tmp_path.glob("*/0*")} - {tmp_path / "thesis"}
    left = folder / ".00000007.0123abcd.tmp"  # of a killed process
    left.touch()
    monkeypatch.setattr(store_cache, "_REMOVED", 1.0)
    remove_oldest(tmp_path)
    assert sorted(tmp_path.glob("*/*")) == sorted(others)
    assert not list(folder.iterdir())
    source.close()


def test_a_full_disk_costs_requests_only(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    source, kept = index.open(tmp_path), StoreCache(tmp_path)
    expected = [source.read(i) for i in range(SAMPLES)]
    number = len(list(tmp_path.glob("*/*")))
    oldest = min(tmp_path.glob("*/*"), key=lambda file: file.stat().st_mtime_ns)
    os.utime(oldest, (1, 1))
    remove_oldest(tmp_path)
    left = len(list(tmp_path.glob("*/*")))
    assert not oldest.exists() and number - left == 1 + number // 20

    full = SimpleNamespace(f_bavail=1, f_blocks=100, f_frsize=4096)
    monkeypatch.setattr(store_cache.os, "statvfs", lambda path: full)
    assert [source.read(i) for i in range(SAMPLES)] == expected
    assert len(list(tmp_path.glob("*/*"))) <= left

    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store_cache, "atomic_path", refuse)
    assert [source.read(i) for i in range(SAMPLES)] == expected
    assert caplog.text.count("nearly full; the oldest pieces are removed") == 1
    with pytest.raises(DataError, match=r"has room for 0.0 GB, and data.shuffle=full needs 1.0"):
        kept.require_room(1e9, "data.shuffle=full")
    kept.require_room(0.9 * sum(file.stat().st_size for file in tmp_path.glob("*/*")), "")


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"data.store_cache=.*file/kept: cannot be written \(Not a"):
        StoreCache(tmp_path / "file" / "kept")


def test_a_window_of_a_large_set_needs_a_request_per_24_images() -> None:
    """Images of 110 kB in tars of 1,000; docs/data.md has the figure."""
    n, size = 12 * WINDOW, 110_000
    ids, _ = window_ids(n, 0, np.arange(WINDOW))
    entries = np.zeros(n, ENTRY)
    entries["shard"], entries["size"] = np.arange(n) // 1000, size
    entries["offset"] = np.arange(n) % 1000 * (size + 1024)
    first = entries["offset"][ids].astype(np.int64)
    pieces = [entries["shard"][ids] * 1000.0 + at // (4 << 20) for at in (first, first + size)]
    assert WINDOW / len(np.unique(pieces)) == pytest.approx(24, abs=0.5)
    groups = store_source.split_by_piece(entries, ids)
    assert len(groups) < WINDOW / 23
    assert sorted(row for group in groups for row in group) == sorted(ids.tolist())
