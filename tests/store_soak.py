"""Read tars from a web server with latency and faults, and compare with the files.

``python tests/store_soak.py --images 10000`` draws two epochs in the order of training while a
share of the requests fails, verifies that every image arrives once per epoch with the bytes of the
file, and again from the middle; then prints the rate by requests in flight, without faults, beside
that of the files.
"""

import argparse
import hashlib
import io
import logging
import multiprocessing
import random
import tempfile
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dataloading.index import Index, build_index
from dataloading.order import sample_ids, sequential_ids, window_ids
from dataloading.patience import Patience
from dataloading.sources import Source
from dataloading.stores import RemoteTar, StoreSource
from tests.dataloading.store_case import RangeServer, Request
from tests.dataloading.tar_case import write_tar

BATCH, AHEAD, PER_TAR = 64, 4, 500
FAULTS = (503, 500, 429, "truncate", "hang up", "wrong length", "wrong range")
ORDERS = {"full": sample_ids, "window": window_ids}


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


def serve(root: Path, latency_s: float, share: float, pipe: Any) -> None:
    """Serve in a process of its own; each message resets the count and sets the share of faults."""
    server = RangeServer(root)
    server.latency_s = latency_s
    draws = random.Random(1)

    def fail(request: Request) -> Any:
        return draws.choice(FAULTS) if request.method == "GET" and draws.random() < share else None

    server.fault = fail
    pipe.send(server.port)
    while True:
        share = pipe.recv()
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


def open_source(index: Index, in_flight: int) -> StoreSource:
    tars = [tar for tar in index.shards if isinstance(tar, RemoteTar)]
    return StoreSource(tars, index.entries, in_flight)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--kilobytes", type=int, default=16)
    parser.add_argument("--latency-ms", type=float, default=20)
    parser.add_argument("--fault-share", type=float, default=0.05)
    parser.add_argument("--in-flight", type=int, nargs="+", default=[1, 4, 16, 32, 64])
    parser.add_argument("--threads", type=int, default=4)
    options = parser.parse_args()
    logging.disable(logging.WARNING)  # one line per failed read
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder), options)


def run(root: Path, options: argparse.Namespace) -> None:
    n, threads = options.images, options.threads
    make_tars(root, n, options.kilobytes)
    ours, theirs = multiprocessing.Pipe()
    arguments = (root, options.latency_ms / 1e3, options.fault_share, theirs)
    server = multiprocessing.get_context("spawn").Process(target=serve, args=arguments, daemon=True)
    server.start()
    last = -(-n // PER_TAR) - 1
    url = f"http://127.0.0.1:{ours.recv()}/train-{{0000..{last:04d}}}.tar"

    def reset(share: float) -> tuple[int, int]:
        ours.send(share)
        return ours.recv()

    local = build_index(root)
    began = time.monotonic()
    remote = build_index(url)
    requests, most = reset(options.fault_share)
    assert remote.digest == local.digest
    print(
        f"index: {n} images, {requests / n:.3f} requests per image, {most} in flight, "
        f"{time.monotonic() - began:.1f} s"
    )
    ids, _ = sample_ids(n, 0, np.arange(2 * n))
    expected = read(local.open(), ids.tolist(), threads)
    found = read(open_source(remote, 32), ids.tolist(), threads)
    requests, most = reset(options.fault_share)
    for epoch in (ids[:n], ids[n:]):
        assert sorted(epoch.tolist()) == list(range(n))
    lost = sum(a != b for a, b in zip(expected, found, strict=True))
    half = ids[n // 2 :].tolist()
    resumed = read(open_source(remote, 32), half, threads)
    reset(0)
    print(
        f"two epochs, {options.fault_share:.0%} of the requests fail: {lost} of {2 * n} differ "
        f"from the files, {sum(a != b for a, b in zip(expected[n // 2 :], resumed, strict=True))} "
        f"from the middle on; {requests / (2 * n):.3f} requests per image"
    )
    began = time.monotonic()
    read(local.open(), ids[:n].tolist(), threads)
    files = n / (time.monotonic() - began)
    print(f"files: {files:.0f} images/s\n")
    print("| order | in flight | images/s | of files | requests per image | MB/s |")
    print("|---|---|---|---|---|---|")
    cases = [("full", number) for number in options.in_flight]
    for order, number in [*cases, ("window", 32), ("none", 32)]:
        positions = np.arange(n)
        chosen, _ = (
            sequential_ids(n, positions) if order == "none" else ORDERS[order](n, 0, positions)
        )
        began = time.monotonic()
        read(open_source(remote, number), chosen.tolist(), threads)
        rate = n / (time.monotonic() - began)
        requests, most = reset(0)
        assert most <= number + threads
        size = float(local.entries["size"].mean())
        print(
            f"| {order} | {number} | {rate:.0f} | {rate / files:.2f} | {requests / n:.3f} | "
            f"{rate * size / 1e6:.1f} |"
        )


if __name__ == "__main__":
    main()
