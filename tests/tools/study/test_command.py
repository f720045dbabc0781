"""The command: what it lists, what it writes, and a small study from beginning to end."""

import json
import re
import shlex
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from cmtmae_scale.commands.study import run_study, write_results
from cmtmae_scale.errors import ConfigError
from cmtmae_scale.tools.study.curves import PANELS, draw_curves
from cmtmae_scale.tools.study.file import load_study
from cmtmae_scale.tools.study.results import collect_results
from cmtmae_scale.tools.study.run_results import POINTS
from cmtmae_scale.tools.study.table import row_command
from cmtmae_scale.tools.study.work import plan_runs
from tests.engine.run_case import make_photographs
from tests.evaluation.evaluation_case import labelled_photographs
from tests.tools.study.study_case import NO_TEACHER, hits_of, put_results, study_tree, write_study

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command changes the working folder, and sets up the packages' loggers."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("cmtmae_scale.commands.study.set_up_logging", lambda *_: None)


def test_the_help_names_every_shipped_study(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_study(["--help"])
    words = set(re.findall(r"[\w]+", capsys.readouterr().out))
    assert {path.stem for path in (ROOT / "configs/studies").glob("*.yaml")} <= words


def written(
    folder: Path, corrects: dict[tuple[str, int], np.ndarray], **evaluation: str
) -> tuple[str, Any, str]:
    """Table, JSON and figure of made-up results; further keys of the evaluation."""
    tree = study_tree(folder)
    tree["evaluation"] |= evaluation
    study = load_study(write_study(folder, tree))
    runs = plan_runs(study)
    for number, run in enumerate(runs):
        if (run.row, run.seed) in corrects:
            put_results(run, corrects[run.row, run.seed], baselines=number == 0)
    record = Path(study.dir) / "study.json"
    write_results(study, runs, [], "study.yaml", record)
    figure = record.with_suffix(".svg")
    drawn = figure.read_text() if figure.exists() else ""
    return record.with_suffix(".md").read_text(), json.loads(record.read_text()), drawn


ALL = {
    ("mae", 0): hits_of(10),
    ("mae", 1): hits_of(12),
    ("cmt", 0): hits_of(20),
    ("cmt", 1): hits_of(24),
    ("half", 0): hits_of(8, 15),
}


def rows_of(table: str) -> list[str]:
    """Lines of the first table, without its head."""
    return table.split("\n\n")[1].splitlines()[2:]


def test_the_table_has_means_deviations_references_and_comparisons(tmp_path: Path) -> None:
    table, results, _ = written(tmp_path, ALL)
    lines = {line.split("|")[1].strip(" `*"): line for line in rows_of(table)}
    assert "| pixels | 2 of 2 | **27.50 +- 3.54** | 12.50 +- 0.00 |" in lines["mae"]
    assert "1 of 1 | **20.00 [10.50, 34.76]**" in lines["half"]
    assert "50.00" in lines["teacher test_vit"] and "6.25" in lines["random weights"]
    assert "6.25" in lines["raw pixels"]
    # differences 0.25 and 0.3: t = 11 with one degree of freedom
    t_test = "`cmt` | `mae` | +27.50 | -4.27 to +59.27 | paired t over seeds, n = 2 | 0.058 | "
    assert f"| linear patches | {t_test}" in table
    # of 40 images 3 are right only by half, 15 only by cmt
    assert (
        "| linear patches | `half` | `cmt` | -30.00 |" in table
        and "McNemar over images, n = 40 | 0.0075" in table
    )
    assert "| 0.058 | not shown |" in table and "| 0.015 | the opposite shown |" in table
    assert "not about other seeds" in table
    assert results["rows"]["mae"]["mean"] == pytest.approx(0.275)
    last = [run["primary"] for run in results["runs"] if run["row"] == "cmt"][-1]
    assert last == 0.6


def test_segmentation_is_a_column_of_rows_and_references(tmp_path: Path) -> None:
    masks = str(tmp_path / "masks")
    table, results, _ = written(tmp_path, ALL, segmentation=masks)
    lines = {line.split("|")[1].strip(" `*"): line for line in rows_of(table)}
    head = table.split("\n\n")[1].splitlines()[0].split("|")
    place = head.index(" k-NN segmentation mIoU ")
    cells = {name: line.split("|")[place : place + 2] for name, line in lines.items()}
    assert cells["mae"] == cells["cmt"] == [" 50.00 +- 0.00 "] * 2
    assert cells["half"] == [" 50.00 [37.50, 62.50] "] * 2
    assert cells["random weights"] == [" 25.00 [12.50, 37.50] "] * 2
    assert cells["teacher test_vit"] == [" 75.00 [62.50, 87.50] "] * 2
    assert cells["raw pixels"] == ["  "] * 2
    assert results["runs"][0]["accuracies"]["k-NN segmentation mIoU"] == [0.5, 0.375, 0.625]
    runs = plan_runs(load_study(tmp_path / "study.yaml"))
    jobs = [
        job.arguments[4:] for run in runs for job in run.jobs if "segmentation" in job.arguments
    ]
    assert len(jobs) == 6  # five runs, and the teacher
    assert all(words[words.index("--train") + 1] == masks for words in jobs)
    assert sum("teacher" in words for words in jobs) == 1
    assert sum("--no-baselines" in words for words in jobs) == 5


def test_each_row_carries_its_command_and_its_result_files(tmp_path: Path) -> None:
    table, results, _ = written(tmp_path, ALL)
    for row, seeds in (("mae", 2), ("cmt", 2), ("half", 1)):
        command = f"cmtmae study study.yaml --rows {row}"
        (line,) = [text for text in table.splitlines() if text.startswith(f"| `{row}` | `cmtmae")]
        assert f"`{command}`" in line and results["rows"][row]["command"] == command
        files = re.findall(r"`(runs/[0-9a-f]+/evaluation/linear-[0-9a-f]+\.json)`", line)
        assert len(files) == seeds
        assert all((tmp_path / "study" / file).exists() for file in files)
        known = [one["settings_digest"] for one in results["runs"] if one["row"] == row]
        assert [file.split("/")[1] for file in files] == known


def test_the_command_of_a_row_can_be_typed_as_it_is() -> None:
    words = shlex.split(row_command("my study.yaml", "half the mask"))
    assert words == ["cmtmae", "study", "my study.yaml", "--rows", "half the mask"]


def test_the_figure_is_drawn_for_what_is_there(tmp_path: Path) -> None:
    _, _, figure = written(tmp_path, ALL)
    root = ElementTree.fromstring(figure)
    texts = ["".join(one.itertext()) for one in root.iter("{http://www.w3.org/2000/svg}text")]
    for expected in ("mae", "cmt", "half", "27.5", "teacher test_vit: 50.0", "random weights: 6.2"):
        assert expected in texts
    dots = [one for one in root.iter() if one.get("class") == "dot"]
    assert len(dots) == 5
    _, _, height, width = (float(x) for x in root.attrib["viewBox"].split())
    assert all(0 <= float(dot.attrib["cx"]) <= max(width, height) for dot in dots)


def test_the_curves_of_the_methods_are_drawn(tmp_path: Path) -> None:
    study = load_study(write_study(tmp_path, study_tree(tmp_path)))
    runs = plan_runs(study)
    assert draw_curves(collect_results(study, runs)) is None
    for number, run in enumerate(runs):
        put_results(run, hits_of(10), baselines=number == 0)
        lines = [{"step": s, "eval/knn10": 0.1 + 0.01 * s + 0.01 * run.seed} for s in range(100)]
        lines.append({"step": 100, "diagnostics/effective_rank": 5.0, "eval/time_fraction": 0.1})
        (run.folder / "log.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    results = collect_results(study, runs)
    series = results.rows[0].found[0].series
    assert set(series) == {"eval/knn10", "diagnostics/effective_rank"}
    assert POINTS / 2 < len(series["eval/knn10"]) <= POINTS and series["eval/knn10"][-1] == (
        99,
        1.09,
    )
    root = ElementTree.fromstring(draw_curves(results) or "")
    texts = ["".join(one.itertext()) for one in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "mae, seeds: 2" in texts and "cmt, seeds: 2" in texts
    assert not any("half" in text for text in texts)  # fewer seeds
    assert PANELS["eval/knn10"] in texts and PANELS["eval/linear"] not in texts


def test_what_is_missing_is_said_and_compared_over_what_both_have(tmp_path: Path) -> None:
    some = {key: ALL[key] for key in (("mae", 0), ("mae", 1), ("cmt", 0))}
    table, results, _ = written(tmp_path, some)
    assert "| 1 of 2 | **50.00 [35.20, 64.80]**" in table
    assert "| `half` |  | 0 of 1 | missing |" in table
    assert "McNemar over images, n = 40" in table and "1 comparisons lack a result." in table
    assert len(results["comparisons"]) == 1
    assert results["rows"]["half"]["mean"] is None


def test_nothing_at_all_is_no_error(tmp_path: Path) -> None:
    table, _, figure = written(tmp_path, {})
    assert "No comparison is available yet." in table and not figure


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999"])
def test_an_accuracy_that_is_not_finite_is_refused(tmp_path: Path, number: str) -> None:
    runs = plan_runs(study := load_study(write_study(tmp_path, study_tree(tmp_path))))
    put_results(runs[0], hits_of(5), baselines=True)
    text = runs[0].linear.read_text()
    runs[0].linear.write_text(text.replace('"accuracy": 0.125', f'"accuracy": {number}', 1))
    with pytest.raises(ConfigError, match=rf"{number} is not a result\); delete it"):
        collect_results(study, runs)


def test_results_on_different_images_are_not_compared(tmp_path: Path) -> None:
    study = load_study(write_study(tmp_path, study_tree(tmp_path)))
    runs = plan_runs(study)
    put_results(runs[0], hits_of(5), baselines=True)
    put_results(runs[1], hits_of(5), digest="other")
    with pytest.raises(ConfigError, match="were evaluated on different images; delete the results"):
        collect_results(study, runs)


def test_results_with_different_labels_are_not_compared(tmp_path: Path) -> None:
    study = load_study(write_study(tmp_path, study_tree(tmp_path)))
    runs = plan_runs(study)
    put_results(runs[0], hits_of(5), baselines=True)  # of an earlier version: not compared
    put_results(runs[1], hits_of(5), labels_digest="one")
    collect_results(study, runs)
    put_results(runs[2], hits_of(5), labels_digest="other")
    message = "linear.*and.*linear.* were evaluated with different labels; delete the results"
    with pytest.raises(ConfigError, match=message):
        collect_results(study, runs)


def test_segmentations_with_different_masks_are_not_compared(tmp_path: Path) -> None:
    tree = study_tree(tmp_path)
    evaluation = tree["evaluation"] | {"segmentation": str(tmp_path / "masks")}
    study = load_study(write_study(tmp_path, tree | {"evaluation": evaluation}))
    runs = plan_runs(study)[:2]
    for run, digest in zip(runs, ("one", "other"), strict=True):
        put_results(run, hits_of(5))
        assert run.segmentation is not None
        result = json.loads(run.segmentation.read_text())
        images = {part: {"digest": digest} for part in ("train", "test")}
        run.segmentation.write_text(
            json.dumps(result | {"method": "segmentation", "images": images})
        )
    with pytest.raises(ConfigError, match=r"segmentation.* were evaluated with different masks"):
        collect_results(study, runs)


def test_results_are_collected_without_running_anything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = write_study(tmp_path, study_tree(tmp_path))
    elsewhere, record = tmp_path / "elsewhere", tmp_path / "docs" / "study-mine.json"
    loaded = load_study(study)
    loaded.dir = str(elsewhere)
    put_results(plan_runs(loaded)[0], hits_of(5), baselines=True)
    assert run_study([str(study), "--dir", str(elsewhere), "--collect", str(record)]) == 0
    assert "1 of 2" in capsys.readouterr().out
    assert [one["seed"] for one in json.loads(record.read_text())["runs"]] == [0]
    assert str(elsewhere) not in record.read_text()
    assert {file.name for file in record.parent.iterdir()} == {
        *("study-mine.json", "study-mine.md", "study-mine.svg")
    }
    assert not (elsewhere / "lock").exists()


def test_a_note_of_several_lines_or_with_a_bar_stays_one_cell(tmp_path: Path) -> None:
    tree = study_tree(tmp_path)
    tree["rows"]["mae"]["note"] = "pixels | no\nteacher\n"
    study = load_study(write_study(tmp_path, tree))
    runs = plan_runs(study)
    put_results(runs[0], hits_of(20), baselines=True)
    write_results(study, runs, [], "study.yaml", tmp_path / "record.json")
    lines = rows_of((tmp_path / "record.md").read_text())
    assert lines[-3].startswith("| `mae` | pixels \\| no teacher | 1 of 2 |")
    assert lines[-2].startswith("| `cmt` |  | 0 of 2 |") and "| missing |" in lines[-2]


def test_a_segmentation_of_one_image_is_refused_with_the_remedy(tmp_path: Path) -> None:
    tree = study_tree(tmp_path)
    evaluation = tree["evaluation"] | {"segmentation": str(tmp_path / "masks")}
    study = load_study(write_study(tmp_path, tree | {"evaluation": evaluation}))
    run = plan_runs(study)[0]
    put_results(run, hits_of(20))
    assert run.segmentation is not None
    result = json.loads(run.segmentation.read_text())
    result["results"] = [row | {"interval_95": None} for row in result["results"]]
    run.segmentation.write_text(json.dumps(result))
    with pytest.raises(ConfigError, match=r"one test image gives no interval; give the study's"):
        collect_results(study, [run])


@pytest.mark.parametrize("key", ["train", "test", "segmentation"])
def test_absent_images_are_refused_before_anything_is_trained(
    tmp_path: Path, key: str, caplog: pytest.LogCaptureFixture
) -> None:
    tree = study_tree(tmp_path)
    labelled_photographs(Path(tree["evaluation"]["train"]), 4, 0)
    labelled_photographs(Path(tree["evaluation"]["test"]), 4, 1)
    tree["evaluation"][key] = str(tmp_path / "absent")
    assert run_study([str(write_study(tmp_path, tree))]) == 78
    assert str(tmp_path / "absent") in caplog.text
    assert not (tmp_path / "study").exists()


def test_a_record_that_cannot_be_written_is_one_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    study = write_study(tmp_path, study_tree(tmp_path))
    (tmp_path / "file").write_text("")
    assert run_study([str(study), "--collect", str(tmp_path / "file" / "study.json")]) == 78
    assert "study.json: cannot be written (" in caplog.text


def test_a_dry_run_lists_the_commands_of_the_rows_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = write_study(tmp_path, study_tree(tmp_path))
    assert run_study([str(study), "--dry-run", "--rows", "half", "mae"]) == 0
    text = capsys.readouterr().out
    assert (
        "# half, seed 0: cache, train, evaluate, evaluate\npython -m cmtmae_scale precomp" in text
    )
    assert "# mae, seed 1: train, evaluate, evaluate\npython -m cmtmae_scale pretrain" in text
    assert "# cmt" not in text and text.endswith("3 of 3 runs are incomplete\n")
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--rows", "coffee"], "--rows coffee: the study's rows are mae, cmt, half"),
        (["--minutes", "0"], "0 must be above 0"),
        (["--jobs", "0"], "0 must be at least 1"),
        (["--collect", "results-0.2"], "results-0.2: give a name that ends in .json"),
    ],
)
def test_mistakes_exit_with_code_78(
    tmp_path: Path,
    options: list[str],
    expected: str,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    study = write_study(tmp_path, study_tree(tmp_path))
    try:
        code = run_study([str(study), *options])
    except SystemExit as left:
        code = left.code
    assert code == 78
    assert expected in caplog.text + capsys.readouterr().err


@pytest.mark.slow
def test_a_study_from_beginning_to_end_and_again(tmp_path: Path) -> None:
    """One row without a teacher and one that reads a cache; the second start has nothing to do."""
    make_photographs(tmp_path / "photos")
    tree = study_tree(tmp_path) | {"seeds": [0], "comparisons": [["cmt", "mae"]]}
    labelled_photographs(Path(tree["evaluation"]["train"]), 24, 0)
    labelled_photographs(Path(tree["evaluation"]["test"]), 12, 1)
    tree["rows"] = {"mae": {"settings": NO_TEACHER}, "cmt": {"settings": ["teacher.mode=cached"]}}
    study = str(write_study(tmp_path, tree))
    assert run_study([study, "--jobs", "2"]) == 0
    results = json.loads((tmp_path / "study" / "study.json").read_text())
    assert [run["row"] for run in results["runs"]] == ["mae", "cmt"]
    assert all(run["series"]["loss/total"][-1][0] == 4 for run in results["runs"])
    assert {name for run in results["runs"] for name in run["references"]} == {
        *("teacher test_vit (random)", "random weights", "raw pixels")
    }
    assert results["comparisons"][0]["pairs"] == 12
    records = sorted((tmp_path / "study" / "runs").glob("*/jobs.jsonl"))
    before = [file.read_text() for file in records]
    assert len(before) == 2 and sum(text.count("\n") for text in before) == 8
    assert run_study([study]) == 0
    assert [file.read_text() for file in records] == before
