"""Log lines show what a reader needs: progress, remaining time, and the values that a run has."""

import json
import logging
import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from cmtmae_scale.engine import telemetry as module
from cmtmae_scale.engine.telemetry import Telemetry, format_value


def test_a_line_has_progress_remaining_time_and_the_terms_of_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now))
    caplog.set_level(logging.INFO, "cmtmae_scale")
    telemetry = Telemetry(tmp_path, 100, 200, 10, 6400)
    for step in range(101, 131):
        now += 60.0 if step == 101 else 1.0  # the first step compiles
        values = {"loss/total": 1.25, "loss/teacher": 1.5, "lr": 1.5e-5, "grad_norm": 0.5}
        telemetry.record(step, values, 64, 0.0, 64 * step)
    now += 5.0
    telemetry.record_side_task("eval", 130, {"eval/knn10": 0.5}, 5.0)
    telemetry.close()
    first, second, third, evaluation = caplog.messages
    # 69 s for 10 steps, then 10 s for 10 steps
    assert first == (
        "step 110/200  7.04k views  ETA 10:21  loss 1.250  teacher 1.500  lr 1.50e-05  "
        "grad 0.500  views/s 9.28"
    )
    assert second.startswith("step 120/200  7.68k views  ETA 01:20  loss")
    assert third.startswith("step 130/200  8.32k views  ETA 01:10  loss")
    assert evaluation == "step 130/200  8.32k views  ETA 01:10  eval/knn10 0.5000"


def entries_of(run_dir: Path) -> list[tuple[int, float | None]]:
    lines = (run_dir / "log.jsonl").read_text().splitlines()
    return [(one["step"], one.get("loss/total")) for one in map(json.loads, lines)]


def record(telemetry: Telemetry, step: int, loss: float | None) -> None:
    telemetry.record(step, {} if loss is None else {"loss/total": loss}, 8, 0.0, 8 * step)


def test_a_skipped_step_ends_an_interval_too(tmp_path: Path) -> None:
    telemetry = Telemetry(tmp_path, 0, 6, 2)
    for step, loss in enumerate((1.0, None, 3.0, 5.0, 7.0, None), 1):
        record(telemetry, step, loss)
    telemetry.close()
    assert entries_of(tmp_path) == [(2, 1.0), (4, 4.0), (6, 7.0)]


def test_a_launch_continues_the_interval_of_its_checkpoint(tmp_path: Path) -> None:
    first = Telemetry(tmp_path, 0, 8, 4)
    for step in (1, 2):
        first.record(step, {"loss/total": 2.0, "odd": math.nan}, 8, 0.0, 8 * step)
    state = first.open_interval()
    record(first, 3, 100.0)  # after the checkpoint
    first.close()
    assert state == {"sums": {"loss/total": 4.0}, "counts": {"loss/total": 2}}
    second = Telemetry(tmp_path, 2, 8, 4)
    second.restore(json.loads(json.dumps(state)))
    for step in range(3, 9):
        record(second, step, 4.0)
    second.close()
    assert entries_of(tmp_path) == [(4, 3.0), (8, 4.0)]
    second.restore(None)  # a checkpoint of an earlier version


def test_numbers_keep_their_digits() -> None:
    assert [format_value(v) for v in (1e-9, 0.0, 0.52, 12.0, -1234567.0, float("nan"))] == [
        *("1.000e-09", "0.000", "0.5200", "12.00", "-1,234,567", "nan")
    ]
    assert [format_value(v, 3) for v in (99.94, 123.4, 5120.0)] == ["99.9", "123", "5,120"]
