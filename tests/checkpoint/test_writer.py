"""Slow, full and failing stores: training continues, and the next save works."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cmtmae_scale.backends.base import Fragment
from cmtmae_scale.checkpoint import layout, shards, writer
from cmtmae_scale.checkpoint.find import find_checkpoint, find_resume_checkpoint
from cmtmae_scale.checkpoint.writer import Writer
from cmtmae_scale.errors import CheckpointError, LockLostError, SaveError
from cmtmae_scale.runtime.launch import World
from cmtmae_scale.runtime.lock import RunLock
from tests.checkpoint.save_case import (
    fragments,
    save,
    save_with_a_failing_rank,
    state_of,
    version_of,
)
from tests.disk import mounted
from tests.engine.fault_case import take_over
from tests.engine.run_case import STEPS, run, run_on_a_slow_store, write_recipe
from tests.processes import run_ranks


def test_one_save_is_in_flight_and_the_backlog_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gate, begun = threading.Event(), threading.Event()
    copies: list[int] = []
    copy, write = writer.copy_to_host, writer.write_chunks

    def counted_copy(parts: Any) -> Any:
        copies.append(1)
        return copy(parts)

    def slow_write(*arguments: Any) -> Any:
        begun.set()
        gate.wait()
        return write(*arguments)

    monkeypatch.setattr(writer, "copy_to_host", counted_copy)
    monkeypatch.setattr(writer, "write_chunks", slow_write)
    slow = Writer(tmp_path, 0, 1, 9, True, token=7)
    state = fragments()
    assert slow.save(1, state, state_of(1))
    assert [slow.save(step, state, state_of(step)) for step in (2, 3)] == [False, False]
    for part in state.values():
        part.local.fill_(-1.0)  # training continues in the same memory
    assert len(copies) == 1
    assert begun.wait(30)
    assert [line for line in caplog.messages if "this save is skipped" in line] == [
        f"step {step}: the previous save is still being written; this save is skipped"
        for step in (2, 3)
    ]
    gate.set()
    slow.settle()
    assert version_of(layout.folder_of(tmp_path, 1)) == 0
    assert slow.save(4, fragments(), state_of(4))
    slow.settle()
    assert [layout.step_of(folder) for folder in layout.list_checkpoints(tmp_path)] == [4, 1]


@pytest.mark.gloo
def test_replicas_that_write_nothing_wait_for_the_save_too(tmp_path: Path) -> None:
    """Without a save in the background, all ranks meet at its end."""
    overrides = ["backend.sharding=replicate", "checkpoint.background=false", "checkpoint.every=2"]
    assert run_ranks(2, run, write_recipe(tmp_path, depth=1), overrides) == [None, None]
    saved = layout.list_checkpoints(tmp_path / "run" / "checkpoints")
    assert [layout.step_of(folder) for folder in saved] == [6, 4, 2][: len(saved)]
    assert len(saved) > 1 and STEPS == 6


@pytest.mark.gloo
def test_a_store_that_stands_still_holds_up_no_step(tmp_path: Path) -> None:
    """The store moves again only when the last step is done: a step that waited never would."""
    (lines,) = run_ranks(1, run_on_a_slow_store, write_recipe(tmp_path))
    skipped = [line for line in lines if "is skipped" in line]
    assert len(skipped) == STEPS - 2  # step 1 is being written, and the last step waits
    steps = [layout.step_of(f) for f in layout.list_checkpoints(tmp_path / "run" / "checkpoints")]
    assert steps == [STEPS, 1]


@pytest.mark.gloo
@pytest.mark.parametrize("background", [True, False], ids=["background", "at once"])
@pytest.mark.parametrize("marked", [True, False], ids=["it can say so", "it cannot"])
def test_a_rank_that_fails_is_known_before_the_next_save(
    tmp_path: Path, background: bool, marked: bool
) -> None:
    results = run_ranks(2, save_with_a_failing_rank, tmp_path, background, marked)
    assert [started for started, _ in results] == [[True, True, True]] * 2
    first, second = (lines for _, lines in results)
    assert len(first) == 1 and "step-00000001 could not be written" in first[0]
    reason = "rank-00001.safetensors: no space" if marked else "did not arrive: its rank failed"
    assert reason in first[0]
    assert len(second) == (0 if marked else 1)
    assert [layout.step_of(folder) for folder in layout.list_checkpoints(tmp_path)] == [3, 2]
    assert not list(tmp_path.glob(".*"))


def test_parts_of_dead_ranks_are_not_waited_for_at_the_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    alone = Writer(tmp_path, 0, 2, 9, True, token=7)
    assert alone.save(1, fragments(2, 0), state_of(1))
    alone.close(grace_s=0.1)
    assert "rank-00001.safetensors did not arrive" in caplog.text
    assert not list(tmp_path.iterdir())


def test_a_part_that_came_is_published_although_its_rank_has_died(tmp_path: Path) -> None:
    other = Writer(tmp_path, 1, 2, 9, True, token=7)
    other.save(1, fragments(2, 1), state_of(1))
    other.settle()
    alone = Writer(tmp_path, 0, 2, 9, True, token=7)
    alone.save(1, fragments(2, 0), state_of(1))
    alone.close(grace_s=30)
    assert version_of(layout.folder_of(tmp_path, 1)) == 0


def test_a_last_save_that_fails_is_tried_again_and_then_a_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1)
    refusals = iter([OSError(28, "No space left on device")] * 2)
    write = writer.write_chunks

    def full_for_a_while(*arguments: Any) -> Any:
        for error in refusals:
            raise error
        return write(*arguments)

    monkeypatch.setattr(writer, "write_chunks", full_for_a_while)
    last = Writer(tmp_path, 0, 1, 9, True, token=7)
    last.pause_s = 0.0
    last.finish(2, fragments(), state_of(2))
    assert find_checkpoint(tmp_path, 0, 1) == layout.folder_of(tmp_path, 2)
    assert len(caplog.messages) == 2
    refusals = iter([OSError(28, "No space left on device")] * 9)
    with pytest.raises(SaveError, match="step 3 could not be saved in 3 attempts") as raised:
        last.finish(3, fragments(), state_of(3))
    assert raised.value.exit_code == 1
    assert isinstance(raised.value, CheckpointError)
    assert find_checkpoint(tmp_path, 0, 1) == layout.folder_of(tmp_path, 2)


def test_an_error_of_ours_in_the_background_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(writer, "write_chunks", broken)
    unlucky = Writer(tmp_path, 0, 1, 9, True, token=7)
    assert unlucky.save(1, fragments(), state_of(1))
    with pytest.raises(ZeroDivisionError, match="ours"):
        unlucky.settle()


@pytest.mark.parametrize("moment", ["before", "while writing", "after publishing"])
def test_after_a_take_over_nothing_is_published_pruned_or_swept(
    tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, lock = tmp_path / "checkpoints", RunLock(tmp_path, 1000, 1)
    for step in (1, 2):
        save(root, step)
    here = Writer(root, 0, 1, 1, True, token=7, lock=lock)
    foreign = root / ".draft-00000009-other-1"
    write, replace = writer.write_chunks, shards.replace_checkpoint

    def begin_anew() -> None:
        take_over(tmp_path)
        foreign.mkdir()

    def losing_write(*arguments: Any) -> Any:
        begin_anew()
        return write(*arguments)

    def losing_replace(*arguments: Any) -> None:
        replace(*arguments)
        begin_anew()

    if moment == "before":
        begin_anew()
    elif moment == "while writing":
        monkeypatch.setattr(writer, "write_chunks", losing_write)
    else:
        monkeypatch.setattr(shards, "replace_checkpoint", losing_replace)
    assert here.save(3, fragments(), state_of(3))
    here.settle()
    kept = [layout.step_of(folder) for folder in layout.list_checkpoints(root)]
    assert kept == ([3, 2, 1] if moment == "after publishing" else [2, 1])
    assert list(root.glob(".*")) == [foreign]
    here.pause_s = 1000.0  # no second attempt
    with pytest.raises(LockLostError, match="now held by pid 7 on far"):
        here.finish(4, fragments(), state_of(4))
    with pytest.raises(LockLostError):
        find_resume_checkpoint(tmp_path, World(0, 1, 0, 1, "test"), lock)
    assert list(root.glob(".*")) == [foreign]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    with mounted(tmp_path / "disk", "64k") as place:
        yield place


@pytest.mark.parametrize("ballast", range(36, 52, 4))
def test_a_full_disk_costs_a_save_but_neither_the_run_nor_the_older_checkpoint(
    small_disk: Path, ballast: int, caplog: pytest.LogCaptureFixture
) -> None:
    root = small_disk / "c"
    older = save(root, 1)  # 24 KiB in blocks of 4 KiB
    (small_disk / "ballast").write_bytes(bytes((ballast - 24) << 10))
    big = {
        key: Fragment(0, (2048,), torch.zeros(2048), True)
        for key in ("model.encoder.w", "exp_avg.encoder.w")
    }
    here = Writer(root, 0, 1, 9, True, token=7)
    assert here.save(2, big, state_of(2))
    here.settle()
    assert len(caplog.messages) == 1, caplog.messages
    assert f"{layout.folder_of(root, 2)} could not be written ([Errno 28]" in caplog.text
    assert "check space" in caplog.text
    assert not list(root.glob(".*"))
    assert find_checkpoint(root, 0, 1) == older
    (small_disk / "ballast").unlink()
    assert here.save(3, fragments(), state_of(3))
    here.settle()
    assert find_checkpoint(root, 0, 1) == layout.folder_of(root, 3)
