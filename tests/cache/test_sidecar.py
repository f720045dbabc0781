"""Which shards a sidecar computes and deletes, on a simulated clock."""

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from cmtmae_scale.cache import format as cache_format
from cmtmae_scale.cache.format import (
    ABANDONED_S,
    ENDLESS,
    SHARDS,
    Manifest,
    shard_path,
    write_shard,
)
from cmtmae_scale.cache.sidecar import EXTENDED_S, Sidecar, delete_shards_before
from cmtmae_scale.commands import precompute
from cmtmae_scale.runtime.lock import RunLock
from cmtmae_scale.runtime.progress_file import (
    ProgressFile,
    PublishedProgress,
    read_published_progress,
)

SIZE = 10
MANIFEST = Manifest({}, {}, "bf16", ENDLESS, SIZE, 4, 4, 8, None)


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
    options = {"stripe": (0, 1), "ahead": 3, "between": 2, "patience_s": 60} | options
    return Sidecar(folder, MANIFEST, folder, clock=clock, pause=clock.pause, **options)


def publish(folder: Path, position: int, saved: int = 0, end: int = 1000) -> None:
    ProgressFile(folder).publish(PublishedProgress(position, saved, end))


def complete(folder: Path, *shards: int) -> None:
    for shard in shards:
        path = shard_path(folder, MANIFEST, shard)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def found(folder: Path) -> list[int]:
    return sorted(int(path.stem) for path in (folder / SHARDS).rglob("0*.safetensors"))


def test_shards_come_in_order_up_to_the_bound_and_continue_with_the_run(
    tmp_path: Path, clock: Clock
) -> None:
    shards = make(tmp_path, clock).shards()
    publish(tmp_path, 0)
    for expected in range(4):
        assert next(shards) == expected
        complete(tmp_path, expected)
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
            complete(tmp_path, shard)
        assert len(found(tmp_path)) <= sidecar.max_shards == 8
    assert found(tmp_path) == list(range(8))
    shards.close()


def test_sidecars_share_the_shards_and_take_none_twice(tmp_path: Path, clock: Clock) -> None:
    publish(tmp_path, 0)
    taken: list[int] = []
    for number in range(3):
        sidecar = make(tmp_path, clock, stripe=(number, 3), ahead=11, between=20)
        sidecar.update_progress()
        while (shard := sidecar.choose_shard(None)) is not None:
            assert shard % 3 == number
            complete(tmp_path, shard)
            taken.append(shard)
    assert sorted(taken) == list(range(12))


def test_only_shards_before_the_last_saved_position_are_deleted(
    tmp_path: Path, clock: Clock
) -> None:
    sidecar = make(tmp_path, clock)
    complete(tmp_path, *range(6))
    place = tmp_path / SHARDS / "00000"
    old, young = (place / f".{n:08d}.safetensors.7.tmp" for n in (0, 1))
    for path in (old, young):
        path.touch()
    os.utime(old, (1, path.stat().st_mtime - ABANDONED_S - 1))
    publish(tmp_path, 55, saved=39)
    sidecar.update_progress()
    assert found(tmp_path) == [3, 4, 5]
    assert not old.exists() and young.exists()
    publish(tmp_path, 20, saved=20)  # the run resumed from an older checkpoint
    sidecar.update_progress()
    assert found(tmp_path) == [3, 4, 5] and sidecar.choose_shard(None) == 2


def test_a_sidecar_ends_with_its_run_or_after_a_long_stall(tmp_path: Path, clock: Clock) -> None:
    sidecar = make(tmp_path, clock)
    assert list(sidecar.shards()) == [] and not sidecar.ended and clock.now > 60
    publish(tmp_path, 1000, saved=1000)
    sidecar = make(tmp_path, clock)
    assert list(sidecar.shards()) == [] and sidecar.ended


