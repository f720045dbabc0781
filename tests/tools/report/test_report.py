"""The report shows what a run's files hold, and names what is missing."""

import errno
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from cmtmae_scale.commands.report import write_page, write_report
from cmtmae_scale.tools.report import ranges
from cmtmae_scale.tools.report.chart import BUCKETS, Frame, Line
from cmtmae_scale.tools.report.page import render_page
from cmtmae_scale.tools.report.run import Run, read_run
from cmtmae_scale.tools.report.sections import curves_section, headline, identity_section
from cmtmae_scale.tools.report.spent import time_fractions
from tests.tools.report.report_case import entries, write_figure, write_lines, write_run

VOID = {"meta", "link", "img", "path", "rect", "circle", "br"}


class Outline(HTMLParser):
    """Checks that elements are closed in order; collects text and addresses."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.addresses: list[str] = []
        self.anchors: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "srcset", "action", "data"):
                self.addresses.append(value or "")
            if name == "id":
                self.anchors.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words.append(data)


def read_page(file: Path) -> tuple[str, Outline]:
    """Text of a page, one space between words, and its outline."""
    outline = Outline()
    outline.feed(file.read_text())
    assert not outline.open
    return " ".join(" ".join(outline.words).split()), outline


def report(*runs: Path) -> str:
    return read_page(write_page(runs))[0]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("alone") / "run", "log.every=2")


def test_a_finished_run_is_reported_completely(finished: Path) -> None:
    words = report(finished)
    for phrase in (
        "done",
        "60 of 60",
        "configs/demo.yaml",
        "log.every=2",
        "torch 2.11",
        "vit_small_patch14_dinov2 of timm",
        "Agreement of the two attentions",
        "Attention that stays visible",
        "Learning rate",
        "Teacher's weight",
        "No sibling folder holds a finished run of the same settings",
        "Step 60",
        "None: one launch, no bad file, no recorded incident.",
        "60/128",
        "student is NOT clearly better",
        "chance 25.0 %",
    ):
        assert phrase in words, phrase


def test_the_page_fetches_nothing_and_its_links_lead_somewhere(finished: Path) -> None:
    page = write_page([finished])
    text, (_, outline) = page.read_text(), read_page(page)
    for address in outline.addresses:
        assert address.startswith(("data:", "#")), address
    assert {a[1:] for a in outline.addresses if a.startswith("#")} <= set(outline.anchors)
    assert len(outline.anchors) == len(set(outline.anchors))
    assert not re.search(r"<script|@import|url\(|https?:", text)
    assert text.count("data:image/png") == 3


def test_time_is_split_into_fractions_that_sum_to_one(finished: Path) -> None:
    # of each second 0.1 are evaluations; a quarter of the rest is waiting
    words = report(finished)
    assert "computing 67.5 %" in words
    assert "waiting for data 22.5 %" in words
    assert "evaluations 10.0 %" in words


def test_what_users_and_files_say_is_text_never_markup(tmp_path: Path) -> None:
    name = "<script>alert(1)</script>"
    run = write_run(tmp_path / "run", f"run.name='{name}'")
    bad = {"sample_id": 1, "name": f"{name}.jpg", "path": "p", "offset": None, "reason": name}
    write_lines(run / "quarantine.jsonl", [bad])
    (run / "exit.json").write_text(json.dumps({"code": 1, "step": 60, "reason": name}))
    page = write_page([run]).read_text()
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 4


def test_a_run_that_has_just_begun_says_what_is_not_there_yet(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    for name in ("log.jsonl", "exit.json", "starts.jsonl"):
        (run / name).unlink()
    for folder in ("figures", "evaluation"):
        for path in sorted((run / folder).rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
    words = report(run)
    for phrase in (
        "not ended: still running, or killed",
        "0 of 60",
        "The log has no entry yet.",
        "There are no figures: the first is due at step 200.",
        "No time was logged yet.",
        "Recipe, overrides and versions were not recorded.",
        "The run was not evaluated during training",
        "holds no result of cmtmae evaluate",
    ):
        assert phrase in words, phrase


def test_a_half_written_line_is_named_and_the_rest_used(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with (run / "log.jsonl").open("a") as log:
        log.write('{"step": 62, "loss/to')
    words = report(run)
    assert re.search(r"log.jsonl: line 37 cannot be read; the rest is used", words)
    assert "60 of 60" in words


def test_files_of_the_wrong_kind_are_named_and_ignored(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "exit.json").write_text("[1, 2")
    (run / "evaluation" / "broken.json").write_text("{")
    (run / "evaluation" / "empty.json").write_text('{"method": "knn"}')
    (run / "evaluation" / "strange.json").write_text('{"results": [{"accuracy": "much"}, 3]}')
    (run / "quarantine.jsonl").write_text('"text"\n{}\n')
    (run / "config.yaml").write_text("run: {name: old, dir: x}\nvanished: {key: 1}\n")
    (run / "starts.jsonl").write_text('{"overrides": 3, "versions": [1], "step": "x"}\n')
    words = report(run)
    for phrase in (
        "exit.json cannot be read",
        "evaluation/broken.json cannot be read",
        "evaluation/empty.json holds no result and is not shown",
        "quarantine.jsonl: line 1 cannot be read",
        "config.yaml is not this version's",
    ):
        assert phrase in words, phrase


def test_numbers_that_are_not_finite_leave_a_gap(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    log = entries(60)
    log[5]["loss/total"] = float("nan")
    log[7]["grad_norm"] = float("inf")
    write_lines(run / "log.jsonl", list(log))
    page = re.sub('base64,[^"]+', "", write_page([run]).read_text().split("<body>")[1])
    assert "nan" not in page.lower().replace("dominant", "")
    assert "inf," not in page and "inf " not in page


def test_incidents_are_listed(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with (run / "log.jsonl").open("a") as log:
        log.write(json.dumps({"step": 33, "incident": "skipped step", "loss": "nan"}) + "\n")
    bad = [
        {"sample_id": k, "name": f"a/{k}.jpg", "path": f"photos/a/{k}.jpg", "reason": "truncated"}
        for k in range(25)
    ]
    write_lines(run / "quarantine.jsonl", bad)
    starts = json.loads((run / "starts.jsonl").read_text())
    write_lines(run / "starts.jsonl", [starts, starts | {"step": 31}])
    words = report(run)
    for phrase in (
        "33 skipped step loss nan",
        "Relaunched 1 times, from step 31.",
        "25 images could not be decoded",
        "a/19.jpg truncated",
        "and 5 more",
    ):
        assert phrase in words, phrase
    assert "a/20.jpg" not in words


def test_a_run_that_goes_on_after_its_last_end_is_not_called_done(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "exit.json").write_text(json.dumps({"code": 75, "step": 30, "reason": "SIGTERM"}))
    assert "running again, or killed since its last end" in report(run)
    (run / "exit.json").write_text(json.dumps({"code": 75, "step": 60, "reason": "SIGTERM"}))
    assert "stopped; the same command continues SIGTERM" in report(run)
    reached = {"code": 0, "step": 30, "reason": "train.stop_after=30 is reached already"}
    (run / "exit.json").write_text(json.dumps(reached))
    lines = (run / "log.jsonl").read_text().splitlines(keepends=True)
    (run / "log.jsonl").write_text("".join(lines[:15]))
    assert "stopped before its end train.stop_after=30 is reached" in report(run)


def test_many_figures_are_thinned_and_counted(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    for step in range(1, 20):
        write_figure(run, step)
    page = write_page([run])
    assert page.read_text().count("data:image/png") == 4
    words = read_page(page)[0]
    assert "4 of 22" in words
    assert re.search(r"Step 60 .*Step 1 ", words)


def test_only_finished_runs_of_the_same_settings_make_a_range(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    write_run(tmp_path / "other-recipe", "mask.ratio=0.5", seed=1)
    crashed = write_run(tmp_path / "crashed", seed=2)
    (crashed / "exit.json").write_text(json.dumps({"code": 1, "step": 9, "reason": "crash"}))
    early = write_run(tmp_path / "early", seed=5)
    reached = {"code": 0, "step": 30, "reason": "train.stop_after=30 is reached already"}
    (early / "exit.json").write_text(json.dumps(reached))
    (tmp_path / "no-run").mkdir()
    assert "No sibling folder holds a finished run" in report(run)
    write_run(tmp_path / "seed-3", "log.every=5", "backend.name=deepspeed", seed=3)
    assert "one other run of these settings" in report(run)
    write_run(tmp_path / "seed-4", seed=4)
    words = report(run)
    assert "range of 2 other runs of these settings" in words
    assert "seed-3 (seed 3), seed-4 (seed 4)" in words


def test_a_range_is_drawn_from_a_row_of_a_study(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run" / "run")
    write_run(tmp_path / "run" / "sibling", seed=3)
    runs = [
        {"row": row, "seed": seed, "series": {"eval/knn10": [[10, 0.1 + seed], [60, 0.2]]}}
        for row, seed in (("cmt", 0), ("cmt", 1), ("mae", 0))
    ]
    record = tmp_path / "study.json"
    record.write_text(json.dumps({"runs": runs}))
    words = read_page(write_page([run], None, [str(record), "cmt"]))[0]
    assert "range of 2 other runs of cmt" in words and "of these settings" not in words
    assert "cmt, seed 0, cmt, seed 1, of study.json" in words
    mistakes = {
        "half": "half has no run there; its rows with a run are cmt, mae",
        "{}": "is not a study's record",
        "none": "it has no run yet",
    }
    for mistake, message in mistakes.items():
        content = {"{}": {}, "none": {"runs": []}}.get(mistake, {"runs": runs})
        record.write_text(json.dumps(content))
        assert write_report([str(run), "--reference", str(record), mistake]) == 78
        assert message in capsys.readouterr().err


def test_runs_are_compared(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", "run.name=one")
    two = write_run(tmp_path / "two", "run.name=two", "mask.ratio=0.5", seed=1)
    page = write_page([one, two])
    assert page == one / "comparison.html"
    words, outline = read_page(page)
    assert "mask.ratio 0.75 0.5" in words
    assert "run.seed 0 1" in words
    assert "Overlaid curves" in words
    assert re.search(r"one done 60 .* two done 60", words)
    assert {"r1-curves", "r2-curves", "final"} <= set(outline.anchors)


def test_runs_of_one_name_get_different_labels(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name) for name in ("one", "two")]
    words = report(*runs)
    assert all(f"demo ({run})" in words for run in runs)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (False, "no such folder; name the folder of run.output_dir"),
        (True, "is not a run's folder, it has none of config.yaml, log.jsonl"),
    ],
)
def test_a_folder_that_is_no_run_is_refused(
    tmp_path: Path, make: bool, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "x"
    if make:
        folder.mkdir()
    assert write_report([str(folder)]) == 78
    assert message in capsys.readouterr().err
    assert list(tmp_path.rglob("*.html")) == []


def test_a_file_that_cannot_be_written_is_refused(
    tmp_path: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert write_report([str(finished), "--out", str(tmp_path / "file" / "x.html")]) == 78
    assert "name another file with --out" in capsys.readouterr().err
    assert write_report([str(finished), "--out", str(tmp_path / "new" / "x.html")]) == 0
    assert (tmp_path / "new" / "x.html").is_file()


def test_the_use_of_time_counts_every_launch() -> None:
    """The first launch spent half of its time on evaluations, the second a fifth."""
    run = Run(Path("run"), "run", launches=[{"step": 0}, {"step": 10}])
    run.logged = {
        "images_s": [(10.0, 2.0), (20.0, 1.0)],
        "data_wait_fraction": [(10.0, 0.2), (20.0, 0.0)],
        "eval/time_fraction": [(10.0, 0.5), (20.0, 0.2)],
    }
    # steps: 5 + 10; evaluations: 5 + 2.5
    expected = {"computing": 14 / 22.5, "waiting for data": 1 / 22.5, "evaluations": 7.5 / 22.5}
    assert time_fractions(run) == pytest.approx(expected)
    assert time_fractions(Run(Path("run"), "run")) == {}


def test_an_accuracy_has_its_step_chance_and_random_weights(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    row = {"weights": "random weights", "features": "patches", "method": "k-NN k=10"}
    result = {"results": [row | {"accuracy": 0.34}, row | {"method": "linear", "accuracy": 0.9}]}
    result["images"] = evaluated_images(read_run(folder))
    (folder / "evaluation" / "knn-2.json").write_text(json.dumps(result))
    text = headline(read_run(folder))
    assert "50.0 %<small>at step 60, chance 25.0 %, random weights 34.0 %<" in text
    assert "60.0 %<small>at step 60, chance 25.0 %<" in text


def evaluated_images(run: Run, **changes: Any) -> dict[str, Any]:
    """The images of the evaluation during a run, as a result file has them."""
    return {
        part: {"path": run.settings[f"eval.{part}_path"], "digest": f"digest of {part}"} | changes
        for part in ("train", "test")
    }


def test_random_weights_stand_beside_an_accuracy_on_the_same_images_only(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run"))
    row = {"weights": "random weights", "features": "patches", "method": "k-NN k=10"}
    own, moved = evaluated_images(run), evaluated_images(run, path="elsewhere")
    other = evaluated_images(run, digest="other")

    def is_shown(**facts: Any) -> bool:
        run.results = [("x.json", {"results": [row | {"accuracy": 0.34}], **facts})]
        return "random weights 34.0 %" in headline(run)

    # without an index of its own the run knows the paths alone
    assert is_shown(images=own) and is_shown(images=other)
    assert not is_shown() and not is_shown(images=moved)
    assert not is_shown(images=own | {"train": moved["train"]})
    run.digests = {part: f"digest of {part}" for part in ("train", "test")}
    assert is_shown(images=own) and is_shown(images=moved)
    assert not is_shown(images=other) and not is_shown(images=own | {"test": other["test"]})
    assert not is_shown(images=own, split="80% of each class to train")
    assert is_shown(images=own, settings={"temperature": 0.07})
    assert not is_shown(images=own, settings={"temperature": 0.0})
    run.settings = {}
    assert is_shown(images=own)
    run.digests = {}
    assert not is_shown(images=own)


def test_the_images_of_an_evaluation_are_those_of_its_index(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    kept = folder / "evaluation" / "test-index"
    kept.mkdir()
    (kept / "index.json").write_text(json.dumps({"digest": "d", "labels": ["a"]}))
    run = read_run(folder)
    assert run.digests == {"test": "d"} and run.num_classes == 4


def test_a_measure_without_labels_has_its_verdict(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    file = folder / "evaluation" / "knn-momentum-step-00000060.json"
    row = {"weights": "momentum, step 60", "measure": "mIoU", "value": 0.4}
    file.write_text(json.dumps({"results": [row], "verdict": "ours is clearly better (mIoU)"}))
    assert "ours is clearly better (mIoU)" in report(folder)


def test_grey_lines_are_explained_only_where_they_are(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run"))
    assert "Thin grey lines are schedules" in curves_section(run, [], "curves")
    run.config = None  # the settings of another version: no schedule is known
    assert "grey" not in curves_section(run, [], "curves")


def test_the_images_of_a_run_are_those_of_its_index(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "index").mkdir()
    facts = folder / "index" / "index.json"
    for content in ({"format": 4, "images": 12345}, {"format": 3, "names": ["a.jpg"] * 12345}):
        facts.write_text(json.dumps(content))
        run = read_run(folder)
        assert run.num_images == 12345
        assert "unknown number of" not in identity_section(run, "run")
    for content, problems in (("{}", []), ("x", ["index/index.json cannot be read"])):
        facts.write_text(content)
        run = read_run(folder)
        assert run.num_images is None and run.problems == problems


def test_logs_of_runs_of_other_settings_stay_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = read_run(write_run(tmp_path / "run"))
    write_run(tmp_path / "same", seed=1)
    write_run(tmp_path / "other", "mask.ratio=0.6")
    read: list[str] = []
    real = ranges.read_records
    monkeypatch.setattr(ranges, "read_records", lambda one: read.append(one.dir.name) or real(one))
    assert [other.dir.name for other in ranges.finished_siblings(run, [run])] == read == ["same"]


def test_a_link_to_a_run_is_no_other_run(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run"))
    (tmp_path / "latest").symlink_to("run")
    (tmp_path / "loop").symlink_to("loop")
    assert ranges.finished_siblings(run, [run]) == []
    write_run(tmp_path / "same", seed=1)
    (tmp_path / "twin").symlink_to("same")
    assert [other.dir.name for other in ranges.finished_siblings(run, [run])] == ["same"]


def test_a_sibling_of_another_user_hides_no_range(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python 3.11 and 3.12 raise where a folder may not be entered; root may enter all."""
    run = read_run(write_run(tmp_path / "run"))
    write_run(tmp_path / "same", seed=1)
    (tmp_path / "private").mkdir()
    real = Path.exists

    def exists(path: Path) -> bool:
        if path.parent.name == "private":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(Path, "exists", exists)
    assert [other.dir.name for other in ranges.finished_siblings(run, [run])] == ["same"]


