"""Read tars from a web server or an S3 server with latency and faults, and compare with the files.

``python -m tests.store_soak --images 10000`` draws two epochs in the order of training while a
share of the requests fails, verifies that every image arrives once per epoch with the bytes of the
file, and again from the middle; the same through ``data.store_cache``. Then it prints the rate of
``--rate-images`` by requests in flight, without faults, beside that of the files. ``--s3`` puts
the tars into a bucket of moto's S3 server, lists and reads them there through a server that adds
latency and faults, and uses the index that is published beside them.
"""

import argparse
import hashlib
import io
import logging
import multiprocessing
import os
import random
import tempfile
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dataloading.data_set import Listing, Request, list_data
from dataloading.index import Index, build_index, build_listed
from dataloading.kept_index import load_or_build, write_index
from dataloading.order import sample_ids
from dataloading.patience import Patience
from dataloading.sources import Source
from dataloading.store_cache import StoreCache
from dataloading.store_source import StoreSource
from dataloading.stores import RemoteTar
from tests.dataloading.store_case import RangeServer, ask, serve_s3
from tests.dataloading.store_case import Request as Asked
from tests.dataloading.tar_case import write_tar

BATCH, AHEAD, PER_TAR = 64, 4, 500
_SIGNED = {
    "Authorization": "AWS4-HMAC-SHA256 Credential=id/20260101/us-east-1/s3/aws4_request, "
    "SignedHeaders=host, Signature=not-verified"
}
FAULTS = (503, 500, 429, "truncate", "hang up", "wrong length", "wrong range")


