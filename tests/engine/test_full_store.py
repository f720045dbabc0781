"""A store that fills up costs lines of the log, but neither the run nor its launches."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cmtmae_scale.engine.sinks import LOST
from cmtmae_scale.engine.telemetry import Telemetry
from cmtmae_scale.runtime.exit_code import delete_exit, write_exit
from tests.disk import mounted
from tests.engine.run_case import read_log, write_recipe
from tests.engine.side_case import fill, launches_on_a_full_store
from tests.processes import run_ranks


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB."""
    with mounted(tmp_path / "disk", "16m") as place:
        yield place


@pytest.mark.gloo
def test_a_full_store_ends_no_run_and_counts_no_launch(tmp_path: Path, disk: Path) -> None:
    ((codes, warnings),) = run_ranks(
        1, launches_on_a_full_store, write_recipe(tmp_path, depth=2), disk, (2, 14)
    )
    assert codes == [75] * 5 + [0]
    run_dir = disk / "run"
    lines = read_log(run_dir)
    steps = [line["step"] for line in lines if "loss/total" in line]
    gone = sorted(set(range(1, 17)) - set(steps))
    assert gone == list(range(gone[0], 15)) and gone[0] > 2  # from the last block on, to the room
    (lost,) = [line for line in lines if line.get("incident") == LOST]
    assert lost["lost_lines"] >= len(gone)
    assert lines.index(lost) == lines.index(next(one for one in lines if one["step"] >= 14))
    assert json.loads((run_dir / "exit.json").read_text())["code"] == 0
    assert sum("log.jsonl cannot be written" in line for line in warnings) == 1
    assert sum("events.out" in line for line in warnings) == 1
    assert "log.jsonl cannot be written" in (run_dir / "train.log").read_text()
    board = EventAccumulator(str(run_dir / "tensorboard"))
    board.Reload()
    assert [point.step for point in board.Scalars("loss/total")][-2:] == [15, 16]
    assert (run_dir / "figures" / "step-00000016.png").exists()


def test_every_record_beside_checkpoints_goes_on_without(disk: Path) -> None:
    telemetry = Telemetry(disk, 0, 100, 1)
    telemetry.record(1, {"loss": 1.0}, 8, 0.0, 8)
    ballast = fill(disk)
    for step in range(2, 60):
        telemetry.record(step, {"loss": 1.0, "other": 2.0}, 8, 0.0, 8 * step)
    telemetry.record_incident(60, "slow rank", "rank 3")
    telemetry.roll_back(59)
    whole = (disk / "log.jsonl").read_bytes()
    assert whole.endswith(b"\n")
    kept = [line["step"] for line in read_log(disk)]
    assert kept == list(range(1, len(kept) + 1))  # whole lines that fitted into the last block
    ballast.unlink()
    telemetry.close()
    (last,) = read_log(disk)[len(kept) :]
    assert last["incident"] == LOST and last["lost_lines"] == 60 - len(kept)


def test_the_outcome_is_written_to_a_full_store(disk: Path) -> None:
    delete_exit(disk)
    fill(disk)
    write_exit(disk, 1, 3, "the last save failed")
    record = json.loads((disk / "exit.json").read_text())
    assert record == {"code": 1, "step": 3, "reason": "the last save failed"}
    assert sorted(path.name for path in disk.iterdir()) == ["ballast", "exit.json"]


@pytest.mark.parametrize(
    "bad", [b'{"step": 2, "lo', b"\x00\x00\x00", b"\xff\xfe{", b"[" * 9999, b'{"loss": 1}', b"[]"]
)
def test_an_unreadable_line_drops_itself_and_no_other(
    tmp_path: Path, bad: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    entries = [b'{"step": 1, "loss": 1}', bad, b'{"step": 3, "loss": 3}', b'{"step": 9}']
    (tmp_path / "log.jsonl").write_bytes(b"\n".join([*entries, b'{"step": 4, "lo']))
    Telemetry(tmp_path, 5, 9, 1).close()
    assert [line["step"] for line in read_log(tmp_path)] == [1, 3]
    assert "2 unreadable lines were dropped (line 2, 5)" in caplog.text
