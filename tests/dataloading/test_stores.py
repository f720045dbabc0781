"""Tars behind range requests: the same index and views as from files, whatever the server does."""

import io
import random
import shutil
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch

from dataloading import shards, stores, webdataset
from dataloading.addresses import find_address_problem, hide_secrets
from dataloading.errors import DataError, ReadError
from dataloading.exchange import index_from_bytes, index_to_bytes
from dataloading.index import Index, build_index
from dataloading.kept_index import load_or_build, open_kept
from dataloading.stores import StoreSource, explain_error, merge_neighbours
from dataloading.stream import Batch, Stream
from tests.dataloading.conftest import smooth
from tests.dataloading.store_case import RangeServer, Request
from tests.dataloading.tar_case import write_tar

pytest.importorskip("obstore", reason="the extra stores is not installed")

TARS, PER_TAR = 3, 16
SAMPLES = TARS * PER_TAR
PATTERN = "/train-{000..002}.tar"


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tars")
    for shard in range(TARS):
        members = []
        for i in range(shard * PER_TAR, (shard + 1) * PER_TAR):
            file = io.BytesIO()
            smooth(i, 64 + i, 96 - i).save(file, "JPEG", quality=90)
            members += [(f"{i:03d}.jpg", file.getvalue()), (f"{i:03d}.cls", b"%d" % (i % 5))]
        write_tar(root / f"train-{shard:03d}.tar", members)
    return root


@pytest.fixture
def server(tars: Path) -> Iterator[RangeServer]:
    server = RangeServer(tars)
    yield server
    server.stop()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (shards, webdataset):
        monkeypatch.setattr(module, "PATIENCE_S", 0.0)


def draw(index: Index, batches: int, **options) -> list[Batch]:
    options = {"shuffle": "full", "worker_type": "thread", "patience_s": 30.0} | options
    with Stream(index, seed=3, micro_batch=8, threads=2, sizes=(16,), **options) as stream:
        return [next(stream) for _ in range(batches)]


def same(one: list[Batch], two: list[Batch]) -> bool:
    return len(one) == len(two) and all(
        torch.equal(a.images[0], b.images[0])
        and torch.equal(a.sample_id, b.sample_id)
        and bool(b.valid.all())
        for a, b in zip(one, two, strict=True)
    )


def test_index_is_that_of_the_files_with_few_requests(tars: Path, server: RangeServer) -> None:
    local, remote = build_index(tars), build_index(server.url + PATTERN)
    assert remote.digest == local.digest
    assert remote.entries.tolist() == local.entries.tolist()
    assert (remote.labels, list(remote.names)) == (local.labels, list(local.names))
    assert len(server.requests) < SAMPLES / 2
    assert str(remote.where(0)[0]) == f"{server.url}/train-000.tar"


def test_an_index_moves_to_other_ranks_with_its_versions(server: RangeServer, tmp_path) -> None:
    index = load_or_build(server.url + PATTERN, tmp_path / "index")
    number = len(server.data_requests())
    for other in (
        index_from_bytes(index_to_bytes(index)),
        open_kept(server.url + PATTERN, tmp_path / "index", index.digest, index.list_shards()),
    ):
        assert (other.root, other.shards) == (index.root, index.shards)
    assert load_or_build(server.url + PATTERN, tmp_path / "index").digest == index.digest
    assert len(server.data_requests()) == number  # only sizes and versions were asked for


@pytest.mark.parametrize("worker_type", ["thread", pytest.param("process", marks=pytest.mark.slow)])
def test_no_view_is_lost_or_repeated_when_requests_fail(
    tars: Path, server: RangeServer, worker_type: str
) -> None:
    random_ = random.Random(5)
    faults = [503, 500, 429, 416, "truncate", "hang up", "wrong length", "wrong range"]
    lock, seen = threading.Lock(), set()

    def fail(request: Request) -> str | int | None:
        with lock:
            fault = random_.choice(faults) if random_.random() < 0.3 else None
            if request.method == "GET":
                seen.add(fault)
            return fault if request.method == "GET" or not isinstance(fault, str) else None

    server.fault = fail
    remote, local = build_index(server.url + PATTERN), build_index(tars)
    assert remote.digest == local.digest
    batches = 2 * SAMPLES // 8
    found = draw(remote, batches, worker_type=worker_type)
    assert same(draw(local, batches), found)
    for epoch in range(2):
        ids = torch.cat([batch.sample_id for batch in found[epoch * 6 : epoch * 6 + 6]])
        assert sorted(ids.tolist()) == list(range(SAMPLES))
    assert same(found[5:], draw(remote, batches - 5, start_position=40, worker_type=worker_type))
    assert len(seen) > 5


