"""Absent, damaged or foreign shards: no row of them is trusted, and none ends the run."""

import errno
import json
import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cmtmae_scale.cache import reader as reader_module
from cmtmae_scale.cache.codecs import Calibration, calibration_path, load_calibration
from cmtmae_scale.cache.format import MANIFEST, Manifest, read_manifest, shard_path
from cmtmae_scale.cache.reader import CachedRows, CacheReader, ShardFile
from cmtmae_scale.cache.teacher import open_cache
from cmtmae_scale.config.load import load_config
from cmtmae_scale.errors import EXIT_CONFIG, EXIT_STOPPED, CacheError, exit_code_of
from dataloading.index import build_index
from dataloading.plan import Plan
from tests.engine.run_case import write_recipe
from tests.pretraining.cached_run_case import cached, make_skeleton, write_manifest, write_rows

ROWS = 40
FORGED = [0, -1, 1, 3, 10**30, 1e9, True, None, "x", "bf16", [], {}, {"teacher": {}}]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("case"))


def fill(recipe: Path, folder: Path, seed: int, *overrides: str) -> dict[str, torch.Tensor]:
    """Write a whole cache of random int8 rows; return them as they must be read."""
    config = load_config(recipe, cached(folder, *overrides))
    manifest = write_manifest(config, build_index(config.data.path), folder, codec="int8")
    generator = torch.Generator().manual_seed(seed)
    attention = torch.rand(ROWS, manifest.patches, generator=generator).half()
    features = torch.randn(ROWS, manifest.tokens, manifest.width, generator=generator)
    ones = torch.ones(manifest.width)
    write_rows(folder, manifest, attention, features, Calibration(0 * ones, ones), ())
    with reading(folder, manifest) as read:
        rows = read(range(ROWS))
    assert rows.faults == [None] * ROWS and torch.equal(rows.fields["attention"], attention)
    return rows.fields


def plan_of(rows: Any) -> Plan:
    """Draws of some rows, two per sample."""
    numbers = np.array(rows, dtype=np.int64)
    return Plan(numbers, numbers // 2, numbers % 2, np.zeros((len(rows), 4)), numbers < 0)


@contextmanager
def reading(
    folder: Path, manifest: Manifest, limit: int = 9
) -> Iterator[Callable[[Any], CachedRows]]:
    reader = CacheReader(folder, manifest, 2, pin=False)
    reader.limit = limit
    reader.poll_s = 0.0

    def read(rows: Any) -> CachedRows:
        plan = plan_of(rows)
        reader.submit(plan)
        return reader.collect(plan)

    try:
        yield read
    finally:
        reader.close()


CALIBRATION = "the calibration, whose name is its digest"


def file_of(folder: Path, name: str) -> Path:
    return next(folder.glob("calibration-*")) if name == CALIBRATION else folder / name


def mutate(random: random.Random, folder: Path, good: Path, other: Path) -> Path:
    """Damage one file of a cache; return which."""
    names = [MANIFEST, MANIFEST, CALIBRATION]
    manifest = read_manifest(good)
    names += [str(shard_path(Path(), manifest, shard)) for shard in range(6)] * 2
    name = random.choice(names)
    path, data = folder / file_of(good, name).name, file_of(good, name).read_bytes()
    if name not in (MANIFEST, CALIBRATION):
        path = folder / name
    kind = random.choice(
        ["cut", "flip", "header", "swap", "foreign", "symlink", "folder", "forge", "grow"]
    )
    path.unlink()
    if kind == "cut":
        path.write_bytes(data[: random.randrange(len(data))])
    elif kind == "flip":
        at, bit = random.randrange(len(data)), 1 << random.randrange(8)
        path.write_bytes(data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :])
    elif kind == "header":
        at = random.randrange(min(len(data), 400))
        path.write_bytes(data[:at] + random.randbytes(4) + data[at + 4 :])
    elif kind == "swap":
        path.write_bytes(file_of(good, random.choice(names)).read_bytes())
    elif kind == "foreign":
        path.write_bytes(file_of(other, name).read_bytes())
    elif kind == "symlink":
        path.symlink_to(file_of(good if path.suffix == ".safetensors" else other, name))
    elif kind == "folder":
        path.mkdir()
    elif kind == "grow":
        path.write_bytes(data + random.randbytes(9))
    elif path.suffix == ".json":
        path.write_text(forge(random, json.loads(data), name == MANIFEST))
    else:
        path.write_bytes(random.randbytes(len(data)))
    return path


def forge(random: random.Random, tree: dict[str, Any], sealed: bool) -> str:
    """Another value in a JSON file, under a digest that fits where there is one."""
    tree[random.choice(sorted(tree))] = random.choice(FORGED)
    if sealed and tree.keys() >= {"sha256"}:
        tree.pop("sha256")
        tree["sha256"] = Manifest.from_dict(tree).sha256
    return json.dumps(tree)


