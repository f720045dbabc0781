"""What a sidecar computes and deletes, with a clock of its own."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from cmtmae_scale.cache.format import ENDLESS, PARTS, Manifest, part_path, seal_path
from cmtmae_scale.cache.sidecar import ABANDONED_S, Follower, delete_before
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


def make(folder: Path, clock: Clock, **options: Any) -> Follower:
    manifest = Manifest({}, {}, "bf16", ENDLESS, SIZE, 4, 4, 8, None)
    (folder / PARTS).mkdir(exist_ok=True)
    options = {"stripe": (0, 1), "ahead": 3, "between": 2, "patience_s": 60} | options
    return Follower(folder, manifest, folder, clock=clock, pause=clock.pause, **options)


def tell(folder: Path, position: int, saved: int = 0, end: int = 1000) -> None:
    ProgressFile(folder).tell(PublishedProgress(position, saved, end))


def seal(folder: Path, *parts: int) -> None:
    for part in parts:
        part_path(folder, part).touch()
        seal_path(folder, part).write_text(json.dumps({"size": 0, "sha256": ""}))


def there(folder: Path) -> list[int]:
    return sorted(int(path.stem) for path in (folder / PARTS).glob("*.json"))


def test_parts_come_in_order_up_to_the_bound_and_go_on_as_the_run_does(
    tmp_path: Path, clock: Clock
) -> None:
    parts = make(tmp_path, clock).parts()
    tell(tmp_path, 0)
    for expected in range(4):
        assert next(parts) == expected
        seal(tmp_path, expected)
    follower = make(tmp_path, clock)
    follower.pause = lambda seconds: tell(tmp_path, 20)
    parts = follower.parts()
    assert next(parts) == 4
    assert next(parts) == 5  # part 4 is still in writing


def test_a_part_that_the_run_would_reach_first_is_left_out(tmp_path: Path, clock: Clock) -> None:
    follower = make(tmp_path, clock, ahead=8)
    tell(tmp_path, 0)
    parts = follower.parts()
    assert next(parts) == 0
    clock.now += 1.0  # a part takes a second, and the run goes on by 15 views in it
    tell(tmp_path, 15)
    # When it is computed and written the run will be at 15 + 2 * 15 = 45.
    assert next(parts) == 5


def test_a_run_that_is_always_faster_still_gets_the_last_part_worth_it(
    tmp_path: Path, clock: Clock
) -> None:
    follower = make(tmp_path, clock, ahead=3)
    tell(tmp_path, 0)
    parts = follower.parts()
    next(parts)
    clock.now += 1.0
    tell(tmp_path, 200, saved=200)
    assert next(parts) == 200 // SIZE + 3


def test_nothing_that_the_run_has_passed_is_computed(tmp_path: Path, clock: Clock) -> None:
    follower = make(tmp_path, clock)
    tell(tmp_path, 200)  # far ahead of what is saved
    follower.watch()
    assert follower.most < 200 // SIZE and follower.choose(None) is None


def test_parts_on_storage_are_bounded_even_where_no_save_succeeds(
    tmp_path: Path, clock: Clock
) -> None:
    follower = make(tmp_path, clock, ahead=3, between=2)
    parts = follower.parts()
    for position in range(0, 600, 5):
        tell(tmp_path, position)
        follower.watch()
        part = follower.choose(None)
        if part is not None:
            seal(tmp_path, part)
        assert len(there(tmp_path)) <= follower.most == 8
    assert there(tmp_path) == list(range(8))
    parts.close()


def test_sidecars_share_the_parts_and_take_none_twice(tmp_path: Path, clock: Clock) -> None:
    tell(tmp_path, 0)
    taken: list[int] = []
    for number in range(3):
        follower = make(tmp_path, clock, stripe=(number, 3), ahead=11, between=20)
        follower.watch()
        while (part := follower.choose(None)) is not None:
            assert part % 3 == number
            seal(tmp_path, part)
            taken.append(part)
    assert sorted(taken) == list(range(12))


def test_only_what_lies_before_the_last_saved_position_is_deleted(
    tmp_path: Path, clock: Clock
) -> None:
    follower = make(tmp_path, clock)
    seal(tmp_path, *range(6))
    old, young = (tmp_path / PARTS / f".{n:08d}.safetensors.7" for n in (0, 1))
    for path in (old, young):
        path.touch()
    os.utime(old, (1, path.stat().st_mtime - ABANDONED_S - 1))
    tell(tmp_path, 55, saved=39)
    follower.watch()
    assert there(tmp_path) == [3, 4, 5]
    assert not part_path(tmp_path, 2).exists() and part_path(tmp_path, 3).exists()
    assert not old.exists() and young.exists()
    tell(tmp_path, 20, saved=20)  # the run began again from an older checkpoint
    follower.watch()
    assert there(tmp_path) == [3, 4, 5] and follower.choose(None) == 2


def test_a_sidecar_ends_with_its_run_or_after_a_long_standstill(
    tmp_path: Path, clock: Clock
) -> None:
    follower = make(tmp_path, clock)
    assert list(follower.parts()) == [] and not follower.ended and clock.now > 60
    tell(tmp_path, 1000, saved=1000)
    follower = make(tmp_path, clock)
    assert list(follower.parts()) == [] and follower.ended


def test_no_part_lies_behind_the_end_of_the_run(tmp_path: Path, clock: Clock) -> None:
    follower = make(tmp_path, clock, ahead=9, between=9)
    tell(tmp_path, 0, end=31)
    follower.watch()
    seal(tmp_path, 0, 1, 2)
    assert follower.choose(None) == 3
    seal(tmp_path, 3)
    assert follower.choose(None) is None


def test_a_damaged_or_absent_progress_file_is_no_news(tmp_path: Path, clock: Clock) -> None:
    follower = make(tmp_path, clock)
    for text in ("", "{", '{"position": 1}', "[]", '{"position": "x", "saved": 0, "end": 1}'):
        (tmp_path / "progress.json").write_text(text)
        assert read_published_progress(tmp_path) is None
        follower.watch()
    assert follower.standing is None and follower.choose(None) is None


def test_deleting_survives_another_sidecar_that_deletes_too(tmp_path: Path, clock: Clock) -> None:
    make(tmp_path, clock)
    delete_before(tmp_path, 5)
    seal(tmp_path, 1)
    part_path(tmp_path, 1).unlink()
    delete_before(tmp_path, 5)
    assert there(tmp_path) == []
