"""Log lines hold no control characters, whatever a file is called."""

import logging

import pytest

from cmtmae_scale.runtime.log import escape_controls, set_up_logging


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
