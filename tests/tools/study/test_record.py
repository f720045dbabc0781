"""The record of a study replaces runs whose folder is gone."""

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cmtmae_scale.commands.study import run_study
from cmtmae_scale.tools.study.file import load_study
from cmtmae_scale.tools.study.work import plan_runs
from tests.tools.study.study_case import NO_TEACHER, hits_of, put_results, study_tree, write_study

CORRECT = {("mae", 0): 10, ("mae", 1): 12, ("cmt", 0): 20, ("half", 0): 8}


@pytest.fixture
def done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A study with four results, and its record; returns the folder."""
    monkeypatch.setattr("cmtmae_scale.commands.study.set_up_logging", lambda *_: None)
    study = load_study(write_study(tmp_path, study_tree(tmp_path)))
    for number, run in enumerate(plan_runs(study)):
        if (run.row, run.seed) in CORRECT:
            hits = hits_of(CORRECT[run.row, run.seed], 3 * run.seed)
            put_results(run, hits, baselines=number == 0, labels_digest="a")
            line = json.dumps({"step": 4, "loss/total": 0.5})
            (run.folder / "log.jsonl").write_text(line + "\n")
    collect(tmp_path, tmp_path / "study" / "study.json")
    return tmp_path


def collect(folder: Path, record: Path, **changes: Any) -> dict[str, Any]:
    """Collect what is known in a folder; returns the record."""
    tree = study_tree(folder)
    for key, value in changes.items():
        tree[key] = tree[key] | value if isinstance(value, dict) else value
    assert run_study([str(write_study(folder, tree)), "--collect", str(record)]) == 0
    return json.loads(record.read_text())


def listed(folder: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    capsys.readouterr()
    assert run_study([str(folder / "study.yaml"), "--dry-run"]) == 0
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("#")]


def test_a_study_goes_on_from_its_record_alone(
    done: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = listed(done, capsys)
    shutil.rmtree(done / "study" / "runs")
    assert listed(done, capsys) == before
    assert before[0] == "# mae, seed 0: done" and before.count("# cmt, seed 1: done") == 0
    first = {file.suffix: file.read_bytes() for file in (done / "study").glob("study*")}
    again = collect(done, done / "again.json")
    assert again["runs"][0]["labels"] == {"linear": ["a", "a"], "knn": ["a", "a"]}
    assert {".json", ".md", ".svg"} == set(first)
    for suffix, data in first.items():
        assert (done / f"again{suffix}").read_bytes() == data


def test_the_results_of_a_folder_go_before_the_record(
    done: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A result file that is deleted is written again."""
    run = plan_runs(load_study(done / "study.yaml"))[1]
    run.knn.unlink()
    assert f"# {run.row}, seed {run.seed}: cache, train, evaluate" in listed(done, capsys)
    assert len(collect(done, done / "again.json")["runs"]) == 3