@pytest.mark.parametrize("count", [200, pytest.param(1000, marks=pytest.mark.slow)])
def test_of_many_damaged_caches_none_is_trusted_and_none_crashes(
    recipe: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, count: int
) -> None:
    good, other, folder = (tmp_path / name for name in ("good", "other", "damaged"))
    truth = fill(recipe, good, 1)
    fill(recipe, other, 2, "views.hflip=false")
    config = load_config(recipe, cached(folder))
    skeleton, index = make_skeleton(config), build_index(config.data.path)
    shutil.copytree(good, folder)
    chance = random.Random(0)
    refused = missed = served = 0
    caplog.set_level("CRITICAL")
    for _ in range(count):
        path = mutate(chance, folder, good, other)
        try:
            manifest, calibration = open_cache(config, skeleton, index)
        except CacheError as error:
            assert str(folder) in str(error)
            refused += 1
        else:
            assert calibration is None or bool((calibration.std == 1).all())
            rows = [chance.randrange(ROWS) for _ in range(8)]
            with reading(folder, manifest) as read:
                found = read(rows)
            for k, (row, fault) in enumerate(zip(rows, found.faults, strict=True)):
                missed += fault is not None
                served += fault is None
                for name in truth if fault is None else ():
                    assert torch.equal(found.fields[name][k], truth[name][row])
        restore(path, good / path.relative_to(folder))
    assert min(refused, missed, served) > count / 8


def restore(path: Path, good: Path) -> None:
    if path.is_dir():
        path.rmdir()
    else:
        path.unlink()
    os.link(good, path)


def test_a_shard_that_appears_later_is_found_and_a_damaged_one_is_logged_once(
    recipe: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    truth = fill(recipe, tmp_path, 3)
    manifest = read_manifest(tmp_path)
    absent, path = (shard_path(tmp_path, manifest, shard) for shard in (1, 2))
    absent.rename(tmp_path / "later")
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))  # the checksum of the last row
    with reading(tmp_path, manifest) as read:
        assert read([7, 20]).faults == ["it is not complete", "it differs from its checksum"]
        damaged = read([20, 19])
        assert damaged.faults == ["it differs from its checksum", None]
        assert damaged.fields["attention"][0].unique().tolist() == [1 / 16]
        assert not damaged.fields["features"][0].any()
        (line,) = caplog.messages
        assert line == f"{path}, row 20: it differs from its checksum; build this shard again"
        (tmp_path / "later").rename(absent)
        draft = tmp_path / "draft"
        draft.write_bytes(data)
        draft.replace(path)
        repaired = read([7, 20])
        assert repaired.faults == [None, None]
        assert torch.equal(repaired.fields["features"], truth["features"][[7, 20]])


