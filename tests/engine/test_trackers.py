"""Trackers: a failing tracker loses only its own entries; real trackers keep all entries."""

import errno
import json
import logging
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from cmtmae_scale.config.check import check_log
from cmtmae_scale.config.schema import Config
from cmtmae_scale.engine import trackers
from cmtmae_scale.engine.telemetry import Telemetry
from cmtmae_scale.engine.trackers import (
    FAILED,
    LOST,
    close_trackers,
    find_id,
    open_trackers,
    redact,
    refuse_missing_trackers,
    remove_secrets,
)
from cmtmae_scale.errors import ConfigError
from tests.engine.run_case import read_log

FAKE = """
import os, time, json
def init(**settings): note("init", settings)
def log(values, step): note("log", step)
def alert(title, text): note("alert", title)
def finish(): note("finish", None)
def note(name, what):
    print(name)  # a library prints; no answer may come from it
    with open(os.environ["FAKE_FILE"], "a") as file:
        file.write(json.dumps([name, what]) + "\\n")
    {what}
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Installs a package with the name of a tracker, whose calls end with a statement."""

    def install(what: str, top: str = "") -> Path:
        folder = tmp_path / "packages"
        folder.mkdir()
        (folder / "trackio.py").write_text(top + FAKE.replace("{what}", what))
        monkeypatch.syspath_prepend(folder)
        monkeypatch.setenv("PYTHONPATH", str(folder))  # of the tracker's process
        monkeypatch.setenv("FAKE_FILE", str(tmp_path / "calls"))
        return tmp_path / "calls"

    yield install
    sys.modules.pop("trackio", None)


def config_of(run_dir: Path, *names: str) -> Config:
    config = Config()
    config.run.output_dir, config.run.name = str(run_dir), "demo"
    config.log.trackers = [*names]
    return config


def record_steps(run_dir: Path, steps: int, pause_s: float = 0.0) -> list[dict[str, Any]]:
    """The incidents of a run of some steps with the fake tracker."""
    run_dir.mkdir(exist_ok=True)
    opened = open_trackers(config_of(run_dir, "trackio"))
    telemetry = Telemetry(run_dir, 0, steps, 1, 0, opened)
    for step in range(1, steps + 1):
        telemetry.record(step, {"loss/total": 1.0}, 8, 0.0, 8 * step)
        time.sleep(pause_s)
    telemetry.close()
    assert [line["step"] for line in read_log(run_dir) if "loss/total" in line] == [
        *range(1, steps + 1)
    ]
    assert opened[0].process.returncode is not None
    return [line for line in read_log(run_dir) if "incident" in line]


def test_a_tracker_that_works_gets_everything_once(fake, tmp_path: Path) -> None:
    calls = fake("pass")
    assert record_steps(tmp_path / "run", 5) == []
    found = [json.loads(line) for line in calls.read_text().splitlines()]
    assert found[1:] == [*(["log", step] for step in range(1, 6)), ["finish", None]]
    name, settings = found[0]
    run_id = (tmp_path / "run" / "tracker_id").read_text().strip()
    assert name == "init" and settings["name"] == f"demo-{run_id}"
    assert settings["resume"] == "allow" and settings["config"]["log"]["trackers"] == ["trackio"]


