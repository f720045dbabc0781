"""Shipped files are copied whole to the path that they have in a clone, and never over others."""

import errno
import os
import shutil
from pathlib import Path

import pytest

from cmtmae_scale.commands.copy import copy_shipped
from cmtmae_scale.errors import EXIT_CONFIG, EXIT_DONE, EXIT_STOPPED

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_names_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert copy_shipped([]) == EXIT_DONE
    text = capsys.readouterr().out
    assert "recipes    demo " in text and "templates  docker kubernetes slurm\n" in text
    assert "studies    cpu cpu_finetune cpu_no_decoder first pilot smoke\n" in text


def test_files_and_folders_are_copied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert copy_shipped(["vit_base", "smoke", "slurm"]) == EXIT_DONE
    places = ("configs/vit_base.yaml", "configs/studies/smoke.yaml", "launchers/slurm")
    assert capsys.readouterr().out.splitlines() == list(places)
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    slurm = {f"launchers/slurm/{path.name}" for path in (ROOT / "launchers/slurm").iterdir()}
    assert names == {*places[:2], *slurm}
    for name in names:
        assert (tmp_path / name).read_bytes() == (ROOT / name).read_bytes()


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "configs" / "demo.yaml"
    mine.parent.mkdir()
    mine.write_text("mine")
    assert copy_shipped(["demo"]) == EXIT_CONFIG
    assert "configs/demo.yaml exists; move it away" in capsys.readouterr().err
    assert mine.read_text() == "mine"


def test_an_unknown_name_copies_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert copy_shipped(["demo", "../demo"]) == EXIT_CONFIG
    assert capsys.readouterr().err.startswith("../demo: no recipe, study or template of that name")
    assert not list(tmp_path.iterdir())


def test_a_place_that_is_a_file_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "configs").write_text("")
    assert copy_shipped(["demo"]) == EXIT_CONFIG
    assert "configs/demo.yaml: " in capsys.readouterr().err


def test_a_place_that_is_mounted_read_only_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def mkdir(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    assert copy_shipped(["demo"]) == EXIT_CONFIG
    line = "configs/demo.yaml: Read-only file system; work in another folder\n"
    assert capsys.readouterr().err == line


def test_a_copy_that_was_interrupted_is_made_again(tmp_path: Path) -> None:
    draft = tmp_path / "launchers" / ".slurm.draft"
    draft.mkdir(parents=True)
    (draft / "half").write_text("")
    assert copy_shipped(["slurm"]) == EXIT_DONE
    assert not draft.exists() and not (tmp_path / "launchers/slurm/half").exists()


@pytest.mark.parametrize("name", ["demo", "slurm"])
def test_a_full_store_is_75_and_leaves_no_half_copy(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def copyfile(source: Path, target: Path, **options: object) -> None:
        Path(target).write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))

    monkeypatch.setattr(shutil, "copyfile", copyfile)
    assert copy_shipped([name]) == EXIT_STOPPED
    assert "No space left on device; make room where the command writes" in capsys.readouterr().err
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