def test_a_shard_that_the_store_does_not_give_is_not_said_to_be_damaged(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fill(recipe, tmp_path, 3)
    manifest = read_manifest(tmp_path)
    path = shard_path(tmp_path, manifest, 0)
    with reading(tmp_path, manifest) as read:
        with monkeypatch.context() as patch:
            patch.setattr(reader_module, "open_regular", refuse_with_eio)
            assert read([0]).faults == ["the store fails (Input/output error)"]
        path.write_bytes(path.read_bytes()[:-1])
        damaged = read([0]).faults[0]
    assert caplog.messages == [
        f"{path}, row 0: the store fails (Input/output error); see that the storage works",
        f"{path}, row 0: {damaged}; build this shard again",
    ]


def refuse_with_eio(path: Path) -> int:
    raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_pipes_and_devices_in_a_cache_are_not_read(
    recipe: Path, tmp_path: Path, make: Callable[[Path], None]
) -> None:
    fill(recipe, tmp_path, 5)
    manifest = read_manifest(tmp_path)
    path = shard_path(tmp_path, manifest, 0)
    path.unlink()
    make(path)
    with reading(tmp_path, manifest) as read:
        faults = read([0, 7]).faults
    assert str(faults[0]).startswith("it cannot be read (") and faults[1] is None
    for path in (
        calibration_path(tmp_path, manifest.calibration_sha256 or ""),
        tmp_path / MANIFEST,
    ):
        path.unlink()
        make(path)
        with pytest.raises(CacheError, match="cannot be trusted"):
            load_calibration(tmp_path, manifest.calibration_sha256, manifest.width)
            read_manifest(tmp_path)


def test_a_folder_that_holds_no_cache_is_not_to_be_deleted(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text('{"name": "photographs", "files": []}')
    with pytest.raises(CacheError, match=r"is not that of a cache; name another folder"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
def test_a_cache_that_cannot_be_read_now_is_not_to_be_deleted(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    fill(recipe, tmp_path, 5)
    manifest, opened = read_manifest(tmp_path), os.open

    def refuse(path: Any, *arguments: Any, **options: Any) -> int:
        if str(path).endswith((MANIFEST, ".safetensors")):
            raise OSError(number, os.strerror(number), str(path))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(os, "open", refuse)
    for read in (
        lambda: read_manifest(tmp_path),
        lambda: load_calibration(tmp_path, manifest.calibration_sha256, manifest.width),
    ):
        with pytest.raises(CacheError, match=r"cannot be read \(.*\); make it readable") as caught:
            read()
        assert exit_code_of(caught.value) == (EXIT_STOPPED if number == errno.EIO else EXIT_CONFIG)


def test_a_missing_shard_is_not_searched_again_until_its_folder_may_have_changed(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(recipe, tmp_path, 7)
    manifest = read_manifest(tmp_path)
    away = tmp_path / "away"
    away.mkdir()
    moved = {shard_path(tmp_path, manifest, n): away / str(n) for n in (3, 4)}
    for path, to in moved.items():
        path.rename(to)
    calls: Counter[str] = Counter()
    now = 0.0
    for name in ("open_regular", "list_shards"):
        real = getattr(reader_module, name)

        def counted(path: Path, name: str = name, real: Any = real) -> Any:
            calls[name] += 1
            return real(path)

        monkeypatch.setattr(reader_module, name, counted)
    monkeypatch.setattr(time, "monotonic", lambda: now)
    reader = CacheReader(tmp_path, manifest, None, pin=False)

    def read(rows: Any) -> list[str | None]:
        plan = plan_of(rows)
        reader.submit(plan)
        return reader.collect(plan).faults

    missing = range(21, 35)  # shards 3 and 4, of 7 rows each
    for _ in range(50):
        assert read(missing) == ["it is not complete"] * 14
    assert calls["open_regular"] <= 2 and calls["list_shards"] == 1
    for path, to in moved.items():
        to.rename(path)
    calls.clear()
    assert read(missing) == ["it is not complete"] * 14 and not calls
    now = reader.poll_s
    assert read(missing) == [None] * 14
    assert calls == {"open_regular": 2, "list_shards": 1}
    shard_path(tmp_path, manifest, 5).unlink()  # deleted since the folder was listed
    assert read([35]) == read([35]) == ["it is not complete"]
    reader.close()


def test_a_shard_is_opened_once_per_micro_batch_and_neighbours_are_read_together(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = fill(recipe, tmp_path, 6)
    opened: list[int] = []
    reads: list[int] = []
    init, preadv = ShardFile.__init__, os.preadv

    def counted(file: ShardFile, folder: Path, manifest: Manifest, shard: int) -> None:
        opened.append(shard)
        init(file, folder, manifest, shard)

    def read_into(descriptor: int, buffers: Any, offset: int) -> int:
        reads.append(len(buffers))
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(ShardFile, "__init__", counted)
    monkeypatch.setattr(os, "preadv", read_into)
    rows = [9, 20, 8, 2, 7, 12, 9, 3]  # shards of 7 rows: 1, 2 and 0
    with reading(tmp_path, read_manifest(tmp_path)) as read:
        found = read(rows)
    assert found.faults == [None] * len(rows)
    for name, values in truth.items():
        assert torch.equal(found.fields[name], values[rows])
    assert sorted(opened) == [0, 1, 2]
    # runs 2-3, 7-9, 9, 12 and 20, of each of five tensors
    assert sorted(reads) == sorted([2, 3, 1, 1, 1] * 5)


def test_few_shards_are_open_at_a_time_and_none_after_the_end(recipe: Path, tmp_path: Path) -> None:
    truth = fill(recipe, tmp_path, 4)
    order = np.random.default_rng(0).permutation(np.tile(np.arange(ROWS), 5))
    with reading(tmp_path, read_manifest(tmp_path), limit=2) as read:
        found = read(order)
        assert found.faults == [None] * len(order)
        assert torch.equal(found.fields["features"], truth["features"][order])
        assert 1 <= num_open(tmp_path) <= 2
    assert num_open(tmp_path) == 0


def test_the_readers_of_several_teachers_share_the_files_that_may_be_open(
    recipe: Path, tmp_path: Path
) -> None:
    """A quarter of what the process may open is for all caches together, not for each."""
    fill(recipe, tmp_path, 4)
    manifest, order = read_manifest(tmp_path), np.random.default_rng(0).permutation(ROWS)
    with reading(tmp_path, manifest, limit=4) as first, reading(tmp_path, manifest, limit=4) as two:
        for part in np.split(order, 5):
            assert first(part).faults == two(part).faults == [None] * len(part)
        assert 2 <= num_open(tmp_path) <= 4
        shares = num_open(tmp_path)
    with reading(tmp_path, manifest, limit=4) as alone:
        alone(order)
        assert shares <= 4 == num_open(tmp_path)


def num_open(folder: Path) -> int:
    """Files of a folder that this process has open."""
    files = [os.path.realpath(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")]
    return sum(file.startswith(str(folder)) for file in files)


def test_plans_are_matched_with_their_rows_even_if_batches_are_lost(
    recipe: Path, tmp_path: Path
) -> None:
    fill(recipe, tmp_path, 5)
    reader = CacheReader(tmp_path, read_manifest(tmp_path), 2, pin=False)
    plans = [plan_of([3, 8]), plan_of([5, 6]), plan_of([1, 2])]
    for plan in plans:
        reader.submit(plan)
    assert reader.collect(plans[1]).numbers == [5, 6]
    assert reader.collect(plans[2]).numbers == [1, 2]
    with pytest.raises(RuntimeError, match="please report this"):
        reader.collect(plans[0])
    reader.close()
