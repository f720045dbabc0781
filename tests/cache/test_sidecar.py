"""Which shards a sidecar computes and deletes, on a simulated clock."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from cmtmae_scale.cache.format import ENDLESS, SHARDS, Manifest, seal_path, shard_path
from cmtmae_scale.cache.sidecar import ABANDONED_S, Sidecar, delete_shards_before
from cmtmae_scale.runtime.progress_file import (
    ProgressFile,
    PublishedProgress,
    read_published_progress,
)

SIZE = 10


class Clock:
    def __init__(self) -> None:
        self.now = 0.0
        self.pauses = 0

    def __call__(self) -> float:
        return self.now

    def pause(self, seconds: float) -> None:
        self.pauses += 1
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


def make(folder: Path, clock: Clock, **options: Any) -> Sidecar:
    manifest = Manifest({}, {}, "bf16", ENDLESS, SIZE, 4, 4, 8, None)
    (folder / SHARDS).mkdir(exist_ok=True)
    options = {"stripe": (0, 1), "ahead": 3, "between": 2, "patience_s": 60} | options
    return Sidecar(folder, manifest, folder, clock=clock, pause=clock.pause, **options)


def publish(folder: Path, position: int, saved: int = 0, end: int = 1000) -> None:
    ProgressFile(folder).publish(PublishedProgress(position, saved, end))


def seal(folder: Path, *shards: int) -> None:
    for shard in shards:
        shard_path(folder, shard).touch()
        seal_path(folder, shard).write_text(json.dumps({"size": 0, "sha256": ""}))


def sealed(folder: Path) -> list[int]:
    return sorted(int(path.stem) for path in (folder / SHARDS).glob("*.json"))


def test_shards_come_in_order_up_to_the_bound_and_continue_with_the_run(
    tmp_path: Path, clock: Clock
) -> None:
    shards = make(tmp_path, clock).shards()
    publish(tmp_path, 0)
    for expected in range(4):
        assert next(shards) == expected
        seal(tmp_path, expected)
    sidecar = make(tmp_path, clock)
    sidecar.pause = lambda seconds: publish(tmp_path, 20)
    shards = sidecar.shards()
    assert next(shards) == 4
    assert next(shards) == 5  # shard 4 is still being written


def test_a_shard_that_the_run_would_reach_first_is_skipped(tmp_path: Path, clock: Clock) -> None:
    sidecar = make(tmp_path, clock, ahead=8)
    publish(tmp_path, 0)
    shards = sidecar.shards()
    assert next(shards) == 0
    clock.now += 1.0  # a shard takes a second, in which the run advances by 15 views
    publish(tmp_path, 15)
    # When the next one is computed and written the run will be at 15 + 2 * 15 = 45.
    assert next(shards) == 5


def test_a_run_that_is_always_faster_still_gets_the_last_useful_shard(
    tmp_path: Path, clock: Clock
) -> None:
    sidecar = make(tmp_path, clock, ahead=3)
    publish(tmp_path, 0)
    shards = sidecar.shards()
    next(shards)
    clock.now += 1.0
    publish(tmp_path, 200, saved=200)
    assert next(shards) == 200 // SIZE + 3


def test_nothing_that_the_run_has_passed_is_computed(tmp_path: Path, clock: Clock) -> None:
    sidecar = make(tmp_path, clock)
    publish(tmp_path, 200)  # far ahead of what is saved
    sidecar.update_progress()
    assert sidecar.max_shards < 200 // SIZE and sidecar.choose_shard(None) is None


def test_shards_on_storage_are_bounded_even_if_no_save_succeeds(
    tmp_path: Path, clock: Clock
) -> None:
    sidecar = make(tmp_path, clock, ahead=3, between=2)
    shards = sidecar.shards()
    for position in range(0, 600, 5):
        publish(tmp_path, position)
        sidecar.update_progress()
        shard = sidecar.choose_shard(None)
        if shard is not None:
            seal(tmp_path, shard)
        assert len(sealed(tmp_path)) <= sidecar.max_shards == 8
    assert sealed(tmp_path) == list(range(8))
    shards.close()


def test_sidecars_share_the_shards_and_take_none_twice(tmp_path: Path, clock: Clock) -> None:
    publish(tmp_path, 0)
    taken: list[int] = []
    for number in range(3):
        sidecar = make(tmp_path, clock, stripe=(number, 3), ahead=11, between=20)
        sidecar.update_progress()
        while (shard := sidecar.choose_shard(None)) is not None:
            assert shard % 3 == number
            seal(tmp_path, shard)
            taken.append(shard)
    assert sorted(taken) == list(range(12))


def test_only_shards_before_the_last_saved_position_are_deleted(
    tmp_path: Path, clock: Clock
) -> None:
    sidecar = make(tmp_path, clock)
    seal(tmp_path, *range(6))
    old, young = (tmp_path / SHARDS / f".{n:08d}.safetensors.7" for n in (0, 1))
    for path in (old, young):
        path.touch()
    os.utime(old, (1, path.stat().st_mtime - ABANDONED_S - 1))
    publish(tmp_path, 55, saved=39)
    sidecar.update_progress()
    assert sealed(tmp_path) == [3, 4, 5]
    assert not shard_path(tmp_path, 2).exists() and shard_path(tmp_path, 3).exists()
    assert not old.exists() and young.exists()
    publish(tmp_path, 20, saved=20)  # the run resumed from an older checkpoint
    sidecar.update_progress()
    assert sealed(tmp_path) == [3, 4, 5] and sidecar.choose_shard(None) == 2


def test_a_sidecar_ends_with_its_run_or_after_a_long_stall(tmp_path: Path, clock: Clock) -> None:
    sidecar = make(tmp_path, clock)
    assert list(sidecar.shards()) == [] and not sidecar.ended and clock.now > 60
    publish(tmp_path, 1000, saved=1000)
    sidecar = make(tmp_path, clock)
    assert list(sidecar.shards()) == [] and sidecar.ended


def test_no_shard_is_beyond_the_end_of_the_run(tmp_path: Path, clock: Clock) -> None:
    sidecar = make(tmp_path, clock, ahead=9, between=9)
    publish(tmp_path, 0, end=31)
    sidecar.update_progress()
    seal(tmp_path, 0, 1, 2)
    assert sidecar.choose_shard(None) == 3
    seal(tmp_path, 3)
    assert sidecar.choose_shard(None) is None


def test_a_damaged_or_absent_progress_file_is_ignored(tmp_path: Path, clock: Clock) -> None:
    sidecar = make(tmp_path, clock)
    for text in ("", "{", '{"position": 1}', "[]", '{"position": "x", "saved": 0, "end": 1}'):
        (tmp_path / "progress.json").write_text(text)
        assert read_published_progress(tmp_path) is None
        sidecar.update_progress()
    assert sidecar.progress is None and sidecar.choose_shard(None) is None


def test_deleting_survives_another_sidecar_that_deletes_too(tmp_path: Path, clock: Clock) -> None:
    make(tmp_path, clock)
    delete_shards_before(tmp_path, 5)
    seal(tmp_path, 1)
    shard_path(tmp_path, 1).unlink()
    delete_shards_before(tmp_path, 5)
    assert sealed(tmp_path) == []
