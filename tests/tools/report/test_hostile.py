"""The report of files of any content is written, and opens only regular files within the run."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from cmtmae_scale.commands.report import write_page, write_report
from cmtmae_scale.tools.report.run import FIGURE_BYTES, read_run
from cmtmae_scale.tools.report.sections import figures_section, headline
from tests.tools.report.report_case import write_run
from tests.tools.report.test_report import read_page

SECRET = "hunter2" * 9
FILES = (
    "config.yaml",
    "log.jsonl",
    "exit.json",
    "starts.jsonl",
    "quarantine.jsonl",
    "evaluation/x.json",
    "index/index.json",
    "evaluation/train-index/index.json",
    "checkpoints/step-00000060/state.json",
    "figures/step-00000099.png",
)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    run_dir = write_run(tmp_path / "run")
    for name in FILES:
        (run_dir / name).parent.mkdir(parents=True, exist_ok=True)
    return run_dir


@pytest.mark.parametrize("kind", ["pipe", "device", "link out", "link to nothing", "folder"])
def test_only_regular_files_within_the_run_are_read(run_dir: Path, kind: str) -> None:
    secret = run_dir.parent / "secret"
    secret.write_text(SECRET)
    for name in FILES:
        path = run_dir / name
        path.unlink(missing_ok=True)
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        else:
            targets = {"device": "/dev/zero", "link out": secret, "link to nothing": "/no/file"}
            path.symlink_to(targets[kind])
    text = write_page([run_dir]).read_text()
    assert SECRET not in text and "aHVudGVyMm" not in text  # as base64
    words, _ = read_page(run_dir / "report.html")
    assert "figures/step-00000099.png is not shown" in words


def test_a_folder_of_figures_elsewhere_is_not_shown(run_dir: Path) -> None:
    other = run_dir.parent / "other"
    (run_dir / "figures").rename(other)
    (other / "step-00000099.png").write_text(SECRET)
    (run_dir / "figures").symlink_to(other)
    assert "aHVudGVyMm" not in write_page([run_dir]).read_text()


def test_a_figure_that_is_huge_or_gone_ends_no_report(run_dir: Path) -> None:
    path = run_dir / "figures" / "step-00000099.png"
    with path.open("wb") as opened:
        opened.truncate(FIGURE_BYTES + 1)
    assert any("99.png is not shown (more than" in text for text in read_run(run_dir).problems)
    path.write_bytes(b"x")
    run = read_run(run_dir)
    assert run.figures[-1] == (99, path)
    path.unlink()
    assert "step 99" in figures_section(run, "a", 3)


VALUES: list[Any] = [
    None,
    True,
    -3,
    1e999,
    10**400,
    "text \udcff \x1b[31m <b>",
    [],
    [[[]], {"a": 1}],
    {},
    {"a": {"b": [1]}},
]


@pytest.mark.parametrize("value", VALUES, ids=range(len(VALUES)))
def test_values_of_any_type_are_reported(run_dir: Path, value: Any) -> None:
    for name in FILES[1:-1]:
        path = run_dir / name
        try:
            lines = path.read_text().splitlines()
        except FileNotFoundError:
            lines = ["{}"]
        tree = json.loads(lines[0] if name.endswith("l") else "\n".join(lines))
        keys = ["step", "code", "reason", "incident", "versions", "overrides", "name", "progress"]
        keys += ["results", "names", "labels", "world_size", "loss/total", "images_s", "lr"]
        changed = [dict.fromkeys([*tree, *keys], value), {"results": [dict.fromkeys(keys, value)]}]
        changed += [{"progress": dict.fromkeys(["end_step", "step0"], value)}, value]
        for one in changed if name.endswith("l") else changed[:1]:
            lines.append(json.dumps(one))
        whole = json.dumps(changed[len(name) % 4])
        path.write_text("\n".join(lines) if name.endswith("l") else whole)
    words, _ = read_page(write_page([run_dir]))
    assert "Incidents" in words and "Evaluation" in words
    assert write_report([str(run_dir), str(run_dir.parent / "run" / "..") + "/run"]) == 0


def test_results_of_any_type_leave_the_outcome(run_dir: Path) -> None:
    row = {"method": "k-NN k=10", "features": "patches", "weights": "random weights"}
    run = read_run(run_dir)
    for value in VALUES:
        for results in (value, [value, row | {"accuracy": value}]):
            for images in (value, {"train": value, "test": {"path": value, "digest": value}}):
                facts = {"images": images, "settings": value, "split": value}
                run.results = [("x.json", {"results": results} | facts)]
                assert "k-NN accuracy" in headline(run)


def test_deep_and_broken_files_are_reported(run_dir: Path) -> None:
    for content in (b"[" * 1200, b'{"a":' * 1200, b"\xff\xfe\x00", b"", b"\x00" * 99):
        for name in FILES:
            (run_dir / name).write_bytes(content)
        read_page(write_page([run_dir]))


def test_names_that_are_not_utf8_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = Path(os.fsdecode(os.fsencode(tmp_path) + b"/r\xe9sum\xe9 \x1b[31m"))
    run_dir = write_run(tmp_path / "run").rename(name)
    names = [{"name": os.fsdecode(b"caf\xe9.jpg"), "reason": "x", "path": os.fsdecode(b"/\xff")}]
    (run_dir / "quarantine.jsonl").write_text("".join(json.dumps(one) + "\n" for one in names))
    (run_dir / "evaluation" / os.fsdecode(b"\xe9.json")).write_text("[]")
    assert write_report([str(run_dir)]) == 0
    shown = capsys.readouterr().out
    assert shown.isascii() and shown.strip().isprintable()
    words, _ = read_page(run_dir / "report.html")
    assert r"caf\udce9.jpg" in words