def make_tars(root: Path, images: int, kilobytes: int) -> None:
    """Write JPEGs of about ``kilobytes``; random bytes follow the image, as in photographs."""
    rng = np.random.default_rng(0)
    for shard in range(-(-images // PER_TAR)):
        members = []
        for i in range(shard * PER_TAR, min((shard + 1) * PER_TAR, images)):
            file = io.BytesIO()
            pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(file, "JPEG")
            members.append((f"{i:06d}.jpg", file.getvalue() + rng.bytes(kilobytes << 10)))
        write_tar(root / f"train-{shard:04d}.tar", members)


def serve(root: Path, origin: str | None, latency_s: float, share: float, pipe: Any) -> None:
    """Serve in a process of its own; each message resets the count and sets the share of faults."""
    server = RangeServer(root, origin)
    server.latency_s = latency_s
    draws = random.Random(1)

    def fail(request: Asked) -> Any:
        return draws.choice(FAULTS) if request.method == "GET" and draws.random() < share else None

    server.fault = fail
    pipe.send(server.port)
    while True:
        try:
            share = pipe.recv()
        except EOFError:
            return
        pipe.send((len(server.requests), server.most))
        server.requests.clear()
        server.most = 0


def read(source: Source, ids: list[int], threads: int) -> list[str]:
    """Read samples as a decoder does, batches ahead; returns the digests of their bytes."""
    patience = Patience(60)
    batches = [ids[at : at + BATCH] for at in range(0, len(ids), BATCH)]
    pending: deque[Any] = deque()
    found: list[str] = []

    def read_one(i: int) -> str:
        data = patience.retry(lambda: source.read(i), str(i))
        return hashlib.sha256(data).hexdigest()

    with ThreadPoolExecutor(threads) as pool:
        for batch in batches:
            source.prefetch(batch)
            pending.append([pool.submit(read_one, i) for i in batch])
            if len(pending) >= AHEAD:
                found += [one.result() for one in pending.popleft()]
        found += [one.result() for work in pending for one in work]
    source.close()
    return found


def open_source(index: Index, in_flight: int, kept: Path | None = None) -> StoreSource:
    tars = [tar for tar in index.shards if isinstance(tar, RemoteTar)]
    cached = None if kept is None else StoreCache(kept).read
    return StoreSource(tars, index.entries, in_flight, cached)


def count_differences(one: list[str], other: list[str]) -> int:
    return sum(a != b for a, b in zip(one, other, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--kilobytes", type=int, default=16)
    parser.add_argument("--latency-ms", type=float, default=20)
    parser.add_argument("--fault-share", type=float, default=0.05)
    parser.add_argument("--in-flight", type=int, nargs="+", default=[1, 4, 16, 32, 64])
    parser.add_argument("--rate-images", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--s3", action="store_true", help="a bucket of moto's server")
    options = parser.parse_args()
    logging.disable(logging.WARNING)  # one line per failed read
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_tars(root, options.images, options.kilobytes)
        with serve_s3() if options.s3 else nullcontext() as origin:
            run(root, origin, options)


def publish(root: Path, listing: Listing, index: Index, origin: str) -> None:
    """Put tars and their index into a bucket."""
    ask(origin, "PUT", "/images")
    for path in [*sorted(root.glob("*.tar")), write_index(listing, index, root / "published")]:
        answer, _ = ask(origin, "PUT", f"/images/{path.name}", _SIGNED, path.read_bytes())
        assert answer.status == 200


def run(root: Path, origin: str | None, options: argparse.Namespace) -> None:
    n, threads = options.images, options.threads
    ours, theirs = multiprocessing.Pipe()
    arguments = (root, origin, options.latency_ms / 1e3, options.fault_share, theirs)
    server = multiprocessing.get_context("spawn").Process(target=serve, args=arguments, daemon=True)
    server.start()
    last = -(-n // PER_TAR) - 1
    host = f"http://127.0.0.1:{ours.recv()}"
    url = f"{host}/train-{{0000..{last:04d}}}.tar"
    if origin is not None:
        url = "s3://images/"
        os.environ |= {"AWS_ENDPOINT_URL": host, "AWS_REGION": "us-east-1"}
        os.environ |= {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "hush"}

    def reset(share: float) -> tuple[int, int]:
        ours.send(share)
        return ours.recv()

    listing = list_data(Request(root))
    local = build_listed(listing)
    if origin is not None:
        publish(root, listing, local, origin)
    began = time.monotonic()
    remote = build_index(url)
    requests, most = reset(options.fault_share)
    assert remote.digest == local.digest
    print(
        f"index: {n} images, {requests / n:.3f} requests per image, {most} in flight, "
        f"{time.monotonic() - began:.1f} s"
    )
    if origin is not None:
        taken = load_or_build(url, root / "index")
        requests, _ = reset(options.fault_share)
        assert (taken.digest, taken.entries.tobytes()) == (local.digest, local.entries.tobytes())
        print(f"published index: the same rows, {requests} requests in all")
    ids, _ = sample_ids(n, 0, np.arange(2 * n))
    for epoch in (ids[:n], ids[n:]):
        assert sorted(epoch.tolist()) == list(range(n))
    expected, half = read(local.open(), ids.tolist(), threads), ids[n // 2 :].tolist()
    for name, kept in (("without a cache", None), ("with data.store_cache", root / "kept")):
        found = read(open_source(remote, 32, kept), ids.tolist(), threads)
        requests, most = reset(options.fault_share)
        resumed = read(open_source(remote, 32, kept), half, threads)
        again, _ = reset(options.fault_share)
        print(
            f"{name}: two epochs, {options.fault_share:.0%} of the requests fail: "
            f"{count_differences(expected, found)} of {2 * n} differ from the files, and "
            f"{count_differences(expected[n // 2 :], resumed)} of those from the middle on; "
            f"{requests / (2 * n):.3f} requests per image, {again / len(half):.3f} after the resume"
        )
    reset(0)
    rate(local, remote, root / "kept", options, reset)


def rate(local: Index, remote: Index, kept: Path, options: argparse.Namespace, reset: Any) -> None:
    """Print images per second of the files, and of the store by order and requests in flight.

    The last row reads from a cache that holds all tars.
    """
    number, threads, n = options.rate_images, options.threads, len(local)
    size = float(local.entries["size"].mean())
    orders = {"full": sample_ids(n, 0, np.arange(number))[0].tolist(), "none": list(range(number))}
    read(local.open(), orders["full"], threads)  # into the page cache
    began = time.monotonic()
    read(local.open(), orders["full"], threads)
    files = number / (time.monotonic() - began)
    print(f"files: {files:.0f} images/s\n")
    print("| order | in flight | images/s | of files | requests per image | MB/s |")
    print("|---|---|---|---|---|---|")
    cases = [("full", k, None) for k in options.in_flight]
    for order, in_flight, cache in [*cases, ("none", 32, None), ("full", 32, kept)]:
        began = time.monotonic()
        read(open_source(remote, in_flight, cache), orders[order], threads)
        speed = number / (time.monotonic() - began)
        requests, most = reset(0)
        assert most <= in_flight + threads
        print(
            f"| {order}{', from data.store_cache' if cache else ''} | {in_flight} | {speed:.0f} | "
            f"{speed / files:.2f} | "
            f"{requests / number:.3f} | {speed * size / 1e6:.1f} |"
        )


if __name__ == "__main__":
    main()
