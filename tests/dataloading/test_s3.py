"""Tars in buckets of an S3 server, moto's, on the loopback interface."""

import io
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from dataloading.errors import DataError
from dataloading.index import build_index
from dataloading.stores import open_store
from tests.dataloading.conftest import smooth
from tests.dataloading.store_case import ask, serve_s3
from tests.dataloading.tar_case import write_tar

pytestmark = pytest.mark.slow
for name in ("obstore", "moto"):
    pytest.importorskip(name, reason="the extras stores and dev are not installed")


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tars")
    for shard in range(3):
        file = io.BytesIO()
        smooth(shard, 64, 96).save(file, "JPEG")
        members = [(f"{i}.jpg", file.getvalue()) for i in range(shard * 4, shard * 4 + 4)]
        write_tar(root / f"a b-{shard}.tar", members)
    return root


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with serve_s3() as host:
        yield f"http://{host}"


@pytest.fixture
def bucket(endpoint: str, tars: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    import obstore

    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush")
    open_store.cache_clear()
    ask(endpoint.removeprefix("http://"), "PUT", "/images")
    store = open_store("s3://images")
    for path in tars.iterdir():
        obstore.put(store, f"set/{path.name}", path)
    obstore.put(store, "set/README.txt", b"text")
    obstore.put(store, "set/deep/c.tar", (tars / "a b-0.tar").read_bytes())
    yield "s3://images"
    open_store.cache_clear()


def test_buckets_are_listed_and_read_as_folders_are(bucket: str, tars: Path) -> None:
    local = build_index(tars)
    for pattern in ("/set", "/set/", "/set/a b-*.tar", "/set/a b-{0..2}.tar", "/set/a*[0-2].tar"):
        remote = build_index(bucket + pattern)
        assert (remote.digest, remote.labels) == (local.digest, local.labels), pattern
    source, files = remote.open(), local.open()
    source.prefetch(range(len(local)))
    assert [source.read(i) for i in range(12)] == [files.read(i) for i in range(12)]
    source.close()
    assert len(build_index(f"{bucket}/**/*.tar")) == 16
    assert len(build_index(f"{bucket}/set/*/c.tar")) == 4


def test_what_is_missing_is_named(bucket: str) -> None:
    for address, message in (
        (f"{bucket}/set/no.tar", "404 Not Found; correct data.path, or AWS_ACCESS_KEY_ID"),
        (f"{bucket}/none/", "no .tar files found"),
        ("s3://no-such-bucket/a/", "404 Not Found, NoSuchBucket"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            build_index(address)
        assert caught.value.exit_code == 78 and "hush" not in str(caught.value)
