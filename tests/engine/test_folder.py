"""A folder with files of another program is refused before anything is written there."""

import errno
import os
from pathlib import Path

import pytest

from cmtmae_scale.config.load import save_config
from cmtmae_scale.config.schema import Config
from cmtmae_scale.engine.agreement import require_shared
from cmtmae_scale.engine.folder import refuse_foreign_folder
from cmtmae_scale.errors import CmtMaeError, ConfigError, exit_code_of
from tests.engine.fault_case import command_on_ranks, commands_on_ranks
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


@pytest.mark.gloo
def test_a_launch_touches_nothing_there(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("model: resnet50\n")
    assert run_ranks(2, command_on_ranks, write_recipe(tmp_path, depth=1), []) == [78, 78]
    assert [file.name for file in folder.iterdir()] == ["config.yaml"]
    assert (folder / "config.yaml").read_text() == "model: resnet50\n"


@pytest.mark.gloo
def test_a_folder_that_cannot_be_used_is_refused_on_one_rank_and_on_several(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, depth=1)
    (tmp_path / "file").touch()
    (tmp_path / "log" / "log.jsonl").mkdir(parents=True)
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "checkpoints").symlink_to(tmp_path / "unmounted")
    launches = [
        [f"run.output_dir={tmp_path / name}"] for name in ("file", "file/run", "log", "link")
    ]
    for world_size in (1, 2):
        assert run_ranks(world_size, commands_on_ranks, recipe, launches) == [[78] * 4] * world_size


def test_what_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name, text in (("file/run", "Not a directory"), ("n" * 300, "File name too long")):
        with pytest.raises(ConfigError, match=rf"cannot be used \({text}: {tmp_path / name}"):
            refuse_foreign_folder(tmp_path / name)
    (tmp_path / "checkpoints").symlink_to(tmp_path / "unmounted")
    with pytest.raises(ConfigError, match=rf"\(File exists: {tmp_path / 'checkpoints'}\)"):
        require_shared(tmp_path, 0)


@pytest.mark.parametrize(
    ("number", "code"), [(errno.EIO, 75), (errno.ESTALE, 75), (errno.EACCES, 78)]
)
def test_settings_that_cannot_be_read_are_not_those_of_another_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    save_config(Config(), tmp_path / "config.yaml")

    def refuse(path: Path, *_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(CmtMaeError, match=rf"cannot be used \({os.strerror(number)}") as caught:
        refuse_foreign_folder(tmp_path)
    assert exit_code_of(caught.value) == code
    remedy = "see that the storage works and try " if code == 75 else "correct it or choose another"
    assert remedy in str(caught.value)