def test_a_complete_run_may_be_about_to_become_longer(tmp_path: Path, clock: Clock) -> None:
    publish(tmp_path, 100, saved=100, end=100)
    sidecar = make(tmp_path, clock, patience_s=3600)
    locks: list[RunLock] = []

    def pause(seconds: float) -> None:
        clock.pause(seconds)
        if clock.now > EXTENDED_S / 2 and not locks:
            locks.append(RunLock(tmp_path, 60, 60))
        if clock.now > 10 * EXTENDED_S:  # its launch has built everything
            publish(tmp_path, 100, saved=100, end=200)

    sidecar.pause = pause
    shards = sidecar.shards()
    assert next(shards) == 10
    publish(tmp_path, 200, saved=200, end=200)
    began = clock.now
    assert list(shards) == [] and sidecar.ended and clock.now == began
    sidecar = make(tmp_path, clock, patience_s=3600)
    locks[0].release()
    assert list(sidecar.shards()) == [] and sidecar.ended
    assert clock.now == pytest.approx(began + EXTENDED_S, abs=1)


def test_no_shard_is_beyond_the_end_of_the_run(tmp_path: Path, clock: Clock) -> None:
    sidecar = make(tmp_path, clock, ahead=9, between=9)
    publish(tmp_path, 0, end=31)
    sidecar.update_progress()
    complete(tmp_path, 0, 1, 2)
    assert sidecar.choose_shard(None) == 3
    complete(tmp_path, 3)
    assert sidecar.choose_shard(None) is None


def test_a_damaged_or_absent_progress_file_is_ignored(tmp_path: Path, clock: Clock) -> None:
    sidecar = make(tmp_path, clock)
    for text in ("", "{", '{"position": 1}', "[]", '{"position": "x", "saved": 0, "end": 1}'):
        (tmp_path / "progress.json").write_text(text)
        assert read_published_progress(tmp_path) is None
        sidecar.update_progress()
    assert sidecar.progress is None and sidecar.choose_shard(None) is None


def test_a_save_lists_only_the_folders_that_hold_shards_behind_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete(tmp_path, 3, 998, 1000, 1002, 2000, 7000)
    listed: list[str] = []
    listdir = os.listdir

    def counted(place: Path) -> list[str]:
        listed.append(place.name)
        return listdir(place)

    monkeypatch.setattr(os, "listdir", counted)
    delete_shards_before(tmp_path, 1001)
    assert sorted(listed) == ["00000", "00001", SHARDS]
    assert found(tmp_path) == [1002, 2000, 7000]
    assert not (tmp_path / SHARDS / "00000").exists()
    listed.clear()
    delete_shards_before(tmp_path, 1003)
    assert sorted(listed) == ["00001", SHARDS]
    delete_shards_before(tmp_path, 2000)
    assert found(tmp_path) == [2000, 7000]
    complete(tmp_path, 5)  # another sidecar was slow
    delete_shards_before(tmp_path, 2000)
    assert found(tmp_path) == [2000, 7000]


def test_deleting_survives_another_sidecar_that_deletes_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    delete_shards_before(tmp_path, 5)
    complete(tmp_path, 1)
    listdir = os.listdir

    def faster(place: Path) -> list[str]:
        names = listdir(place)
        if place.name == "00000":
            shutil.rmtree(place)
        return names

    monkeypatch.setattr(os, "listdir", faster)
    delete_shards_before(tmp_path, 1005)
    assert found(tmp_path) == []


def test_a_folder_that_a_sidecar_deletes_while_a_shard_is_written_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = MANIFEST.empty_rows(SIZE)
    del fields["checksum"]
    save, calls = cache_format.save_file, []

    def late(*arguments: Any) -> None:
        if not calls:
            delete_shards_before(tmp_path, 1000)
        calls.append(1)
        save(*arguments)

    monkeypatch.setattr(cache_format, "save_file", late)
    write_shard(tmp_path, MANIFEST, 7, fields)
    assert found(tmp_path) == [7] and len(calls) == 2


def test_a_sidecar_waits_for_its_run_while_the_store_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, stat, left = tmp_path / "config.yaml", os.stat, [3]
    path.touch()

    def falter(name: Any, *arguments: Any, **options: Any) -> os.stat_result:
        if str(name) == str(path) and left[0]:
            left[0] -= 1
            raise OSError(errno.ESTALE, "Stale file handle", str(path))
        return stat(name, *arguments, **options)

    monkeypatch.setattr(os, "stat", falter)
    monkeypatch.setattr(precompute, "POLL_S", 0.01)
    assert precompute.await_file(path, "the run has not started") and not left[0]
