"""A folder with files of another program is refused before anything is written there."""

import errno
from pathlib import Path
from typing import Any

import pytest

from cmtmae_scale.config.load import save_config
from cmtmae_scale.config.schema import Config
from cmtmae_scale.engine.folder import refuse_foreign_folder
from cmtmae_scale.errors import ConfigError, may_pass
from tests.engine.fault_case import command_on_ranks
from tests.engine.run_case import write_recipe
from tests.processes import run_ranks


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.yaml", "model: resnet50\n"),
        ("config.yaml", "run: 3\ndata: {}\ntrain: {}\n"),
        ("config.yaml", "[1, 2]\n"),
        ("config.yaml", "a: {"),
        ("log.jsonl", '{"epoch": 1}\n'),
        ("log.jsonl", "Starting ...\n"),
        ("log.jsonl", "3\n"),
    ],
)
def test_files_of_another_program_are_refused(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=f"holds {name} of another program.*move the file away"):
        refuse_foreign_folder(tmp_path)


def test_a_folder_in_the_place_of_the_log_is_refused(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").mkdir()
    with pytest.raises(ConfigError, match=r"holds log\.jsonl of another program"):
        refuse_foreign_folder(tmp_path)


@pytest.mark.parametrize("log", ["", "\n", '{"step": 3, "loss/total": 1.0}\n{"half a li'])
def test_a_folder_of_a_run_is_taken(tmp_path: Path, log: str) -> None:
    refuse_foreign_folder(tmp_path / "absent")
    refuse_foreign_folder(tmp_path)
    (tmp_path / "log.jsonl").write_text(log)  # of a launch that ended before its settings
    refuse_foreign_folder(tmp_path)
    save_config(Config(), tmp_path / "config.yaml")
    (tmp_path / "log.jsonl").write_text("damaged\n")
    refuse_foreign_folder(tmp_path)


def test_a_store_that_fails_makes_no_folder_foreign(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launch ends with 75, and the run is launched again."""
    save_config(Config(), tmp_path / "config.yaml")

    def fail(*_: Any) -> Any:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(OSError, match="Input/output error") as raised:
        refuse_foreign_folder(tmp_path)
    assert may_pass(raised.value)


@pytest.mark.gloo
def test_a_launch_touches_nothing_there(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("model: resnet50\n")
    assert run_ranks(2, command_on_ranks, write_recipe(tmp_path, depth=1), []) == [78, 78]
    assert [file.name for file in folder.iterdir()] == ["config.yaml"]
    assert (folder / "config.yaml").read_text() == "model: resnet50\n"