def test_a_store_that_goes_away_and_comes_back_is_waited_for(
    tars: Path, server: RangeServer
) -> None:
    local, remote = build_index(tars), build_index(server.url + PATTERN)
    server.fault = lambda request: "hang up" if request.number > number + 4 else None
    number = len(server.requests)

    def return_later() -> None:
        server.fault = lambda request: None
        server.start()

    with Stream(remote, seed=3, micro_batch=8, threads=2, sizes=(16,), patience_s=30) as stream:
        first = next(stream)
        server.stop()
        timer = threading.Timer(0.5, return_later)
        timer.start()
        found = [first, *(next(stream) for _ in range(8))]
    timer.join()
    assert same(draw(local, 9), found)


def test_a_store_that_stays_away_ends_with_75_and_its_address(server: RangeServer) -> None:
    remote = build_index(server.url + PATTERN)
    server.fault = lambda request: 503
    with pytest.raises(ReadError, match=r"train-00\d.tar, byte \d+: 503 Service Unav"):
        draw(remote, 1, patience_s=0.2)


def test_a_store_that_hangs_is_not_waited_for_by_one_read_after_another(
    server: RangeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = build_index(server.url + PATTERN)
    monkeypatch.setattr(stores, "_REQUEST", timedelta(seconds=0.3))
    monkeypatch.setattr(stores, "_QUIET_RETRIES", 0)
    stores.open_store.cache_clear()
    number = len(server.requests)
    server.fault = lambda request: "stall"
    with pytest.raises(ReadError, match="no answer within"):
        draw(remote, 1, patience_s=0.2)
    stores.open_store.cache_clear()
    assert number < len(server.requests) <= number + 2 * TARS + 2 * 8


def test_a_tar_that_is_replaced_is_noticed(tars: Path, tmp_path: Path, caplog) -> None:
    caplog.set_level("INFO")
    root = shutil.copytree(tars, tmp_path / "copy")
    server = RangeServer(root)
    url = f"{server.url}/train-001.tar"
    index = load_or_build(url, tmp_path / "index")
    other = bytearray((root / "train-001.tar").read_bytes())
    other[700] ^= 1  # within the first image
    (root / "train-001.tar").write_bytes(other)
    with pytest.raises(ReadError, match=r"train-001.tar: is no longer the tar that was indexed"):
        draw(index, 1)
    load_or_build(url, tmp_path / "index")
    assert "the index is built again: the files have changed" in caplog.text
    server.is_versioned = False
    build_index(url)
    assert "gives neither ETag nor Last-Modified (1 of 1 tars)" in caplog.text
    server.stop()


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("fault", "code", "message"),
    [
        (404, 78, "404 Not Found"),
        (403, 78, "403 Forbidden.*serve the tars to this machine without a login"),
        (401, 78, "401 Unauthorized"),
        (301, 78, "301 Moved Permanently|in another region"),
        (503, 75, "503 Service Unavailable, tried for"),
    ],
)
def test_a_refusal_of_the_server_is_one_clear_line(
    server: RangeServer, fault: int, code: int, message: str
) -> None:
    server.fault = lambda request: fault
    with pytest.raises(DataError, match=f"^{server.url}.*({message})") as caught:
        build_index(server.url + PATTERN)
    assert caught.value.exit_code == code
    assert "token" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.usefixtures("impatient")
