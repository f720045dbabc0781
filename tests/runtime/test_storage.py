"""A file is replaced whole or not at all, whoever else writes it."""

import hashlib
import threading
from pathlib import Path

import pytest

from cmtmae_scale.runtime.storage import atomic_path, write_atomic


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
