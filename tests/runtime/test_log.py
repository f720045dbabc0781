"""Lines on a terminal and in ``train.log``, whatever a file is called and a store does."""

import errno
import io
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from tqdm import tqdm

from cmtmae_scale.errors import ConfigError
from cmtmae_scale.runtime import log as module
from cmtmae_scale.runtime.log import RunLog, TerminalHandler, escape_controls, set_up_logging


def test_control_characters_of_names_are_escaped(capfd: pytest.CaptureFixture[str]) -> None:
    set_up_logging(0, 1)
    logger = logging.getLogger("cmtmae_scale.x")
    logger.info("one\n12:00:00 INFO forged")
    logger.info("image %s", "a\x1b[31m\x07\r\x9b\u202e\x85b.jpg")
    try:
        raise ValueError("\x1b[0m")
    except ValueError:
        logger.exception("failed")
    shown = capfd.readouterr().err
    lines = shown.split("\n")
    assert lines[1] == "    12:00:00 INFO forged"
    first = lines[2]
    assert first.endswith("image a\\x1b[31m\\x07\\r\\x9b\\u202e\\x85b.jpg")
    assert "\x1b" not in shown and "ValueError: \\x1b[0m" in shown


def test_other_text_is_unchanged() -> None:
    text = "tab\t and line\nfeed, \u00e9\u4e2d\U0001f600 \N{THIN SPACE}x \udcff"
    assert escape_controls(text.replace("\udcff", "")) == text.replace("\udcff", "")
    assert escape_controls("\udcff").isascii()


def test_a_line_stands_above_the_progress_bar() -> None:
    stream = io.StringIO()
    with tqdm(total=4, file=stream, ncols=40) as bar:
        bar.update(1)
        TerminalHandler(stream).handle(logging.makeLogRecord({"msg": "a line"}))
        before, _, after = stream.getvalue().partition("a line")
    assert before.endswith("\r")  # the bar is erased, the line begins at the left
    assert before.rpartition("\r")[0].endswith(" " * 39)
    assert after.startswith("\n\r") and "1/4" in after  # and the bar is drawn again below


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    logger = logging.getLogger("cmtmae_scale")
    before = logger.level
    logger.setLevel(logging.INFO)
    yield logger
    logger.setLevel(before)


def test_the_log_of_a_run_has_dates_and_goes_on_at_the_next_launch(
    tmp_path: Path, logger: logging.Logger
) -> None:
    with RunLog() as log:
        logger.info("before the folder is this launch's")
        log.open(tmp_path)
        logger.info("step %d", 1)
    with pytest.raises(ConfigError), RunLog() as log:
        log.open(tmp_path)
        raise ConfigError("mask.ratio differs; set it to 0.7")
    with pytest.raises(ZeroDivisionError), RunLog() as log:
        log.open(tmp_path)
        _ = 1 / 0
    with pytest.raises(ConfigError), RunLog():
        raise ConfigError("another launch holds the folder")
    logger.info("after the launch")
    text = (tmp_path / "train.log").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("    ")]
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} [A-Z]+ ", line) for line in lines)
    assert [line.split(" ", 2)[2] for line in lines] == [
        "INFO before the folder is this launch's",
        "INFO step 1",
        "ERROR mask.ratio differs; set it to 0.7",
        "ERROR Traceback (most recent call last):",
    ]
    assert "    ZeroDivisionError: division by zero" in text


def test_a_full_store_loses_lines_of_the_log_and_counts_them(
    tmp_path: Path, logger: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    append_line = module.append_line

    def refuse(path: Path, line: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with RunLog() as log:
        log.open(tmp_path)
        monkeypatch.setattr(module, "append_line", refuse)
        logger.info("one")
        logger.info("two")
        monkeypatch.setattr(module, "append_line", append_line)
        logger.info("three")
    first, last = (tmp_path / "train.log").read_text().splitlines()
    assert first == "3 lines could not be written"  # and the warning about them
    assert last.endswith("INFO three")