def test_servers_that_cannot_be_read_are_named(server: RangeServer) -> None:
    server.fault = lambda request: "whole" if request.method == "GET" else None
    with pytest.raises(DataError, match="does not answer requests for a range") as caught:
        build_index(server.url + PATTERN)
    assert caught.value.exit_code == 78
    with pytest.raises(ReadError, match="the store cannot be reached"):
        build_index("http://127.0.0.1:1/a.tar")
    with pytest.raises(ReadError, match="the name of the host is not found"):
        build_index("http://no-such-host.invalid/a.tar")
    for pattern in ("/train-*.tar", "/"):
        with pytest.raises(DataError, match="a web server does not list its files"):
            build_index(server.url + pattern)
    with pytest.raises(DataError, match="tars only; pack them"):
        build_index(server.url + PATTERN, source="folder")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://AKIA:hush@bucket/a.tar", "must not hold a user or a password"),
        ("https://me:hush@host/a.tar", "must not hold a user or a password"),
        ("s3://AKIA:hu/sh@bucket/a.tar", "^s3://bucket/a.tar: an address must not hold a user"),
        ("https://hush@host/a.tar", "must not hold a user or a password"),
        ("https://host/a.tar?X-Amz-Signature=hush", "must not have a query"),
        ("s3://bucket/a-?.tar", "must not have a query"),
        ("az://bucket/a.tar", "az:// is not read"),
        ("s3://", "names no bucket"),
        ("https:///a.tar", "names no host"),
        ("s3://bucket//a.tar", "has an empty part"),
        ("https://host:port/a.tar", "is not a host"),
    ],
)
def test_addresses_with_secrets_or_faults_are_refused(url: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        build_index(url)
    for text in (str(caught.value), hide_secrets(f"read {url} and '{url}'")):
        assert "hush" not in text and "AKIA" not in text
    assert caught.value.exit_code == 78


def test_sound_addresses_are_accepted() -> None:
    for url in ("s3://b/a/{0..3}.tar", "gs://b/a-*.tar", "https://h:80/a%20b.tar", "S3://b/"):
        assert find_address_problem(url) is None
        assert hide_secrets(url) == url


def test_neighbours_are_read_with_one_request(tars: Path, server: RangeServer) -> None:
    remote = build_index(server.url + PATTERN)
    local = build_index(tars)
    number = len(server.requests)
    source, files = remote.open(), local.open()
    source.prefetch(range(SAMPLES))
    assert [source.read(i) for i in range(SAMPLES)] == [files.read(i) for i in range(SAMPLES)]
    assert len(server.requests) == number + TARS
    assert source.read(0) == files.read(0)  # again, with a request of its own
    source.close()
    files.close()


def test_merged_requests_hold_their_rows_and_stay_small() -> None:
    rng = np.random.default_rng(0)
    entries = np.zeros(400, webdataset.ENTRY)
    entries["shard"] = np.repeat([0, 1], 200)
    entries["size"] = rng.integers(1, 3 << 20, 400)
    gaps = rng.choice([1024, 60 << 10, 70 << 10, 1 << 20], 400)
    for half in (slice(0, 200), slice(200, 400)):
        ends = np.cumsum(entries["size"][half] + gaps[half])
        entries["offset"][half] = ends - entries["size"][half]
    rows = rng.permutation(400)[:300]
    groups = merge_neighbours(entries, rows)
    assert sorted(row for group in groups for row in group) == sorted(rows.tolist())
    ends = entries["offset"].astype(int) + entries["size"]
    for group in groups:
        assert len(set(entries["shard"][group].tolist())) == 1
        offsets = entries["offset"][group].astype(int)
        assert (np.diff(offsets) > 0).all()
        assert (offsets[1:] - ends[group][:-1] <= 64 << 10).all()
        assert len(group) == 1 or ends[group[-1]] - offsets[0] <= 8 << 20
    assert max(map(len, groups)) > 1 and len(groups) > 100
    assert merge_neighbours(entries, np.zeros(0, np.int64)) == []


def test_requests_in_flight_are_bounded(server: RangeServer) -> None:
    remote = build_index(server.url + PATTERN)
    server.latency_s, server.most = 0.02, 0
    tars = [tar for tar in remote.shards if not isinstance(tar, Path)]
    source = StoreSource(tars, remote.entries, in_flight=3)
    for row in range(0, SAMPLES, 4):
        source.prefetch([row])
    for row in range(0, SAMPLES, 4):
        source.read(row)
    assert server.most == 3
    source.close()


def test_errors_of_credentials_name_the_remedy_and_no_secret() -> None:
    class Error(Exception):
        pass

    role = "Generic S3 error: Error performing PUT http://169.254.169.254/latest/api/token in 1s"
    assert "no credentials" in explain_error(Error(role))[1]
    text = "Received redirect without LOCATION, this normally indicates an incorrect region"
    assert explain_error(Error(text)) == (1, "the bucket is in another region")
    assert explain_error(Error("secret=hush"))[1] == "the store failed (Error)"
