"""A file is replaced whole or not at all, even with concurrent writers."""

import errno
import hashlib
import os
import threading
from pathlib import Path

import pytest

from cmtmae_scale.errors import ConfigError, SaveError, exit_code_of
from cmtmae_scale.runtime.storage import append_line, atomic_path, optional_write, write_atomic


def test_a_file_is_replaced_and_its_digest_returned(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text("old")
    for data in ("new \u00e9", b"bytes"):
        facts = write_atomic(path, data)
        content = path.read_bytes()
        assert content == (data if isinstance(data, bytes) else data.encode())
        assert facts == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failure_keeps_the_old_file_and_no_draft(
    tmp_path: Path, error: type[BaseException]
) -> None:
    path = tmp_path / "file.json"
    path.write_text("old")
    with pytest.raises(error), atomic_path(path) as draft:
        draft.write_text("half")
        assert draft.name.startswith(".file.json.") and draft.suffix == ".tmp"
        raise error
    with pytest.raises(ZeroDivisionError), atomic_path(tmp_path / "folder") as draft:
        draft.mkdir()
        (draft / "x").write_text("half")
        raise ZeroDivisionError
    assert [item.read_text() for item in tmp_path.iterdir()] == ["old"]


def test_concurrent_writers_of_one_file_do_not_collide(tmp_path: Path) -> None:
    path, texts = tmp_path / "file", [str(number) * 10_000 for number in range(4)]

    def write_often(text: str) -> None:
        for _ in range(50):
            write_atomic(path, text, durable=False)
            seen.append(path.read_text())

    seen: list[str] = []
    threads = [threading.Thread(target=write_often, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 200 and set(seen) <= set(texts)
    assert list(tmp_path.iterdir()) == [path]


def test_a_line_is_appended_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, write = tmp_path / "log", os.write
    path.write_bytes(b"one\nhal")  # a killed process left a half line
    append_line(path, "two")
    whole = path.read_bytes()
    assert whole == b"one\nhal\ntwo\n"
    room = [3]

    def short_write(descriptor: int, data: bytes) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        part, room[0] = data[: room[0]], max(room[0] - len(data), 0)
        return write(descriptor, part)

    monkeypatch.setattr(os, "write", short_write)
    with pytest.raises(OSError, match="No space"):
        append_line(path, "three")
    assert path.read_bytes() == whole
    room[0] = 99
    append_line(path, "four")
    assert path.read_bytes() == whole + b"four\n"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EACCES])
def test_a_store_that_refuses_warns_once_and_at_a_launch_only_if_it_cannot_pass(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    error = OSError(number, os.strerror(number))
    for _ in range(3):
        with optional_write(tmp_path / "log"):
            raise error
    (line,) = caplog.messages
    assert f"log cannot be written ({os.strerror(number)}); the run continues without it" in line
    passes = number != errno.EACCES
    try:
        with optional_write(tmp_path / "log", at_launch=True):
            raise error
    except OSError:
        assert passes
    else:
        assert not passes
    for kind, code in ((ConfigError, 75 if passes else 78), (SaveError, 1)):
        try:
            raise kind("cannot be written") from error
        except kind as raised:
            assert exit_code_of(raised) == code
