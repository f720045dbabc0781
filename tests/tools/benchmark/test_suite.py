"""The suite runs every open row, keeps what is finished, and writes the page by itself."""

import json
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from cmtmae_scale.commands.benchmark import parse_options, run_benchmark
from cmtmae_scale.config.load import load_config
from cmtmae_scale.errors import EXIT_CONFIG, EXIT_DONE, EXIT_STOPPED
from cmtmae_scale.tools.benchmark import page, smoke, suite
from cmtmae_scale.tools.benchmark.jobs import JOBS, Job
from cmtmae_scale.tools.benchmark.limited import Ended
from cmtmae_scale.tools.benchmark.results import save_tables
from cmtmae_scale.tools.benchmark.rig import SDPA
from cmtmae_scale.tools.benchmark.timeline import Gap, Span, busy_and_gaps, longest_kernels
from tests.engine.run_case import make_photographs

ROOT = Path(__file__).resolve().parents[3]
PAGE = ROOT / "docs" / "performance.md"
NAMES = [job.name for job in JOBS]


def python(code: str) -> str:
    return f"python -c {shlex.quote(code)}"


def save(code: str) -> str:
    """A job that saves a result as ``benchmark.py --output`` does."""
    text = "import json, sys; from pathlib import Path; out = Path(sys.argv[-1])\n"
    text += "out.with_suffix('.md').write_text('- a: b\\n\\n| table |\\n')\n"
    text += "out.with_suffix('.json').write_text(json.dumps({'headline': '7 images/s', "
    text += "'device': '1 x H200', 'versions': {'torch': '2.11'}, 'results': [1]}))\n"
    return f"{python(text + code)} {suite.BENCHMARK}"


QUICK = (
    Job("good", "a", save(""), 20),
    Job("bad", "b", python("print('begun'); raise ValueError('what is wrong')"), 20),
    Job("slow", "c", python("import time; print('begun', flush=True); time.sleep(60)"), 1),
    Job("absent", "d", python(""), 20, ("no_such_package.part",)),
    Job("last", "e", python("print('3 passed in 1 s')"), 20),
)


def test_every_row_of_the_page_has_a_job_and_every_job_a_row(tmp_path: Path) -> None:
    copy = shutil.copy(PAGE, tmp_path / "page.md")
    page.write_page(copy, JOBS, {})
    assert copy.read_text() == PAGE.read_text()
    _, own, _ = page.split_page(PAGE)
    assert [name for name, _ in page.ROW.findall(own)] == NAMES
    # A path that can run, or a job of its own, for all that the section promises.
    promised = PAGE.read_text().partition("The first row, `smoke`")[2].partition("\n")[0]
    paths = " ".join(check.name for chain in smoke.CHAINS for check in chain)
    for word in ("FSDP", "checkpoint", "resume", "evaluation", "fine-tuning", "ZeRO-1", "ZeRO-3"):
        assert word in paths and word in promised
    for word in ("compil", "DALI", "nvImageCodec", "cache"):
        assert word in paths and word in promised