@pytest.mark.parametrize(
    "change",
    [{"evaluation": {"epochs": 3}}, {"settings": ["train.steps=5", "views.views_per_image=1"]}],
    ids=["evaluation", "settings"],
)
def test_records_of_other_settings_are_kept_and_named(
    done: Path, change: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    shutil.rmtree(done / "study" / "runs")
    record = done / "study" / "study.json"
    known = json.loads(record.read_text())["runs"]
    for _ in range(2):
        caplog.clear()
        found = collect(done, record, **change)
        assert found["runs"] == [] and found["unmatched"] == known
        assert "not count now: 4 (mae seed 0, mae seed 1, cmt seed 0, half seed 0)" in caplog.text
    assert collect(done, record)["runs"] == known
    assert "unmatched" not in json.loads(record.read_text())


def test_rows_with_equal_settings_have_records_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows of the initial weights and of the twin share the folder of another."""
    monkeypatch.setattr("cmtmae_scale.commands.study.set_up_logging", lambda *_: None)
    rows = {"random": {"like": "mae", "weights": "random"}, "twin": {"like": "mae"}}
    study = load_study(write_study(tmp_path, tree := with_rows(study_tree(tmp_path), rows)))
    runs = plan_runs(study)
    for number, run in enumerate(runs):
        put_results(run, hits_of(5 if run.row == "random" else 10 + run.seed), baselines=not number)
    record = tmp_path / "study" / "study.json"
    first = collect(tmp_path, record, rows=tree["rows"])
    shutil.rmtree(tmp_path / "study" / "runs")
    for _ in range(2):
        assert collect(tmp_path, record, rows=tree["rows"]) == first
    assert len(first["runs"]) == len(runs) == 9
    assert len({one["settings_digest"] for one in first["runs"]}) == 5


@pytest.mark.parametrize("first", ["new", "cmt"])
def test_recorded_runs_stay_done_where_another_run_has_the_baselines(
    done: Path, first: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """The first run of a study is evaluated beside random weights and raw pixels."""
    caplog.set_level("INFO")
    tree = study_tree(done)
    before = json.loads((done / "study" / "study.json").read_text())["runs"]
    new = {"settings": [*NO_TEACHER, "mask.ratio=0.6"]}
    tree["rows"] = {first: tree["rows"].get(first, new)} | tree["rows"]
    shutil.rmtree(done / "study" / "runs")
    write_study(done, tree)
    assert sum(line.endswith(": done") for line in listed(done, capsys)) == 4
    found = collect(done, done / "again.json", rows=tree["rows"])
    assert sorted(map(str, found["runs"])) == sorted(map(str, before)) and "unmatched" not in found
    assert "not count now" not in caplog.text and "lack an evaluation" not in caplog.text
    study = load_study(done / "study.yaml")
    put_results(plan_runs(study)[0], hits_of(10), baselines=True)
    collect(done, done / "again.json", rows=tree["rows"])
    assert (done / "again.md").read_text().count("*random weights*") == 1


def with_rows(tree: dict[str, Any], rows: dict[str, Any]) -> dict[str, Any]:
    return tree | {"rows": tree["rows"] | rows}


def test_a_record_stays_until_the_run_that_is_trained_again_has_results(done: Path) -> None:
    record, run = done / "study" / "study.json", plan_runs(load_study(done / "study.yaml"))[0]
    shutil.rmtree(done / "study" / "runs")
    known = json.loads(record.read_text())["runs"]
    run.folder.mkdir(parents=True)  # its training was stopped
    for _ in range(2):
        found = collect(done, record)
        assert found["unmatched"] == known[:1] and found["runs"] == known[1:]
    put_results(run, hits_of(11), baselines=True)
    found = collect(done, record)
    assert "unmatched" not in found and found["runs"][0]["primary"] == 11 / 40


def test_an_evaluation_that_is_added_trains_nothing_again(
    done: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    shutil.rmtree(done / "study" / "runs")
    collect(done, done / "again.json")
    assert "lack an evaluation" not in caplog.text
    found = collect(done, done / "again.json", evaluation={"segmentation": str(done / "masks")})
    assert len(found["runs"]) == 4 and "unmatched" not in found
    assert "lack an evaluation: 4 (mae seed 0, cmt seed 0, mae seed 1, half seed 0)" in caplog.text
    assert sum(line.endswith(": done") for line in listed(done, capsys)) == 4


def test_other_features_are_another_measure(done: Path) -> None:
    shutil.rmtree(done / "study" / "runs")
    found = collect(done, done / "again.json", evaluation={"features": "cls"})
    assert found["runs"] == [] and len(found["unmatched"]) == 4


def test_a_record_without_hits_has_no_test_over_images(done: Path) -> None:
    shutil.rmtree(done / "study" / "runs")
    file = done / "study" / "study.json"
    tree = json.loads(file.read_text())
    assert [one["method"] for one in tree["comparisons"]] == ["McNemar over images"] * 2
    for one in tree["runs"]:
        one["hits"] = None
    file.write_text(json.dumps(tree))
    assert collect(done, done / "again.json")["comparisons"] == []


def test_collecting_into_a_record_keeps_the_results_that_are_only_there(done: Path) -> None:
    file = done / "docs.json"
    (done / "study" / "study.json").rename(file)
    shutil.rmtree(done / "study")
    before = file.read_bytes()
    for _ in range(2):
        collect(done, file)
        assert file.read_bytes() == before
    file.write_text("{}")
    assert run_study([str(done / "study.yaml"), "--collect", str(file)]) == 78
    assert file.read_text() == "{}"


@pytest.mark.parametrize("name", ["study.json", "linear-*.json"])
def test_a_store_that_fails_is_no_reason_to_delete_results(
    done: Path, name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Path.read_text

    def fail(path: Path, *options: Any, **more: Any) -> str:
        if path.match(name):
            raise OSError(errno.EIO, "Input/output error", str(path))
        return read(path, *options, **more)

    monkeypatch.setattr(Path, "read_text", fail)
    assert run_study([str(done / "study.yaml"), "--collect", str(done / "again.json")]) == 75
    assert "see that the storage works" in caplog.text and "delete" not in caplog.text


def test_a_result_file_of_something_else_is_named(
    done: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = plan_runs(load_study(done / "study.yaml"))[0]
    for text in ("[]", "{}", '{"results": [{}]}'):
        run.linear.write_text(text)
        caplog.clear()
        assert run_study([str(done / "study.yaml"), "--collect", str(done / "again.json")]) == 78
        assert f"{run.linear.parent}: the files are not results of cmtmae evaluate" in caplog.text


def edited(change: Callable[[dict[str, Any]], object]) -> Callable[[str], str]:
    def edit(text: str) -> str:
        tree = json.loads(text)
        change(tree)
        return json.dumps(tree)

    return edit


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda text: text[:-40], "is not the record of a study"),
        (lambda text: "[]", "is not the record of a study"),
        (lambda text: text.replace("0.25,", "NaN,", 1), "NaN is not a result"),
        (edited(lambda tree: tree.pop("runs")), "KeyError('runs')"),
        (edited(lambda tree: tree["runs"][0].pop("row")), "KeyError('row')"),
        (edited(lambda tree: tree["runs"][0].pop("primary")), "KeyError('primary')"),
        (edited(lambda tree: tree["runs"][0].update(images=["d"])), "mae, seed 0: not a result"),
        (edited(lambda tree: tree["runs"][1].update(series=[1])), "mae, seed 1: not a result"),
        (
            edited(lambda tree: tree["runs"][0].pop("settings_digest")),
            "KeyError('settings_digest')",
        ),
        (edited(lambda tree: tree["runs"][0].update(evaluations=[5])), "seed 0: names that are"),
        (edited(lambda tree: tree["runs"][0].update(evaluations=None)), "seed 0: names that are"),
        (edited(lambda tree: tree["runs"][0].update(primary="x")), "'x' is not a finite number"),
        (edited(lambda tree: tree["runs"][0].update(count=0)), "count=0 is not a number of images"),
        (edited(lambda tree: tree["runs"][0].update(count=400)), "5 bytes of hits are not those"),
        (edited(lambda tree: tree["runs"][0].update(images=[[1], [2]])), "are not digests"),
        (edited(lambda tree: tree["runs"][0].update(training_minutes="x")), "not a finite number"),
        (
            edited(lambda tree: tree["runs"][0]["series"].update({"loss/total": [[4, None]]})),
            "None",
        ),
    ],
)
def test_a_damaged_record_is_refused_and_stays(
    done: Path, edit: Callable[[str], str], expected: str, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.rmtree(done / "study" / "runs")
    file = done / "study" / "study.json"
    text = edit(file.read_text())
    file.write_text(text)
    assert run_study([str(done / "study.yaml")]) == 78
    assert expected in caplog.text and file.read_text() == text