def test_a_tracker_that_raises_is_reported_once_counted_and_dropped(
    fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKER_API_KEY", "abcdefgh12345678")
    calls = fake('raise ValueError("no abcdefgh12345678 at http://me:word@host/")')
    failed, lost = record_steps(tmp_path / "run", 30)
    assert failed["incident"] == FAILED and lost["incident"] == LOST
    assert failed["why"].startswith(
        "trackio: ValueError: no (removed) at http://host/; the run continues"
    )
    # every entry of the run, and the incident that reports it
    assert lost["lost_entries"] in (30, 31)
    assert len(calls.read_text().splitlines()) == trackers.FAILURES


def test_a_tracker_that_hangs_or_ends_delays_nothing(
    fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake("time.sleep(600) if name == 'log' and what == 2 else None")
    monkeypatch.setattr(trackers, "CLOSE_S", 1.0)
    monkeypatch.setattr(trackers, "QUEUED", 4)
    failed, lost = record_steps(tmp_path / "run", 9, pause_s=0.02)
    assert failed["why"].startswith("trackio: more than 4 entries wait for it")
    assert lost["lost_entries"] >= 8 - 4


def test_a_queue_that_is_full_at_the_end_does_not_hold_up_the_end(
    fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library drains it in time, and must still meet a last entry."""
    calls = fake("time.sleep(1.0) if name == 'init' else None")
    monkeypatch.setattr(trackers, "QUEUED", 4)
    failed, lost = record_steps(tmp_path / "run", 9)
    assert failed["why"].startswith("trackio: more than 4 entries wait for it")
    assert lost["lost_entries"] >= 9 - 4 + 1
    assert json.loads(calls.read_text().splitlines()[-1]) == ["finish", None]


def test_a_process_that_dies_is_a_failure(fake, tmp_path: Path) -> None:
    fake("os._exit(3) if name == 'log' and what == 2 else None")
    failed, lost = record_steps(tmp_path / "run", 9)
    assert "trackio: its process ended with code 3" in failed["why"]
    assert lost["lost_entries"] in (8, 9)


def test_a_library_that_cannot_be_imported_is_an_error_of_the_config(fake, tmp_path: Path) -> None:
    fake("pass", top="raise ImportError('no libfoo.so')\n")
    with pytest.raises(ConfigError, match=r"libfoo.*pip install 'cmtmae-scale\[trackio\]'"):
        open_trackers(config_of(tmp_path, "trackio"))


def test_a_folder_of_its_name_is_no_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    (tmp_path / "wandb").mkdir()
    for name in ("wandb", "mlflow"):
        monkeypatch.delitem(sys.modules, name, raising=False)
        with pytest.raises(ConfigError, match=f"{name} is not installed; install it with pip"):
            refuse_missing_trackers([name])


def test_the_id_of_a_run_stays_in_its_folder(tmp_path: Path) -> None:
    file = tmp_path / "tracker_id"
    first = find_id(file)
    assert find_id(file) == first and len(first) == 8
    file.write_bytes(b"\xff../../x")
    assert find_id(file) != first


def test_a_store_that_fails_gives_a_run_no_other_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "tracker_id"
    first = find_id(file)
    with monkeypatch.context() as patch:
        fails = mock.Mock(side_effect=OSError(errno.ESTALE, "Stale file handle"))
        patch.setattr(Path, "read_text", fails)
        with pytest.raises(OSError, match="Stale"):
            find_id(file)
    assert find_id(file) == first


def test_secrets_stay_here() -> None:
    config = {"comet": {"api_key": "x", "token": "y"}, "loss": {"tokens": "all"}, "path": ["a"]}
    clean = {"comet": {"api_key": "(removed)", "token": "(removed)"}, **dict([*config.items()][1:])}
    assert remove_secrets(config) == clean
    assert redact("s3://u:p@h/x?a=b", {}) == "s3://h/x"
    for password in ("p", "p@s", "p/s"):  # SQLAlchemy, which MLflow uses, takes a / too
        text = f"run 1 in postgresql://u:{password}@h/db"
        assert redact(text, {}) == "run 1 in postgresql://h/db"
    assert redact("key 12345678.", {"WANDB_API_KEY": "12345678", "EMPTY_KEY": ""}) == (
        "key (removed)."
    )


def test_unknown_trackers_and_half_ranges_are_refused() -> None:
    text = "\n".join(check_log(["wandb", "wandb", "neptune"], [10]))
    assert "'neptune' is not one of wandb, mlflow, trackio" in text
    assert "names a tracker twice" in text and "such as [10, 13]" in text
    assert not [*check_log(["wandb"], [10, 13])]


@pytest.mark.parametrize("name", trackers.tracker_process.CLIENTS)
def test_the_real_library_continues_one_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip(name, reason=f"needs pip install 'cmtmae-scale[{name}]'")
    for variable in ("WANDB_DIR", "MLFLOW_TRACKING_URI", "TRACKIO_DIR"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    caplog.set_level(logging.INFO, "cmtmae_scale")
    Image.fromarray(np.zeros((6, 20, 3), np.uint8)).save(tmp_path / "figure.png")
    for first in (1, 3):  # the second launch repeats step 3
        (tracker,) = open_trackers(config_of(tmp_path, name))
        for step in range(first, first + 3):
            tracker.add_scalars(step, {"loss/total": 1 / step, "lr": 1e-4})
        pixels = np.zeros((6, 20, 3), np.uint8)
        tracker.add_figure(first + 2, "figures", pixels, tmp_path / "figure.png")
        tracker.add_incident(first + 2, "step skipped", "not finite", {})
        monkeypatch.setattr(trackers, "CLOSE_S", 60.0)
        close_trackers([tracker], is_complete=first == 3)
        assert tracker.take_problem() is None and tracker.lost_entries == 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of the libraries
        assert READ[name](tmp_path) == [1, 2, 3, 3, 4, 5]


def wandb_records(data: bytes) -> Iterator[Any]:
    """Records of an offline file: blocks of 32 KiB with parts of records, as in LevelDB's log."""
    from wandb.proto.wandb_internal_pb2 import Record

    at, parts = 7, b""
    while at + 7 <= len(data):
        room = 32768 - at % 32768
        if room < 7:
            at += room
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        part = data[at + 7 : at + 7 + length]
        parts = part if kind in (1, 2) else parts + part  # whole, first; middle, last
        at += 7 + length
        if kind in (1, 4):
            yield Record.FromString(parts)


def read_wandb(run_dir: Path) -> list[int]:
    run_id = (run_dir / "tracker_id").read_text().strip()
    files = sorted((run_dir / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb"))
    assert len(files) == 2  # a folder per launch, both of the id of the run
    found = [record for file in files for record in wandb_records(file.read_bytes())]
    kinds = [record.WhichOneof("record_type") for record in found]
    assert kinds.count("alert") == 2
    rows = [
        {"/".join(i.nested_key) or i.key: i.value_json for i in record.history.item}
        for record in found
    ]
    assert sum("figures/path" in row for row in rows) == 2
    return [int(row["step"]) for row in rows if "loss/total" in row]


def read_mlflow(run_dir: Path) -> list[int]:
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{run_dir}/mlflow.db")
    experiment = client.get_experiment_by_name("cmtmae-scale")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED" and run.info.run_name == "demo"
    assert run.data.params["optimizer.betas"] == "[0.9, 0.95]"
    assert sum(key.startswith("incident.") for key in run.data.tags) == 2
    assert {one.path for one in client.list_artifacts(run.info.run_id)} >= {"config.yaml", "images"}
    return [one.step for one in client.get_metric_history(run.info.run_id, "loss/total")]


def read_trackio(run_dir: Path) -> list[int]:
    import sqlite3

    (file,) = (run_dir / "trackio").glob("*.db")
    with sqlite3.connect(file) as base:
        rows = base.execute("select step, metrics from metrics order by id").fetchall()
        assert len(base.execute("select title from alerts").fetchall()) == 2
    base.close()
    return [step for step, metrics in rows if "loss/total" in json.loads(metrics)]


READ = {"wandb": read_wandb, "mlflow": read_mlflow, "trackio": read_trackio}