@pytest.mark.parametrize("small", [False, True], ids=["full", "small"])
def test_the_commands_are_accepted(small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for job in JOBS:
        words = suite.command_of(job, "images", small)
        if words[1] != suite.BENCHMARK:
            assert words[:3] == ["python", "-m", "pytest"]
            assert all(Path(word).exists() for word in words if word.startswith("tests/"))
            continue
        options = parse_options(words[2:])
        if words[2] in ("train", "cache"):
            load_config(options.config, options.overrides)
        for sweep in getattr(options, "sweep", ()):
            key, _, values = sweep.partition("=")
            for value in values.split(","):
                assert key != "sdpa" or value in SDPA
                extra = [] if key == "sdpa" else [f"{key}={value}"]
                load_config(options.config, [*options.overrides, *extra])
        assert job.limit_s <= 420 and len(NAMES) == len(set(NAMES))


def test_what_is_finished_is_kept_and_the_next_call_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / "out" / "suite"
    rows = suite.run_suite(QUICK, "x", 5, output, small=False, again=False)
    assert json.loads(output.with_suffix(".json").read_text())["rows"] == rows
    states = [rows[job.name]["state"] for job in QUICK]
    assert states == [suite.DONE, suite.FAILED, suite.OUT_OF_TIME, suite.SKIPPED, suite.DONE]
    assert "ValueError: what is wrong" in caplog.text and "Traceback" in rows["bad"]["tail"]
    good = rows["good"]
    assert (good["headline"], good["text"], good["results"]) == ("7 images/s", "| table |", [1])
    assert rows["last"]["headline"] == "3 passed in 1 s"
    assert "no_such_package.part is not installed" in rows["absent"]["headline"]
    assert suite.suite_exit_code(QUICK, rows) == 1
    table = suite.suite_table(QUICK, rows)
    assert "| good | done |" in table and "| slow | out of time |" in table
    # The next call runs neither what is done, nor again what changed nothing.
    ran = suite.plan_jobs(QUICK, rows, small=False, again=False)
    assert [job.name for job in ran] == ["absent", "bad", "slow"]
    changed = (QUICK[0]._replace(command=QUICK[4].command), *QUICK[1:])
    assert suite.plan_jobs(changed, rows, False, False)[0].name == "good"
    assert suite.plan_jobs(QUICK, rows, False, again=True) == list(QUICK)
    # No time: nothing is run, and what was measured stays.
    assert suite.run_suite(QUICK, "x", 0, output, small=False, again=False) == rows
    left = {name: row for name, row in rows.items() if name != "bad"}
    assert suite.suite_exit_code(QUICK, left) == EXIT_STOPPED
    assert suite.suite_exit_code(QUICK[:1], left) == EXIT_DONE


def test_results_at_full_size_become_rows_of_the_page(tmp_path: Path) -> None:
    copy = shutil.copy(PAGE, tmp_path / "page.md")
    row = {
        "state": suite.DONE,
        "headline": "1300 images/s",
        "small": False,
        "date": "2027-01-02",
        "device": "1 x H200",
        "versions": {"torch": "2.11.0"},
        "text": "| a |\n|---|\n| 1 |",
    }
    small, failed = row | {"small": True}, row | {"state": suite.FAILED}
    rows = {"large": row, "smoke": small, "data": failed}
    page.write_page(copy, JOBS, rows)
    _, own, _ = page.split_page(copy)
    results = dict(page.ROW.findall(own))
    assert results.pop("large") == "1300 images/s"
    assert set(results.values()) == {"open"}
    assert "#### `large`\n\n2027-01-02, 1 x H200, torch 2.11.0\n\n| a |" in own
    # A later result of another row leaves this one as it is; the same result changes nothing.
    once = copy.read_text()
    page.write_page(copy, JOBS, rows)
    assert copy.read_text() == once
    page.write_page(copy, JOBS, {"mae": row | {"headline": "0.9"}})
    _, own, _ = page.split_page(copy)
    results = dict(page.ROW.findall(own))
    assert results["large"] == "1300 images/s" and results["mae"] == "0.9"
    assert own.index("#### `large`") < own.index("#### `mae`")


def test_a_row_of_the_rehearsal_runs_and_names_a_kernel_that_the_device_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    job = next(job for job in JOBS if job.name == "large_attention")
    words = suite.command_of(job, "images", small=True)
    assert run_benchmark([*words[2:], "--output", str(tmp_path / "result")]) == EXIT_DONE
    found = json.loads((tmp_path / "result.json").read_text())
    whole, flash, cudnn = found["results"]
    assert cudnn["fault"] == "no cudnn kernel for fp32 on this device" and cudnn["step_s"] is None
    assert flash["fault"] is None and flash["loss"] == pytest.approx(whole["loss"], rel=1e-4)
    headline = found["headline"]
    assert headline.startswith("as given: ") and "images/s, MFU" in headline
    assert "sdpa=flash: " in headline and "sdpa=cudnn: no cudnn kernel" in headline
    assert found["versions"]["torch"] and "CPU-s per step" in capsys.readouterr().out
    assert "CPU-s per step" in (tmp_path / "result.md").read_text()


def test_paths_that_need_a_failed_path_are_skipped(tmp_path: Path) -> None:
    chain = (
        smoke.Check("version", "--version"),
        smoke.Check("typing", "pretrian --config TARS"),
        smoke.Check("after", "--version"),
    )
    kept: list[int] = []
    alone = (smoke.Check("alone", "--version", needs=("no_such_package",)),)
    *found, other = smoke.run_checks(
        "some images", tmp_path, lambda some: kept.append(len(some)), (chain, alone)
    )
    assert other.state == "skipped: no_such_package is not installed" and kept == [1, 2, 3, 4]
    assert [one.state for one in found] == [smoke.OK, smoke.FAILED, "skipped: needs typing"]
    assert f"exit code {EXIT_CONFIG}, expected 0" in found[1].tail
    assert "did you mean pretrain?" in smoke.smoke_table(found)
    assert smoke.smoke_headline(found) == "1 of 3 paths work; failed: typing; skipped: after"


def test_paths_are_tried_beside_results_in_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that does not exist yet, and has a space in its name."""
    words: list[Sequence[str]] = []

    def run_limited(command: Sequence[str], log: Path, limit_s: float) -> Ended:
        words.append(command)
        return Ended(EXIT_DONE, 1.0, "")

    monkeypatch.setattr(smoke, "run_limited", run_limited)
    output = tmp_path / "new results" / "smoke"
    run_benchmark(["smoke", "my images", "--output", str(output)])
    assert output.with_suffix(".json").exists() and words
    given = dict(word.split("=", 1) for word in words[-1] if "=" in word)
    assert given["data.path"] == str(Path("my images").resolve())
    assert given["run.output_dir"].startswith(f"{output.parent}/smoke-")


def test_a_point_in_the_name_of_results_is_no_ending(tmp_path: Path) -> None:
    for name in ("large-0.1", "large-0.2", "large-0.2.json", "plain.md"):
        save_tables(tmp_path / name, {"device": name}, [], "")
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        *("large-0.1.json", "large-0.1.md", "large-0.2.json", "large-0.2.md"),
        *("plain.json", "plain.md"),
    ]
    (tmp_path / "suite-0.1.json").write_text(json.dumps({"rows": {"good": {}}}))
    assert suite.read_rows(tmp_path / "suite-0.1") == {"good": {}}
    assert suite.read_rows(tmp_path / "suite-0.2") == {}


def test_busy_time_counts_streams_that_overlap_once() -> None:
    spans = [Span(0, 2, "a"), Span(1, 3, "copy"), Span(1.5, 2.5, "b"), Span(5, 6, "a")]
    busy_s, gaps = busy_and_gaps(spans)
    assert busy_s == 4 and gaps == [Gap(2, "copy", "a")]
    longest = longest_kernels(spans)[0]
    assert (longest.name, longest.seconds, longest.count) == ("a", 3, 2)
    assert busy_and_gaps([]) == (0.0, [])


def test_wrong_requests_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    line = ["suite", "--data", str(tmp_path), "--small", "--output", str(tmp_path / "x")]
    assert run_benchmark([*line, "--only", "larg"]) == EXIT_CONFIG
    assert "--only larg: the rows are smoke, large, huge_fsdp" in capsys.readouterr().err
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert run_benchmark(["suite", "--data", str(tmp_path), *line[4:]]) == EXIT_CONFIG
    assert "there is none; add --small" in capsys.readouterr().err
    (tmp_path / "x.json").write_text("[]")
    assert run_benchmark(line) == EXIT_CONFIG
    assert "x.json is not a result of the suite" in capsys.readouterr().err


@pytest.mark.slow
def test_the_whole_suite_is_rehearsed(tmp_path: Path) -> None:
    images, output = make_photographs(tmp_path / "photos"), tmp_path / "suite"
    before = PAGE.read_text()
    line = ["suite", "--small", "--minutes", "60", "--data", str(images), "--output", str(output)]
    assert run_benchmark(line) == EXIT_DONE
    rows = json.loads(output.with_suffix(".json").read_text())["rows"]
    assert {row["state"] for row in rows.values()} <= {suite.DONE, suite.SKIPPED}
    assert list(rows) == NAMES and PAGE.read_text() == before