def test_values_of_any_log_are_sorted_and_finite(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    lines = [
        '{"step": 9, "lr": 0.1, "loss/total": NaN, "note": "x", "mask/visible_mass": null}',
        '{"step": 3, "lr": 0.2, "loss/total": 1e29, "grad_norm": -1e308}',
        '{"step": 3, "lr": 0.3, "loss/total": 9e29, "images_s": 9e29, "big": 1' + "0" * 400 + "}",
        '{"step": "7", "lr": 0.4}',
        '{"step": 5, "incident": "bad", "lr": 0.5}',
        '{"step": 5, "lr": 0.6',
    ]
    (folder / "log.jsonl").write_text("\n".join(lines))
    run = read_run(folder)
    assert run.logged == {
        "step": [(3, 3), (3, 3), (9, 9)],
        "lr": [(3, 0.2), (3, 0.3), (9, 0.1)],
        "loss/total": [(3, 1e29), (3, 9e29)],
        "images_s": [(3, 9e29)],
    }
    assert run.last_step == 9 and len(run.incidents) == 1
    assert run.problems == [
        "log.jsonl has an entry without a step; the entry is ignored",
        "log.jsonl: line 6 cannot be read; the rest is used",
    ]


def test_a_long_log_is_drawn_by_few_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of charts."""
    run = read_run(write_run(tmp_path / "run", steps=6000))
    drawn: list[int] = []
    real = Frame.around

    def around(lines: list[Line], *others: Any) -> Frame:
        drawn.extend(len(line.points) for line in lines)
        return real(lines, *others)

    monkeypatch.setattr(Frame, "around", around)
    assert len(run.series("step")) == 3600
    page = render_page([run])
    assert page.count('<figure class="chart">') > 10
    assert len(drawn) > 12 and max(drawn) <= 2 * BUCKETS + 2
