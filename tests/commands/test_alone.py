"""A command of one process: one line and the code of every error that the user can fix."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from cmtmae_scale.commands.alone import run_alone
from cmtmae_scale.commands.check_data import check_data
from cmtmae_scale.commands.demo import read_losses
from cmtmae_scale.commands.report import write_report
from cmtmae_scale.errors import ConfigError
from dataloading.errors import DataError, ReadError
from tests.engine.run_case import make_photographs


def refused(number: int) -> OSError:
    return OSError(number, os.strerror(number), "out.json")


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def fail(error: Exception, cause: Exception | None = None) -> Callable[[], int]:
    def command() -> int:
        raise error from cause

    return command


@pytest.mark.parametrize(
    ("error", "cause", "code", "line"),
    [
        (ConfigError("a=1"), None, 78, "a=1"),
        (DataError("none"), refused(errno.EACCES), 78, "none"),
        (ConfigError("full"), refused(errno.ENOSPC), 75, "full"),
        (DataError("full"), refused(errno.EDQUOT), 75, "full"),
        (ReadError("away"), refused(errno.ENOENT), 75, "away"),
        (ConfigError("away"), ReadError("away"), 75, "away"),
        (ConfigError("full"), caused(DataError("full"), refused(errno.ENOSPC)), 75, "full"),
        (ConfigError("a=1"), caused(DataError("none"), refused(errno.EACCES)), 78, "a=1"),
        (refused(errno.EIO), None, 75, "out.json: Input/output error; see that the storage works"),
        (refused(errno.ESTALE), None, 75, "out.json: Stale file handle; see that the "),
    ],
)
def test_an_error_is_one_line_and_a_code(
    error: Exception, cause: Exception | None, code: int, line: str
) -> None:
    lines: list[str] = []
    assert run_alone(fail(error, cause), lines.append) == code
    assert len(lines) == 1 and lines[0].startswith(line)


def test_other_errors_keep_their_traceback() -> None:
    with pytest.raises(PermissionError):
        run_alone(fail(refused(errno.EACCES)))


def test_commands_on_a_full_store_can_be_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = make_photographs(tmp_path / "photos", 4)
    (tmp_path / "config.yaml").write_text("run:\n  name: a\n")

    def sync(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("dataloading.files.sync", sync)
    assert write_report([str(tmp_path)]) == 75
    assert check_data([str(photos), "--threads", "1", "--report", str(tmp_path / "r.json")]) == 75
    said = capsys.readouterr().err
    for name in ("report.html", "r.json"):
        assert (
            f"{name}: cannot be written (No space left on device); make room there and try the "
            "same command again" in said
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "photos"]


def test_the_demo_skips_a_line_that_cannot_be_read(tmp_path: Path) -> None:
    lines = ['{"step": 1, "loss/total": 2}', '{"step": 2, "lo', '{"step": 3, "incident": "x"}']
    (tmp_path / "log.jsonl").write_text("\n".join([*lines, '{"step": 4, "loss/total": 1}']))
    assert [entry["step"] for entry in read_losses(tmp_path / "log.jsonl")] == [1, 4]
